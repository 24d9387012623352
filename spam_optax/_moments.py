"""Shared by all optimizers with moments: state, updates, casts, weight decay.

A moment is an exponential moving average of a power of the gradient. It has a storage
dtype of its own.
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _validate, functional

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


def zero_at_reset(moments: optax.Updates, position: jax.Array) -> optax.Updates:
    """Returns the moments, or zeros in a reset step. Its `position` is 0."""
    return jax.tree.map(
        lambda x: jnp.where(position == 0, jnp.zeros_like(x), x), moments
    )


def move_all(
    moments: optax.Updates,
    gradients: optax.Updates,
    decay: jax.typing.ArrayLike,
    power: Callable[[jax.Array], jax.Array],
) -> optax.Updates:
    """Updates all moments with a power of their gradients."""
    return map_moments(
        lambda m, g: _arithmetic.ema(m, power(g), decay), moments, gradients
    )


def map_tensors(
    f: Callable[..., tuple[Any, ...]], updates: optax.Updates, *moments: optax.Updates
) -> tuple[Any, ...]:
    """Applies `f` to the gradient and the moments of each tensor.

    Under `jax.jit`, `f` is traced and lowered once per shape and not once per tensor.
    A model has hundreds of tensors but few shapes.

    Args:
      f: Function from a gradient, which may be None, and its moments to a tuple.
      updates: The gradients.
      *moments: Trees of one structure.

    Returns:
      One list per element of the tuple that `f` returns, in the order of the moments.
    """
    structure = jax.tree.structure(moments[0])
    columns = [structure.flatten_up_to(tree) for tree in (updates, *moments)]
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(columns)):
        f = jax.jit(f)
    results = [f(*tensor) for tensor in zip(*columns, strict=True)]
    return tuple(map(list, zip(*results, strict=True)))


def map_moments(
    f: Callable[..., jax.Array], moments: optax.Updates, gradients: Any, *rest: Any
) -> optax.Updates:
    """Maps `f` over moments and gradients.

    A moment whose gradient is None does not change.
    """
    leaves, structure = jax.tree.flatten(moments)
    trees = [structure.flatten_up_to(tree) for tree in (gradients, *rest)]
    return jax.tree.unflatten(
        structure,
        [
            moment if g is None else f(moment, g, *others)
            for moment, g, *others in zip(leaves, *trees, strict=True)
        ],
    )


def screen(
    updates: optax.Updates, nu: optax.Updates
) -> tuple[optax.Updates, optax.Updates]:
    """Sets non-finite coordinates to 0. Also returns their mask.

    A coordinate is non-finite if its square is, in the compute dtype of `nu`.
    """
    gradients = map_leaves(_arithmetic.narrow_like, updates, nu)
    bad = map_leaves(functional.nonfinite_mask, gradients)
    return map_leaves(functional.zero_nonfinite, gradients), bad


def hold(moved: optax.Updates, moments: optax.Updates, bad: Any) -> optax.Updates:
    """Keeps the old moments of tensors without a finite gradient coordinate.

    Returns the new moments of all others.
    """
    return map_moments(
        lambda old, bad, new: jnp.where(jnp.all(bad), old.astype(new.dtype), new),
        moments,
        bad,
        moved,
    )


def map_leaves(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `f` over the leaves. None, a missing gradient, stays None."""
    return jax.tree.map(
        lambda x, *xs: None if x is None else f(x, *xs),
        tree,
        *rest,
        is_leaf=lambda x: x is None,
    )


def total(counts: list[jax.Array]) -> jax.Array:
    """Adds counts. The sum stops at the largest int32."""
    return functools.reduce(
        _arithmetic.saturating_add, counts, jnp.zeros([], jnp.int32)
    )


def vector(scalars: Any, moments: optax.Updates) -> jax.Array:
    """Stacks one float32 scalar per moment. A missing gradient gives 0."""
    leaves = jax.tree.structure(moments).flatten_up_to(scalars)
    return _arithmetic.stack(
        [jnp.zeros([]) if x is None else x for x in leaves], "float32"
    )


def add_counts(
    counts: list[tuple[jax.Array, ...]], *totals: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """Adds up counts, and adds each sum to its total.

    Args:
      counts: One count for each total, of every tensor; empty for a tensor without a
        gradient.
      *totals: The totals so far. They are None if nothing is counted.

    Returns:
      The sum and the new total, for each total; None if nothing is counted.
    """
    if None in totals:
        return (None,) * (2 * len(totals))
    counters = []
    for i, before in enumerate(totals):
        number = total([of_tensor[i] for of_tensor in counts if of_tensor])
        counters += [number, _arithmetic.saturating_add(before, number)]  # type: ignore[arg-type]
    return tuple(counters)


def count(masks: Any, before: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Counts the true entries of a tree of masks.

    Returns the count, and its sum with the total `before`; None if that is None.
    """
    if before is None:
        return None, None
    return add_counts([_arithmetic.totals(x) for x in jax.tree.leaves(masks)], before)


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
    like = updates if params is None else params
    return map_leaves(
        lambda g, d, y: _arithmetic.cast(d, jnp.asarray(y).dtype),
        updates,
        direction,
        like,
    )


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
    return optax.add_decayed_weights(weight_decay, mask)


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
