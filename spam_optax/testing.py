"""Corrupts gradients on purpose and reproducibly."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spam_optax import _arithmetic, _tensor_statistics, _validate

__all__ = ("InjectSpikesState", "inject_spikes")

_KINDS = ("scale", "noise", "nan", "inf")


class InjectSpikesState(NamedTuple):
    """State of :func:`inject_spikes`.

    Attributes:
      injection_step: Number of steps taken.
      injected_count: Number of coordinates corrupted in the last step.
    """

    injection_step: jax.Array  # shape=(), dtype=jnp.int32.
    injected_count: jax.Array  # shape=(), dtype=jnp.int32.


def inject_spikes(
    key: jax.Array | int,
    rate: jax.typing.ArrayLike = 1e-3,
    scale: jax.typing.ArrayLike = 1000.0,
    *,
    kind: str = "scale",
    steps: Iterable[int] | Callable[[jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformation:
    """Corrupts a random part of the gradients.

    The same key, rate, step, tree and shapes always give the same corrupted
    coordinates. Put it first in a chain to test how an optimizer handles faults:
    ``optax.chain(testing.inject_spikes(0, steps=[100]), optax.adam(1e-3))``.

    Args:
      key: A PRNG key, or a number to make one from.
      rate: Probability that a coordinate is corrupted, in [0, 1].
      scale: For ``"scale"`` the factor. For ``"noise"`` the root mean square of the
        noise, divided by that of the tensor's gradient.
      kind: How the chosen coordinates are corrupted. ``"scale"`` multiplies them by
        `scale`, and ``"noise"`` adds normal noise. ``"nan"`` makes them NaN. ``"inf"``
        makes them infinite with their sign, and 0 becomes positive infinity.
      steps: Steps in which gradients are corrupted: numbers, from 1, or a function from
        the step, an int32 scalar, to a boolean. None: every step.

    Returns:
      The transformation. Its updates have the dtype of the gradients. The number of
      coordinates corrupted in the last step is ``injected_count`` in the state.

    Raises:
      ValueError: If `rate` is outside [0, 1], `scale` is not finite, `kind` is unknown
        or a step is < 1.
      TypeError: If an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import testing
      >>> tx = testing.inject_spikes(0, rate=0.5, scale=10.0, steps=[2])
      >>> state = tx.init(jnp.zeros(4))
      >>> first, state = tx.update(jnp.ones(4), state)
      >>> second, state = tx.update(jnp.ones(4), state)
      >>> print(first, int((second == 10).sum()) == state.injected_count)
      [1. 1. 1. 1.] True

    .. seealso:: :func:`spam_optax.inject_hyperparams` in place of
      ``optax.inject_hyperparams``.
    """
    rate = _validate.check_number("rate", rate, at_least=0, at_most=1)
    scale = _validate.check_number("scale", scale)
    _validate.check_choice("kind", kind, _KINDS)
    is_hit_step = _step_test(steps)
    _validate.check_key(key)

    def init_fn(params: optax.Params) -> InjectSpikesState:
        del params
        return InjectSpikesState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: InjectSpikesState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, InjectSpikesState]:
        del params
        _validate.check_state(state, InjectSpikesState)
        _tensor_statistics.check_updates(updates)
        step = optax.safe_increment(state.injection_step)

        def corrupt(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            leaves, structure = jax.tree.flatten(updates)
            count = jnp.zeros([], jnp.int32)
            step_key = jax.random.fold_in(_validate.make_key(key), step)
            for i, g in enumerate(leaves):
                leaf_key = jax.random.fold_in(step_key, i)
                hit_key, value_key = jax.random.split(leaf_key)
                leaves[i] = _fault(value_key, g, scale, kind)
                if isinstance(rate, (int, float)) and rate == 1:
                    # A mask of ones would take seconds to draw, or to sum, at compile
                    # time.
                    hits = min(g.size, jnp.iinfo(jnp.int32).max)
                else:
                    hit = _hit(hit_key, g, rate)
                    leaves[i] = jnp.where(hit, leaves[i], g)
                    (hits,) = _arithmetic.totals(hit)
                count = _arithmetic.saturating_add(count, hits)
            return jax.tree.unflatten(structure, leaves), count

        def leave(updates: optax.Updates) -> tuple[optax.Updates, jax.Array]:
            return updates, jnp.zeros([], jnp.int32)

        updates, count = jax.lax.cond(is_hit_step(step), corrupt, leave, updates)
        return updates, InjectSpikesState(step, count)

    return optax.GradientTransformation(init_fn, update_fn)


def _step_test(
    steps: Iterable[int] | Callable[[jax.Array], jax.Array] | None,
) -> Callable[[jax.Array], jax.Array]:
    if steps is None:
        return lambda step: jnp.ones([], bool)
    if callable(steps):
        return steps
    is_scalar = getattr(steps, "ndim", None) == 0  # It has __iter__, which raises.
    if isinstance(steps, str) or is_scalar or not isinstance(steps, Iterable):
        raise TypeError(
            "inject_spikes: steps must be None, a sequence of whole numbers >= 1 or a "
            f"function of the step{_validate.instead_of_optax(steps)}, got {steps!r}."
        )
    if isinstance(steps, jax.Array) and not isinstance(steps, jax.core.Tracer):
        steps = np.asarray(steps)  # Its numbers are checked below.
    steps = tuple(steps)
    for step in steps:
        _validate.check_steps("steps", step, low=1)
    return lambda step: jnp.isin(step, jnp.asarray(steps, jnp.int32))


def _hit(key: jax.Array, g: jax.Array, rate: jax.typing.ArrayLike) -> jax.Array:
    """Marks the coordinates to corrupt, sharded as `g` on an explicit mesh."""
    # float32, because a float64 rate would draw other bits.
    return jax.random.bernoulli(
        key,
        jnp.asarray(rate, jnp.float32),
        g.shape,
        out_sharding=jax.typeof(g).sharding,
    )


def _fault(
    key: jax.Array, g: jax.Array, scale: jax.typing.ArrayLike, kind: str
) -> jax.Array:
    """Returns the corrupted gradient, in the dtype of `g`."""
    match kind:
        case "scale":
            fault = _arithmetic.widen(g) * scale
        case "noise":
            wide = _arithmetic.widen(g)
            rms = _arithmetic.root(jnp.mean(_arithmetic.abs_sq(g)))
            noise = jax.random.normal(
                key, g.shape, wide.dtype, out_sharding=jax.typeof(g).sharding
            )
            fault = wide + (scale * rms).astype(wide.dtype) * noise
        case "nan":
            fault = jnp.full_like(g, jnp.nan)
        case "inf":
            fault = jnp.where(g == 0, 1, _arithmetic.sign(g))
            if jnp.iscomplexobj(g):  # 0 times infinity would be NaN.
                parts = (_infinite(fault.real), _infinite(fault.imag))
                fault = jax.lax.complex(*parts)
            else:
                fault = _infinite(fault)
    return fault.astype(g.dtype)


def _infinite(x: jax.Array) -> jax.Array:
    """Returns infinity with the sign of `x`, and 0 where `x` is 0."""
    return jnp.where(x == 0, 0, jnp.sign(x) * jnp.inf)
