"""ZClip: clips the gradient when its norm is an outlier among the recent ones.

Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
<https://arxiv.org/abs/2504.02507>`_, 2025.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _tensor_statistics, _validate


class ZClipState(NamedTuple):
    """State of :func:`zclip`.

    Attributes:
      zclip_steps: Number of steps in the statistics.
      zclip_mean: Running mean of the norm of the gradient.
      zclip_std: Running standard deviation of the norm. The variance is not stored,
        because it could overflow.
      zclip_scale: Factor that the last gradient was multiplied by. 1 means that it was
        not clipped.
      zclip_nonfinite_count: Number of NaN, infinite or overflowing coordinates in the
        last step.
      zclip_nonfinite_total: The same, summed over all steps.
    """

    zclip_steps: jax.Array  # shape=(), dtype=jnp.int32.
    zclip_mean: jax.Array  # shape=(), dtype=jnp.float32.
    zclip_std: jax.Array  # shape=(), dtype=jnp.float32.
    zclip_scale: jax.Array  # shape=(), dtype=jnp.float32.
    zclip_nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    zclip_nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def zclip(
    threshold: jax.typing.ArrayLike = 2.5,
    decay: jax.typing.ArrayLike = 0.97,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    max_norm: jax.typing.ArrayLike | None = 1.0,
    warmup_steps: jax.typing.ArrayLike = 25,
    count: bool = False,
) -> optax.GradientTransformation:
    r"""Clips the global norm of the gradient when its z-score is high.

    The global norm is :math:`n`. Its running mean is :math:`\mu`, and its running
    standard deviation is :math:`\sigma`. With the `threshold` :math:`\theta` and
    `decay` :math:`\alpha`, each step computes

    .. math::
      z &= (n - \mu) / (\sigma + \varepsilon) \\
      n^* &= \mu + (\theta^2 / z) \sigma \quad \text{if } z > \theta,
        \text{ else } n \\
      g &\leftarrow g \min(n^*, n_{\max}) / n \\
      \mu &\leftarrow \alpha \mu + (1 - \alpha) n^* \\
      \sigma^2 &\leftarrow \alpha \sigma^2 + (1 - \alpha) (n^* - \mu)^2

    The last line uses the new mean. The larger the outlier, the lower its limit. In the
    first `warmup_steps` steps only `max_norm` :math:`n_{\max}` clips. The mean and the
    standard deviation are then those of all norms so far, taken before clipping.

    Coordinates that are not finite, or whose square overflows, become 0 first. If the
    norm is then 0, because the gradient is zero or has no finite coordinate, the
    statistics and their step count do not change.

    Two details that the paper does not specify follow the authors' implementation:
    `max_norm` limits the result and not the norm in the statistics, and `eps` is 1e-6.

    Args:
      threshold: The z-score above which a norm is an outlier, > 0.
      decay: Decay of the running mean and variance, in [0, 1).
      eps: Term added to the standard deviation, > 0.
      max_norm: Largest norm of the result, > 0. None: no such limit.
      warmup_steps: Number of steps for the first mean and standard deviation, at
        least 2.
      count: Whether the state counts coordinates; see :func:`spam_optax.spam`.

    Returns:
      The transformation. Its updates have the dtype of the gradients.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.zclip(max_norm=None, warmup_steps=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for size in (1.0, 1.2, 1.1, 100.0):
      ...     gradients, state = tx.update(jnp.array([size, 0.0]), state)
      ...     print(f"{gradients[0]:.2f} {state.zclip_scale:.3f}")
      1.00 1.000
      1.20 1.000
      1.10 1.000
      1.10 0.011

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025.

    .. seealso:: :func:`spam_optax.adagc` for a limit on every tensor.
    """
    threshold = _validate.check_number("threshold", threshold, above=0)
    decay = _validate.check_decay("decay", decay)
    eps = _validate.check_number("eps", eps, above=0)
    if max_norm is not None:
        max_norm = _validate.check_number("max_norm", max_norm, above=0)
    _validate.check_flags(count=count)
    warmup_steps = _validate.check_steps("warmup_steps", warmup_steps, low=2)

    def init_fn(params: optax.Params) -> ZClipState:
        _tensor_statistics.check_params(params)
        return ZClipState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.float32),
            jnp.zeros([], jnp.float32),
            jnp.ones([], jnp.float32),
            *_moments.init_counters(count, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: ZClipState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ZClipState]:
        del params
        _validate.check_state(state, ZClipState)
        gradients, counters = _tensor_statistics.drop_nonfinite(
            updates, state.zclip_nonfinite_total
        )
        norm = _arithmetic.norm(_tensor_statistics.norms(gradients))
        is_warm = state.zclip_steps >= warmup_steps
        limit = jnp.where(is_warm, _limit(norm, state, threshold, eps), norm)
        largest = jnp.inf if max_norm is None else max_norm
        scale = _tensor_statistics.clip_factor(norm, jnp.minimum(limit, largest))
        steps = optax.safe_increment(state.zclip_steps)
        # The warm-up takes the plain mean: the same rule with a decay of (k - 1) / k.
        keep = jnp.where(is_warm, decay, 1 - 1 / steps)
        # The paper uses deviations from the new mean. During the warm-up the standard
        # deviation is exact.
        share = jnp.where(is_warm, keep, jnp.sqrt(keep))
        mean, std = _move(state, limit, keep, share)
        is_news = norm > 0
        leaves, structure = jax.tree.flatten(gradients)
        (clipped,) = _moments.map_lists(
            lambda g: (_tensor_statistics.scale(g, scale),), leaves, n=1
        )
        return structure.unflatten(clipped), ZClipState(
            jnp.where(is_news, steps, state.zclip_steps),
            jnp.where(is_news, mean, state.zclip_mean),
            jnp.where(is_news, std, state.zclip_std),
            scale,
            *counters,
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _limit(
    norm: jax.Array,
    state: ZClipState,
    threshold: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> jax.Array:
    """Returns the norm, or the limit if the norm is an outlier."""
    z = (norm - state.zclip_mean) / (state.zclip_std + eps)
    is_outlier = z > threshold
    fraction = threshold / jnp.where(is_outlier, z, 1)
    lowered = state.zclip_mean + threshold * fraction * state.zclip_std
    return jnp.where(is_outlier, lowered, norm)


def _move(
    state: ZClipState, norm: jax.Array, keep: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the new mean and standard deviation.

    The deviation of `norm` is `share` times its distance from the old mean.
    """
    gap = norm - state.zclip_mean
    mean = state.zclip_mean + (1 - keep) * gap
    parts = [jnp.sqrt(keep) * state.zclip_std, jnp.sqrt(1 - keep) * share * gap]
    std = _arithmetic.norm(jnp.stack(parts))  # Squares would overflow.
    return mean.astype(jnp.float32), std.astype(jnp.float32)
