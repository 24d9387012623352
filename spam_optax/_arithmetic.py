"""Shared arithmetic: the compute dtype, complex numbers, norms, counts.

Arithmetic is done in float32, or in float64 for 64-bit arrays: the compute dtype.
Stored moments and updates may have a narrower dtype.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INT32_MAX = np.iinfo(np.int32).max
_LARGEST_COUNT = 2.0**31 - 128  # The largest float32 that is an int32.


def compute_dtype(x: jax.typing.ArrayLike) -> np.dtype[Any]:
    """Returns the real compute dtype of `x`: float64 for 64-bit parts, else float32."""
    return promote_types(jnp.finfo(jnp.result_type(x)).dtype, jnp.float32)


def promote_types(
    one: jax.typing.DTypeLike, other: jax.typing.DTypeLike
) -> np.dtype[Any]:
    """Returns the common dtype of both, also under JAX's strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """Casts `x` to the compute dtype. Complex arrays stay complex."""
    x = jnp.asarray(x)
    return x.astype(promote_types(x.dtype, compute_dtype(x)))


def ema(mean: jax.Array, value: jax.Array, decay: jax.typing.ArrayLike) -> jax.Array:
    """Updates an exponential moving average with `value`.

    The result has the compute dtype.
    """
    mean = widen(mean)
    dtype = promote_types(mean.dtype, value.dtype)
    # The cast keeps float32 moments float32 if an injected decay is float64.
    return (decay * mean + (1 - decay) * value).astype(dtype)  # type: ignore[return-value]


def abs_sq(x: jax.Array) -> jax.Array:
    """Returns ``|x|**2`` in the real compute dtype, without the root of `abs`."""
    x = widen(x)
    if jnp.iscomplexobj(x):
        return x.real**2 + x.imag**2
    return x * x


def is_nonfinite(x: jax.Array) -> jax.Array:
    """Marks coordinates whose square is not finite."""
    return ~jnp.isfinite(abs_sq(x))


def sum_of_squares(x: jax.Array) -> jax.Array:
    """Returns the sum of ``|u x|**2`` with the :func:`unit` :math:`u` of its size."""
    return jnp.sum(abs_sq(widen(x) * unit(jnp.size(x))))


def norm(x: jax.Array) -> jax.Array:
    """Returns the Euclidean norm of finite numbers, also if their squares overflow."""
    # With this unit the sum of 2**60 squares of the largest number is finite.
    unit = 2.0 ** (-3 * jnp.finfo(compute_dtype(x)).maxexp // 4)
    total, scaled = jnp.sum(abs_sq(x)), jnp.sum(abs_sq(widen(x) * unit))
    return jnp.where(jnp.isfinite(total), root(total), root(scaled) / unit)


def unit(size: int) -> float:
    """Returns the unit in which the squares of `size` numbers have a finite sum.

    The squares of the numbers are finite. Units are powers of 2, so they round nothing.
    """
    return 2.0 ** -math.ceil(math.log2(max(size, 1)) / 2)


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """Returns the square root of a number >= 0. Its derivative at 0 is 0.

    An infinite derivative makes every gradient through it NaN, even through a branch
    of `where` that is not selected. The value is the plain root, because a guard on the
    argument would change how compilers round the surrounding operations.
    """
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y = root(x)
    has_derivative = (y > 0) & jnp.isfinite(y)
    slope = jnp.where(has_derivative, 0.5 / jnp.where(has_derivative, y, 1), 0)
    return y, slope * tangent


def stack(scalars: list[jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Stacks one scalar per tensor. The vector is empty if there are no tensors."""
    scalars = [jnp.asarray(x, dtype) for x in scalars]
    return jnp.stack(scalars) if scalars else jnp.zeros([0], dtype)


def narrow_like(x: jax.Array, nu: jax.Array) -> jax.Array:
    """Casts `x` to the compute dtype of `nu` if `x` is wider.

    Values that do not fit become infinite.
    """
    x, real = jnp.asarray(x), compute_dtype(nu)
    if jnp.finfo(x.dtype).max <= jnp.finfo(real).max:
        return x
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else real)


def sign(x: jax.Array) -> jax.Array:
    """Returns ``x / |x|`` in the compute dtype, and 0 for 0.

    In a complex number with an infinite part, finite parts count as 0.
    """
    x = widen(x)
    if not jnp.iscomplexobj(x):
        return jnp.sign(x)
    parts = jnp.stack([x.real, x.imag])
    infinite = jnp.isinf(parts)
    has_infinite = infinite.any(axis=0, keepdims=True)
    parts = jnp.where(has_infinite, jnp.where(infinite, jnp.sign(parts), 0), parts)
    # The parts are scaled before the norm, because the square of 1e20 overflows. They
    # are scaled twice, because XLA multiplies by the reciprocal, and the reciprocal of
    # 1e38 is subnormal and flushed to 0.
    parts = jnp.where(jnp.abs(parts).max(axis=0, keepdims=True) > 1, parts / 16, parts)
    largest = jnp.abs(parts).max(axis=0, keepdims=True)
    parts = parts / jnp.where(largest > 0, largest, 1)
    norm = root((parts**2).sum(axis=0, keepdims=True))
    parts = parts / jnp.where(norm > 0, norm, 1)
    return jax.lax.complex(parts[0], parts[1])


def largest_like(x: jax.Array) -> float:
    """Returns the largest number of the dtype of `x` whose square does not overflow.

    For complex numbers it is a little smaller, because ``|x|**2`` is a sum of two
    rounded squares.
    """
    narrow, wide = jnp.finfo(x.dtype), jnp.finfo(compute_dtype(x))
    steps_below = 8 if jnp.iscomplexobj(x) else 1
    root = 2.0 ** (wide.maxexp // 2) * (1 - steps_below * float(narrow.eps) / 2)
    return min(root, float(narrow.max))


def cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Casts `x`. Values too large for the new dtype become its largest number."""
    if jnp.finfo(dtype).max >= jnp.finfo(x.dtype).max:
        return x.astype(dtype)
    if jnp.iscomplexobj(x):
        real = jnp.finfo(dtype).dtype
        return jax.lax.complex(cast(x.real, real), cast(x.imag, real))
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def totals(*masks: jax.Array) -> tuple[jax.Array, ...]:
    """Sums each of several masks of the same shape, as int32.

    Masks are booleans or small whole numbers. Counts are exact up to 2**24; larger
    counts are at least 2**24. The sums are taken in float32, one by one. On TPU they
    are then fused with the computation of the masks, which an int32 sum would read
    again. On a mesh they need only a scalar all-reduce, and row sums would need one of
    a vector. XLA:CPU stores the operand of a sum before it adds, but not the operands
    of a reduction of several arrays. There all masks are summed as int32 in one
    reduction, which is 4 to 20 times as fast. A single mask is summed twice. On a mesh
    of CPU devices that reduction would need an all-gather, so float32 is used.
    """

    def one_by_one(*masks: jax.Array) -> tuple[jax.Array, ...]:
        totals = (mask.astype(jnp.float32).sum() for mask in masks)
        return tuple(jnp.minimum(x, _LARGEST_COUNT).astype(jnp.int32) for x in totals)

    def at_once(*masks: jax.Array) -> tuple[jax.Array, ...]:
        numbers = [mask.astype(jnp.int32) for mask in masks]
        return _reduce_at_once(numbers, [jnp.add] * len(masks))

    if jax.device_count() > 1:
        return one_by_one(*masks)
    return jax.lax.platform_dependent(*masks, cpu=at_once, default=one_by_one)


def _reduce_at_once(
    arrays: Sequence[jax.Array], operations: Sequence[Callable[..., jax.Array]]
) -> tuple[jax.Array, ...]:
    """Reduces arrays of one shape, of integers >= 0, in one loop.

    XLA:CPU stores the operand of a reduction, 4 bytes per coordinate, unless it reduces
    several at once. A single array is therefore reduced twice.
    """
    if len(arrays) == 1:
        twice = _reduce_at_once([*arrays] * 2, [*operations, jnp.maximum])
        # XLA would otherwise remove the second result.
        return jax.lax.optimization_barrier(twice)[:1]

    def combine(
        xs: Sequence[jax.Array], ys: Sequence[jax.Array]
    ) -> tuple[jax.Array, ...]:
        return tuple(f(x, y) for f, x, y in zip(operations, xs, ys, strict=True))

    zeros = tuple(jnp.zeros([], x.dtype) for x in arrays)
    axes = tuple(range(arrays[0].ndim))
    return tuple(jax.lax.reduce(tuple(arrays), zeros, combine, axes))


def read_first(x: jax.Array, count: jax.Array) -> jax.Array:
    """Returns `x`, but makes XLA:CPU compute `count` (>= 0) before `x` is used.

    XLA:CPU overwrites a donated array in place only if all reads of the old value come
    first; otherwise it copies. On other platforms this function only returns `x`.
    """
    return jax.lax.platform_dependent(
        x,
        count,
        cpu=lambda x, count: jnp.where(count >= 0, x, 0),
        default=lambda x, count: x,
    )


def saturating_add(total: jax.Array, count: jax.Array) -> jax.Array:
    """Adds two non-negative int32. The sum stops at the largest int32."""
    return total + jnp.minimum(count, _INT32_MAX - total)
