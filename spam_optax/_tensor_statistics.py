"""Shared by the transformations with statistics of whole tensors, such as norms.

A statistic is a vector with one number per tensor, in the order of ``jax.tree.leaves``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spam_optax import _arithmetic, _moments, _schedule, _validate

Gradient = jax.Array | None

# A quotient of a smaller norm could overflow, so a smaller norm counts as 0. Only
# float64 gradients have one: the square of a float32 number is 0 or at least 2**-149.
_SMALLEST_NORM = 2.0**-100


def check_params(params: optax.Params) -> None:
    """Raises unless every parameter has a floating or complex dtype."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        _validate.check_inexact(path, p)


def check_updates(updates: optax.Updates) -> None:
    """Raises unless every update has a floating or complex dtype."""
    for path, g in jax.tree_util.tree_leaves_with_path(updates):
        _validate.check_inexact(path, g, "update")


def init(params: optax.Params, n: int) -> tuple[jax.Array, ...]:
    """Returns zeros: a vector of step counts and `n` vectors of running means."""
    check_params(params)
    tensors = len(jax.tree.leaves(params))
    zeros = (jnp.zeros([tensors], jnp.float32) for _ in range(n))
    return jnp.zeros([tensors], jnp.int32), *zeros


def flatten(
    updates: optax.Updates, statistic: jax.Array
) -> tuple[list[jax.Array], Any]:
    """Flattens the updates. Raises if their number differs from `statistic`'s."""
    _validate.check_tensors(updates, statistic.shape[0])
    check_updates(updates)
    return jax.tree.flatten(updates)


def is_nonfinite(g: jax.Array) -> jax.Array:
    """Marks coordinates whose square is not finite in float32, as norms are."""
    return _arithmetic.is_nonfinite(
        _arithmetic.narrow_like(g, jnp.zeros([], jnp.float32))
    )


def zero_nonfinite(g: jax.Array) -> jax.Array:
    """Sets non-finite coordinates to 0."""
    g = jnp.asarray(g)
    return jnp.where(is_nonfinite(g), jnp.zeros_like(g), g)


def drop_nonfinite(
    updates: optax.Updates, total: jax.Array | None
) -> tuple[optax.Updates, tuple[jax.Array | None, ...]]:
    """Sets non-finite coordinates to 0, and counts them.

    Returns the gradients, and a tuple of the count and the new total.
    """
    check_updates(updates)
    leaves, structure = jax.tree.flatten(updates)

    def screen(g: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        counts = () if total is None else _arithmetic.totals(is_nonfinite(g))
        return zero_nonfinite(g), counts

    gradients, counts = _moments.map_lists(screen, leaves, n=2)
    return structure.unflatten(gradients), _moments.add_counts(counts, total)


def measure(
    statistics: Callable[..., tuple[jax.Array, ...]],
    gradients: Sequence[Gradient],
    *rest: Sequence[Any],
    missing: tuple[float, ...],
) -> tuple[jax.Array, ...]:
    """Applies `statistics` to each tensor. Returns a vector for each of its results.

    The results of a missing gradient are `missing`. An int in `missing` gives an int32
    vector, and a float gives a vector of the widest dtype of the tensors.
    """

    def of_tensor(g: Gradient, *rest: Any) -> tuple[Any, ...]:
        return missing if g is None else statistics(g, *rest)

    columns = _moments.map_lists(of_tensor, gradients, *rest, n=len(missing))

    def stack(column: list[Any], missing: float) -> jax.Array:
        if isinstance(missing, int):
            return _arithmetic.stack(column, jnp.int32)
        dtype = jnp.dtype(jnp.float32)
        for x in column:
            dtype = _arithmetic.promote_types(dtype, getattr(x, "dtype", dtype))
        return _arithmetic.stack(column, dtype)

    return tuple(map(stack, columns, missing))


def roots(squares: jax.Array, gradients: Sequence[Gradient]) -> jax.Array:
    """Returns the norm of each tensor from its ``_arithmetic.sum_of_squares``.

    It takes the roots of a vector, because XLA compiles the root of each scalar as a
    kernel of its own.
    """
    units = [1 if g is None else _arithmetic.unit(jnp.size(g)) for g in gradients]
    norms = _arithmetic.root(squares) / np.asarray(units, squares.dtype)
    return norms.astype(jnp.float32)


def norms(gradients: optax.Updates) -> jax.Array:
    """Returns one float32 norm per tensor. The squares of coordinates are finite."""
    tensors = jax.tree.leaves(gradients)
    (squares,) = measure(
        lambda g: (_arithmetic.sum_of_squares(g),), tensors, missing=(0.0,)
    )
    return roots(squares, tensors)


def finite_norms(
    gradients: Sequence[Gradient],
    is_nonfinite: Callable[[jax.Array], jax.Array] = is_nonfinite,
) -> tuple[jax.Array, jax.Array]:
    """Returns the norms of the finite coordinates, and how many are not finite."""

    def of_tensor(g: jax.Array) -> tuple[jax.Array, ...]:
        bad = is_nonfinite(g)
        kept = jnp.where(bad, jnp.zeros_like(g), g)
        return *_arithmetic.totals(bad), _arithmetic.sum_of_squares(kept)

    nonfinite, squares = measure(of_tensor, gradients, missing=(1, 0.0))
    return roots(squares, gradients), nonfinite


def global_norm(updates: optax.Updates) -> jax.Array:
    """Returns the norm of all updates as float32.

    It is not finite if its square is not.
    """
    squares = [jnp.sum(_arithmetic.abs_sq(u)) for u in jax.tree.leaves(updates)]
    total = sum(squares, jnp.zeros([]))
    return _arithmetic.root(total).astype(jnp.float32)


def add_nonfinite(
    gradients: Sequence[Gradient], nonfinite: jax.Array, total: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """Adds up the counts of all gradients. Returns the count and the new total."""
    if total is None:
        return None, None
    counts = [
        () if g is None else (n,)
        for g, n in zip(gradients, list(nonfinite), strict=True)
    ]
    return _moments.add_counts(counts, total)


def split(*vectors: jax.Array) -> tuple[list[jax.Array], ...]:
    """Returns the numbers of each float32 vector as a list of scalars.

    XLA fuses a slice with the computation that uses its number. That computation would
    be another program for each tensor, because slices are at different places. The
    barrier hides the places from the compiler, which then compiles one program for all
    tensors of a shape. The vectors are behind it too, or XLA:CPU would compute the last
    operations on them again in each program.
    """
    tensors = vectors[0].shape[0]
    if not isinstance(vectors[0], jax.core.Tracer):
        return tuple(list(vector) for vector in vectors)
    places, vectors = jax.lax.optimization_barrier(
        (list(map(np.uint32, range(tensors))), vectors)
    )
    pick = jax.jit(
        lambda i, *vectors: tuple(
            jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in vectors
        )
    )
    rows = [pick(i, *vectors) for i in places]
    return tuple(map(list, zip(*rows, strict=True))) or ([],) * len(vectors)


def average(
    mean: jax.Array, value: jax.Array, decay: jax.typing.ArrayLike, usable: jax.Array
) -> jax.Array:
    """Updates the running mean where `usable`, and keeps it elsewhere."""
    return jnp.where(usable, _arithmetic.ema(mean, value, decay), mean)


def corrected(
    mean: jax.Array, decay: jax.typing.ArrayLike, steps: jax.Array
) -> jax.Array:
    """Returns the bias-corrected running mean, which is 0 before the first step."""
    correction = _schedule.bias_correction(decay, jnp.maximum(steps, 1))
    return (mean / correction).astype(jnp.float32)


def is_usable(norm: jax.Array, nonfinite: jax.Array) -> jax.Array:
    """Returns whether the statistics of the norm of each tensor are updated.

    They are not updated if the gradient has non-finite coordinates and is 0 without
    them, or if the square of the norm overflows.
    """
    return ((nonfinite == 0) | (norm > 0)) & jnp.isfinite(norm**2)


def clip_factor(norm: jax.Array, limit: jax.typing.ArrayLike) -> jax.Array:
    """Returns the factor that scales `norm` down to `limit`.

    It is 1 if the norm is not above the limit.
    """
    is_above = norm > limit
    return jnp.where(is_above, limit / jnp.where(is_above, norm, 1), 1).astype(
        jnp.float32
    )


def rescale_factor(
    norm: jax.Array, wanted: jax.Array, has_history: jax.Array
) -> jax.Array:
    """Returns the factor from a norm to `wanted`.

    It is 1 for tensors without history, and for norms that count as 0.
    """
    has_factor = has_history & (norm > _SMALLEST_NORM)
    return jnp.where(has_factor, wanted / jnp.where(has_factor, norm, 1), 1)


def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies a tensor by its factor and keeps its dtype."""
    return (_arithmetic.widen(x) * factor).astype(jnp.asarray(x).dtype)


def scale_all(tensors: Sequence[jax.Array], factors: jax.Array) -> list[jax.Array]:
    """Multiplies each tensor by its factor and keeps its dtype."""
    (scaled,) = _moments.map_lists(
        lambda x, factor: (scale(x, factor),), tensors, *split(factors), n=1
    )
    return scaled


def or_one(x: jax.Array) -> jax.Array:
    """Returns a safe divisor: `x`, or 1 where `x` is 0."""
    return jnp.where(x > 0, x, 1)
