"""Shared by all optimizers with moments: state, updates, casts, weight decay.

A moment is an exponential moving average of a power of the gradient. It has a storage
dtype of its own.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _schedule, _validate

Mask: TypeAlias = optax.Params | Callable[[optax.Params], Any]


def check_optimizer(learning_rate: Any, weight_decay: Any) -> tuple[Any, Any]:
    """Checks and returns the learning rate and the weight decay."""
    learning_rate = _validate.check_learning_rate(learning_rate)
    weight_decay = _validate.check_number("weight_decay", weight_decay, at_least=0)
    return learning_rate, weight_decay


def init_mu(params: optax.Params, dtype: Any) -> optax.Updates:
    """Returns zero first moments in `dtype`, or in the compute dtype.

    Those of complex parameters are complex and have the compute dtype.
    """

    def zeros(path: tuple[Any, ...], p: jax.Array) -> jax.Array:
        wide = _validate.check_inexact(path, p)
        narrow = dtype is not None and not jnp.iscomplexobj(p)
        return jnp.zeros_like(p, dtype=dtype if narrow else wide)

    return jax.tree_util.tree_map_with_path(zeros, params)


def init_nu(params: optax.Params, dtype: Any) -> optax.Updates:
    """Returns zero second moments, which are always real."""

    def zeros(path: tuple[Any, ...], p: jax.Array) -> jax.Array:
        wide = _validate.check_inexact(path, p)
        return jnp.zeros_like(p, dtype=dtype or jnp.finfo(wide).dtype)

    return jax.tree_util.tree_map_with_path(zeros, params)


def init_counters(is_counted: bool, n: int) -> tuple[jax.Array | None, ...]:
    """Returns `n` counters, or `n` times None."""
    return tuple(jnp.zeros([], jnp.int32) if is_counted else None for _ in range(n))


def zero_at_reset(moments: optax.Updates, is_reset: jax.Array) -> optax.Updates:
    """Returns the moments, or zeros in a reset step."""
    return jax.tree.map(lambda x: jnp.where(is_reset, jnp.zeros_like(x), x), moments)


class AdamRates(NamedTuple):
    """The numbers in Adam's step that are the same for every tensor.

    Attributes:
      b1: Decay of the first moment.
      scale: Factor on the step: the bias corrections times a ramp or a clip factor.
      eps: Term added to the root of the second moment, before its bias correction.
    """

    b1: jax.typing.ArrayLike
    scale: jax.Array
    eps: jax.typing.ArrayLike


def adam_rates(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    step: jax.Array,
) -> AdamRates:
    """Returns the rates of Adam with `eps` added after the bias correction.

    ``m / c1 / (sqrt(v / c2) + eps)`` is computed as
    ``(sqrt(c2) / c1) * m / (sqrt(v) + eps * sqrt(c2))``.
    """
    root = jnp.sqrt(_schedule.bias_correction(b2, step))
    scale = root / _schedule.bias_correction(b1, step)
    return AdamRates(b1, scale, jnp.maximum(eps * root, jnp.finfo(root.dtype).tiny))


def adam_step(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    new_nu: jax.Array,
    rates: AdamRates,
    *,
    is_held: jax.typing.ArrayLike = False,
    spread: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes Adam's step of one tensor, whose second moment is already updated.

    Args:
      g: The gradient.
      mu: The first moment before the step.
      nu: The second moment before the step.
      new_nu: The second moment after the step, in the compute dtype.
      rates: The numbers that are the same for every tensor.
      is_held: Whether the moments are kept and the direction is 0.
      spread: Repeats a second moment over the coordinates for which it stands.

    Returns:
      The direction in the compute dtype, and the moments in their stored dtypes.
    """
    new_mu = _arithmetic.ema(mu, _arithmetic.widen(g), rates.b1)
    scale = rates.scale
    if is_held is not False:
        new_mu, new_nu = (
            jnp.where(is_held, old.astype(new.dtype), new)
            for old, new in ((mu, new_mu), (nu, new_nu))
        )
        scale = jnp.where(is_held, 0, scale)
    divisor = spread(_arithmetic.root(new_nu) + rates.eps)
    return (
        (scale * new_mu / divisor).astype(new_mu.dtype),
        _arithmetic.cast(new_mu, mu.dtype),
        _arithmetic.cast(new_nu, nu.dtype),
    )


def map_tensors(
    f: Callable[..., tuple[Any, ...]],
    updates: optax.Updates,
    *moments: optax.Updates,
    n: int,
) -> tuple[list[Any], ...]:
    """Applies `f` to the gradient and the moments of each tensor.

    Args:
      f: Function from a gradient, which may be None, and its moments to a tuple.
      updates: The gradients.
      *moments: Trees of one structure.
      n: Length of the tuple that `f` returns.

    Returns:
      One list per element of that tuple, in the order of the moments.
    """
    structure = jax.tree.structure(moments[0])
    return map_lists(
        f, *(structure.flatten_up_to(tree) for tree in (updates, *moments)), n=n
    )


def map_lists(
    f: Callable[..., tuple[Any, ...]], *columns: Sequence[Any], n: int
) -> tuple[list[Any], ...]:
    """Applies `f` to the entries of lists that have one entry per tensor.

    Under `jax.jit`, `f` is traced and lowered once per shape and not once per tensor.
    A model has hundreds of tensors but few shapes.

    Returns:
      One list per element of the tuple of length `n` that `f` returns.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(columns)):
        f = jax.jit(f)
    results = [f(*tensor) for tensor in zip(*columns, strict=True)]
    return tuple(map(list, zip(*results, strict=True))) or tuple([] for _ in range(n))


def map_leaves(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `f` over the leaves. None, a missing gradient, stays None."""
    return jax.tree.map(
        lambda x, *xs: None if x is None else f(x, *xs),
        tree,
        *rest,
        is_leaf=lambda x: x is None,
    )


def total(counts: Sequence[jax.Array]) -> jax.Array:
    """Adds counts. The sum stops at the largest int32."""
    return functools.reduce(
        _arithmetic.saturating_add, counts, jnp.zeros([], jnp.int32)
    )


def add_counts(
    counts: Sequence[tuple[jax.Array, ...]], *totals: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """Adds up counts, and adds each sum to its total.

    Args:
      counts: One tuple per tensor with one count per total. The tuple is empty for a
        tensor without a gradient.
      *totals: The totals so far. They are None if nothing is counted.

    Returns:
      The sum and the new total, for each total. They are None if nothing is counted.
    """
    if None in totals:
        return (None,) * (2 * len(totals))
    counters = []
    for i, before in enumerate(totals):
        number = total([of_tensor[i] for of_tensor in counts if of_tensor])
        counters += [number, _arithmetic.saturating_add(before, number)]  # type: ignore[arg-type]
    return tuple(counters)


def fields(state: optax.OptState, name: str) -> list[Any]:
    """Returns the fields called `name` of the states in `state`.

    A dictionary in a named tuple is no state, because a layer may be called `mu`. In
    MaxText, dictionaries replace all named tuples of a state.
    """

    def is_field(path: tuple[Any, ...]) -> bool:
        names = [getattr(key, "name", None) for key in path]
        if any(names):
            return names[-1] == name
        above = {getattr(key, "key", None) for key in path[:-1]}
        return bool(path) and not above & {"mu", "nu"}

    found = optax.tree.get_all_with_path(state, name)
    return [value for path, value in found if is_field(path)]


def cast_like(tree: Any, like: Any) -> Any:
    """Casts every leaf to the dtype of its counterpart in `like`."""
    return map_leaves(
        lambda x, y: _arithmetic.cast(x, jnp.asarray(y).dtype), tree, like
    )


def cast_updates(
    direction: optax.Updates, updates: optax.Updates, params: optax.Params | None
) -> optax.Updates:
    """Casts updates to the dtype of the parameters, or of the gradients without them.

    Missing gradients stay None.
    """
    _validate.check_params(params, updates)
    return cast_like(direction, updates if params is None else params)


def cast_to_params(
    updates: optax.Updates, params: optax.Params | None
) -> optax.Updates:
    """Casts updates to the dtype of the parameters.

    An injected learning rate or weight decay may have widened them.
    """
    return updates if params is None else cast_like(updates, params)


def decay_weights(
    weight_decay: jax.typing.ArrayLike, mask: Mask | None
) -> optax.GradientTransformation | None:
    """Returns decoupled weight decay, or None if it is 0."""
    if isinstance(weight_decay, numbers.Real) and weight_decay == 0:
        return None
    if mask is None:
        return optax.add_decayed_weights(weight_decay)
    argument = f"{_validate.caller()}: mask"
    chosen = functools.partial(_validate.booleans, argument, mask)
    return optax.add_decayed_weights(weight_decay, chosen)


def optimizer(
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """Chains `scale` with decoupled weight decay and a learning rate."""
    learning_rate, weight_decay = check_optimizer(learning_rate, weight_decay)
    return optax.chain(
        scale,
        decay_weights(weight_decay, mask) or optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(cast_to_params),
    )
