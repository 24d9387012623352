"""AdaClip: clips each tensor at the running mean of its largest coordinate.

Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
<https://arxiv.org/abs/2502.17055v2>`_, 2025.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _tensor_statistics, _validate


class AdaClipState(NamedTuple):
    """State of :func:`adaclip`: vectors with one entry per tensor, and counters.

    Attributes:
      adaclip_steps: Number of steps in the running mean.
      adaclip_mean: Running mean of the largest absolute value in the tensor.
      adaclip_clipped_count: Number of coordinates clipped in the last step.
      adaclip_clipped_total: The same, summed over all steps.
      adaclip_nonfinite_count: Number of NaN, infinite or overflowing coordinates in the
        last step.
      adaclip_nonfinite_total: The same, summed over all steps.
    """

    adaclip_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    adaclip_mean: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    adaclip_clipped_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    adaclip_clipped_total: jax.Array | None  # shape=(), dtype=jnp.int32.
    adaclip_nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    adaclip_nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def adaclip(
    gamma3: jax.typing.ArrayLike = 0.999, *, count: bool = False
) -> optax.GradientTransformation:
    r"""Clips each tensor at the running mean of its largest coordinate.

    This is done for each tensor, with :math:`k` the number of steps:

    .. math::
      G &= \max_i |g_i| \\
      M &\leftarrow \gamma_3 M + (1 - \gamma_3) G, \quad
        \hat M = M / (1 - \gamma_3^k) \\
      g_i &\leftarrow \hat M g_i / G \quad \text{where } |g_i| > \hat M

    The largest coordinate becomes :math:`\hat M`. All coordinates above
    :math:`\hat M` are scaled by the same factor. A coordinate just above :math:`\hat M`
    therefore ends up far below one just under :math:`\hat M`. This is as in the paper.
    Non-finite coordinates become 0.

    Args:
      gamma3: Decay of the running mean, in [0, 1).
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
      >>> tx = spam_optax.adaclip(gamma3=0.9, count=True)
      >>> state = tx.init(jnp.zeros(3))
      >>> gradients, state = tx.update(jnp.array([1.0, -2.0, 0.5]), state)
      >>> gradients, state = tx.update(jnp.array([1.0, -200.0, 0.5]), state)
      >>> print(gradients.round(), optax.tree.get(state, "adaclip_clipped_count"))
      [   1. -106.    0.] 1

    References:
      Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055v2>`_, 2025,
      section 3: AdaClip.
    """
    gamma3 = _validate.check_decay("gamma3", gamma3)
    _validate.check_flags(count=count)

    def init_fn(params: optax.Params) -> AdaClipState:
        steps, mean = _tensor_statistics.init(params, 1)
        return AdaClipState(steps, mean, *_moments.init_counters(count, 4))

    def update_fn(
        updates: optax.Updates,
        state: AdaClipState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, AdaClipState]:
        del params
        _validate.check_state(state, AdaClipState)
        gradients, structure = _tensor_statistics.flatten(updates, state.adaclip_steps)
        limits = find_limits(gradients, state.adaclip_steps, state.adaclip_mean, gamma3)

        def clip_tensor(
            g: jax.Array, limit: jax.Array, factor: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            clipped, above = clip(g, limit, factor)
            counts: tuple[jax.Array, ...] = ()
            if count:
                bad = _tensor_statistics.is_nonfinite(g)
                counts = _arithmetic.totals(above, bad)
            return _arithmetic.cast(clipped, jnp.asarray(g).dtype), counts

        clipped, counts = _moments.map_lists(
            clip_tensor,
            gradients,
            *_tensor_statistics.split(limits.limit, limits.factor),
            n=2,
        )
        totals = state.adaclip_clipped_total, state.adaclip_nonfinite_total
        return structure.unflatten(clipped), AdaClipState(
            limits.steps, limits.mean, *_moments.add_counts(counts, *totals)
        )

    return optax.GradientTransformation(init_fn, update_fn)


class Limits(NamedTuple):
    """The limits of all tensors in one step, and the new statistics.

    Attributes:
      limit: Coordinates above it are clipped.
      factor: Factor on these coordinates.
      usable: Whether the gradient enters the statistics: not if it is missing, and not
        if it has non-finite coordinates and all others are 0, or too small for a
        normal float32 number.
      steps: Number of steps in the running mean.
      mean: Running mean of the largest absolute value.
    """

    limit: jax.Array
    factor: jax.Array
    usable: jax.Array
    steps: jax.Array
    mean: jax.Array


def find_limits(
    gradients: Sequence[jax.Array | None],
    steps: jax.Array,
    mean: jax.Array,
    gamma3: jax.typing.ArrayLike,
) -> Limits:
    """Returns the limits of this step, from the statistics before it."""
    # This number stands for non-finite coordinates and for missing gradients. One
    # maximum then also tells whether it is that of finite coordinates. Two reductions
    # take longer to compile.
    unknown = float(jnp.finfo(jnp.float32).tiny)

    def measure(g: jax.Array) -> tuple[jax.Array]:
        bad = _tensor_statistics.is_nonfinite(g)
        size = jnp.abs(jnp.where(bad, unknown, _arithmetic.widen(g)))
        return (jax.lax.reduce_max(size, tuple(range(size.ndim))),)

    (largest,) = _tensor_statistics.measure(measure, gradients, missing=(unknown,))
    largest = largest.astype(jnp.float32)
    usable = largest != unknown
    largest = jnp.where(largest > unknown, largest, 0)
    steps = steps + usable.astype(jnp.int32)
    mean = _tensor_statistics.average(mean, largest, gamma3, usable)
    limit = _tensor_statistics.corrected(mean, gamma3, steps)
    # The mean of tiny coordinates may underflow to 0. XLA merges the two divisions, and
    # their divisor may underflow as well.
    factor = jnp.where(limit > 0, limit / _tensor_statistics.or_one(largest), 0)
    return Limits(limit, factor, usable, steps, mean)


def widen_finite(g: jax.Array) -> jax.Array:
    """Sets non-finite coordinates to 0. Returns the compute dtype."""
    return _arithmetic.widen(_tensor_statistics.zero_nonfinite(g))


def clip(
    g: jax.Array, limit: jax.Array, factor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scales coordinates above the limit, and sets non-finite ones to 0.

    Returns the clipped gradient in the compute dtype, and where it is scaled.
    """
    bad, g = _tensor_statistics.is_nonfinite(g), _arithmetic.widen(g)
    above = jnp.abs(g) > limit
    clipped = jnp.where(above, g * factor, g).astype(g.dtype)
    return jnp.where(bad, jnp.zeros_like(g), clipped), above & ~bad
