"""SPAM's rule for spikes: which coordinates are spikes, and how they are clipped.

These functions do not check their arguments. :mod:`spam_optax.functional` checks them
for callers, and transformations check them when they are built.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spam_optax import _arithmetic


class SpikeRule(NamedTuple):
    """Defines which coordinates are spikes in one step.

    Attributes:
      threshold: A coordinate with ``g**2 > threshold * v`` is a spike.
      active: Where clipping is active: a boolean scalar, or booleans shaped like the
        gradient.
      clip_unseen: Whether a coordinate without history (``v == 0``) can be a spike.
    """

    threshold: jax.typing.ArrayLike
    active: jax.typing.ArrayLike
    clip_unseen: bool


def square_limit(
    g: jax.Array, v: jax.Array, rule: SpikeRule
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns the square of `g`, the limit on it, and where the limit applies.

    The dtype of the limit holds the square of a float64 gradient, also if the second
    moment is float32. The limit is so small that its root fits the dtype of `g`. Where
    no limit applies it is the largest number, which no finite square is above.
    """
    v, square = _arithmetic.widen(v), _arithmetic.abs_sq(g)
    has_history = v > 0
    limit = jnp.asarray(rule.threshold, v.dtype) * v
    has_limit = rule.active if rule.clip_unseen else rule.active & has_history
    if rule.clip_unseen:  # An infinite threshold times 0 is NaN.
        limit = jnp.where(has_history, limit, 0)
    dtype = _arithmetic.promote_types(v.dtype, square.dtype)
    limit = jnp.minimum(limit.astype(dtype), _arithmetic.largest_like(g) ** 2)
    largest = float(jnp.finfo(square.dtype).max)
    return square, jnp.where(has_limit, limit, largest), has_limit


def is_spike(g: jax.Array, v: jax.Array, rule: SpikeRule) -> jax.Array:
    """Marks the finite coordinates that are above their limit."""
    square, limit, _ = square_limit(g, v, rule)
    return (square > limit) & jnp.isfinite(square)


def clip(g: jax.Array, v: jax.Array, rule: SpikeRule) -> jax.Array:
    """Clips spikes and infinite coordinates to their limits, and sets NaN to 0."""
    square, limit, has_limit = square_limit(g, v, rule)
    sign, size = _arithmetic.sign(g), _arithmetic.root(limit)
    dtype = _arithmetic.promote_types(sign.dtype, size.dtype)
    limited = sign.astype(dtype) * size.astype(dtype)
    limited = jnp.where(has_limit & (square > limit), limited, 0).astype(g.dtype)
    return jnp.where(square <= limit, g, limited)


def clipped_square(g: jax.Array, v: jax.Array, rule: SpikeRule) -> jax.Array:
    """Returns ``|clip(g)|**2``, without taking a root."""
    square, limit, has_limit = square_limit(g, v, rule)
    limited = jnp.where(has_limit & (square > limit), limit, 0)
    return jnp.where(square <= limit, square, limited)


def clip_and_update_nu(
    g: jax.Array, v: jax.Array, b2: jax.typing.ArrayLike, rule: SpikeRule
) -> tuple[jax.Array, jax.Array]:
    r"""Clips a gradient and updates its second moment. Returns both.

    The second moment is updated first, and the limit is then computed from the new
    moment. XLA:CPU can therefore overwrite the old moment in place. The other order
    takes 4 to 8 bytes of temporary memory per parameter. For a spike
    :math:`v' = (\beta_2 + (1 - \beta_2) \theta) v`, so its limit is

    .. math::
      \sqrt{\theta v} = \sqrt{c v'}, \quad
      c = \frac{\theta}{\beta_2 + (1 - \beta_2) \theta}

    A gradient within the old limit is also within this one. The formula does not hold
    for :math:`v = 0`. Unless `clip_unseen` is set, such coordinates are recognized
    because :math:`v'` then equals :math:`(1 - \beta_2) g^2` exactly.
    """
    v = _arithmetic.ema(v, clipped_square(g, v, rule), b2)
    unseen = _arithmetic.ema(jnp.zeros([], v.dtype), _arithmetic.abs_sq(g), b2)
    # The margin covers rounding: gradients within their limit pass bit for bit.
    margin = 1 + 16 * float(jnp.finfo(v.dtype).eps)
    # Not with the threshold above and below the line: infinity clips nothing.
    share = margin / (b2 / rule.threshold + (1 - b2))
    rule = SpikeRule(share, rule.active & (v != unseen), rule.clip_unseen)
    return clip(g, v, rule), v


def count(
    g: jax.Array, v: jax.Array, nonfinite: jax.Array, rule: SpikeRule
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Counts spikes and non-finite coordinates.

    Returns `v`, for use after the count, and both counts.
    """
    counts = _arithmetic.totals(is_spike(g, v, rule), nonfinite)
    return _arithmetic.read_first(v, counts[0]), counts
