"""AdaGC: clips every tensor by its own recent norms.

Wang et al., `AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping
<https://arxiv.org/abs/2502.11034>`_, 2025.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _tensor_statistics, _validate


class AdaGCState(NamedTuple):
    """State of :func:`adagc`.

    The vectors have one entry per tensor, in the order of :func:`tensor_names`.

    Attributes:
      adagc_steps: Number of steps in the running norm.
      adagc_norm: Running norm of the clipped gradient. 0 means that there is no history
        yet.
      adagc_scale: Factor that the last gradient was multiplied by. 1 means that it was
        not clipped.
      adagc_nonfinite_count: Number of NaN, infinite or overflowing coordinates in the
        last step, in all tensors.
      adagc_nonfinite_total: The same, summed over all steps.
    """

    adagc_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    adagc_norm: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    adagc_scale: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    adagc_nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    adagc_nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def adagc(
    threshold: jax.typing.ArrayLike = 1.04,
    decay: jax.typing.ArrayLike = 0.99,
    *,
    max_norm: jax.typing.ArrayLike = 1.0,
    warmup_steps: jax.typing.ArrayLike = 100,
    count: bool = False,
) -> optax.GradientTransformation:
    r"""Clips the norm of each tensor's gradient relative to its own history.

    The norm of a tensor is :math:`n` and its running norm is :math:`\gamma`. With the
    `threshold` :math:`\lambda` and `decay` :math:`\beta`, each step computes

    .. math::
      h &= \min(1, \lambda \gamma / n) \\
      g &\leftarrow h g \\
      \gamma &\leftarrow \beta \gamma + (1 - \beta) h n

    In the first `warmup_steps` it computes instead

    .. math::
      h = \min(1, n_{\max} / N), \qquad \gamma \leftarrow \min(\gamma, h n)

    with the norm :math:`N` of all tensors together and `max_norm` :math:`n_{\max}`.

    Coordinates that are not finite, or whose square overflows, become 0 first. If the
    norm of a tensor is then 0, because the gradient is zero or has no finite
    coordinate, its running norm and its step count do not change.

    There are two differences from the paper. A zero gradient in the warm-up is ignored.
    In the paper it makes :math:`\gamma` 0 and freezes the tensor. Each tensor counts
    its own warm-up steps.

    Args:
      threshold: Limit on the norm divided by the running norm, > 1. With 1 the running
        norm could never grow.
      decay: Decay of the running norm, in [0, 1).
      max_norm: Limit on the norm of all tensors in the warm-up, > 0.
      warmup_steps: Number of warm-up steps. With 0 the first gradient is not clipped.
      count: Whether the state counts coordinates; see :func:`spam_optax.spam`.

    Returns:
      The transformation. Its updates have the dtype of the gradients.

    Raises:
      ValueError: If an argument is out of range. ``update`` raises it if the number of
        tensors is not that of ``init``.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.adagc(warmup_steps=1)
      >>> params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
      >>> state = tx.init(params)
      >>> gradients = {"bias": jnp.full(2, 0.1), "kernel": jnp.full((2, 2), 0.1)}
      >>> _, state = tx.update(gradients, state)
      >>> gradients["kernel"] *= 100
      >>> _, state = tx.update(gradients, state)
      >>> print(spam_optax.tensor_names(params), state.adagc_scale)
      ('bias', 'kernel') [1.     0.0104]

    References:
      Wang et al., `AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
      Clipping <https://arxiv.org/abs/2502.11034>`_, 2025.

    .. seealso:: :func:`spam_optax.zclip` for a limit on the norm of all tensors.
    """
    threshold = _validate.check_number("threshold", threshold, above=1)
    decay = _validate.check_decay("decay", decay)
    max_norm = _validate.check_number("max_norm", max_norm, above=0)
    _validate.check_flags(count=count)
    warmup_steps = _validate.check_steps("warmup_steps", warmup_steps, low=0)

    def init_fn(params: optax.Params) -> AdaGCState:
        _tensor_statistics.check_params(params)
        tensors = len(jax.tree.leaves(params))
        return AdaGCState(
            jnp.zeros([tensors], jnp.int32),
            jnp.zeros([tensors], jnp.float32),
            jnp.ones([tensors], jnp.float32),
            *_moments.init_counters(count, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: AdaGCState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, AdaGCState]:
        del params
        _validate.check_state(state, AdaGCState)
        _validate.check_tensors(updates, state.adagc_steps.shape[0])
        gradients, counters = _tensor_statistics.drop_nonfinite(
            updates, state.adagc_nonfinite_total
        )
        norm, history = _tensor_statistics.norms(gradients), state.adagc_norm
        is_warm = state.adagc_steps >= warmup_steps
        limit = jnp.where(history > 0, threshold * history, norm)
        scale = jnp.where(
            is_warm,
            _tensor_statistics.clip_factor(norm, limit),
            _tensor_statistics.clip_factor(_arithmetic.norm(norm), max_norm),
        )
        clipped = scale * norm
        running = jnp.where(
            is_warm,
            decay * history + (1 - decay) * clipped,
            jnp.minimum(history, clipped),
        )
        running = jnp.where(history > 0, running, clipped).astype(jnp.float32)
        is_news = norm > 0
        leaves, structure = jax.tree.flatten(gradients)
        return structure.unflatten(
            _tensor_statistics.scale_all(leaves, scale)
        ), AdaGCState(
            jnp.where(
                is_news, optax.safe_increment(state.adagc_steps), state.adagc_steps
            ),
            jnp.where(is_news, running, history),
            scale,
            *counters,
        )

    return optax.GradientTransformation(init_fn, update_fn)
