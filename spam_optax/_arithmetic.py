"""Arithmetic that every module shares: its dtype, complex numbers, counts.

Arithmetic is done in float32, for float64 leaves in float64; what is stored and what
comes out may be narrower.
"""

import jax
import jax.numpy as jnp
import numpy as np

_INT32_MAX = np.iinfo(np.int32).max
_LARGEST_COUNT = 2.0**31 - 128  # The largest float32 that is an int32.


def compute_dtype(x: jax.typing.ArrayLike) -> np.dtype:
    """The real dtype of arithmetic on `x`: float64 for 64-bit parts, else float32."""
    return promote_types(jnp.finfo(jnp.result_type(x)).dtype, jnp.float32)


def promote_types(one: jax.typing.DTypeLike, other: jax.typing.DTypeLike) -> np.dtype:
    """The dtype that both fit into, even where JAX's strict promotion raises."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """`x` in the dtype that arithmetic is done in, complex if it was."""
    x = jnp.asarray(x)
    return x.astype(promote_types(x.dtype, compute_dtype(x)))


def ema(mean: jax.Array, value: jax.Array, decay: jax.typing.ArrayLike) -> jax.Array:
    """Returns an exponential moving average after `value`, in the wide dtype."""
    mean = widen(mean)
    dtype = promote_types(mean.dtype, value.dtype)
    # Cast: an injected float64 decay must not widen a float32 moment.
    return (decay * mean + (1 - decay) * value).astype(dtype)


def abs_sq(x: jax.Array) -> jax.Array:
    """``|x|**2`` in the real compute dtype, without the square root of `abs`."""
    x = widen(x)
    if jnp.iscomplexobj(x):
        return x.real**2 + x.imag**2
    return x * x


def is_nonfinite(x: jax.Array) -> jax.Array:
    """Returns which coordinates have no finite square."""
    return ~jnp.isfinite(abs_sq(x))


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm of finite numbers, though their squares or the sum overflow."""
    # The sum is then finite of 2**60 numbers, each the largest there is.
    unit = 2.0 ** (-3 * jnp.finfo(compute_dtype(x)).maxexp // 4)
    total, scaled = jnp.sum(abs_sq(x)), jnp.sum(abs_sq(widen(x) * unit))
    return jnp.where(jnp.isfinite(total), root(total), root(scaled) / unit)


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """Square root of a number >= 0, its derivative 0 where it would be infinite.

    An infinite derivative turns every gradient taken through it into NaN, even in the
    branch of a `where` that is not chosen. The root itself is the plain one: a guard of
    its argument would make compilers round what is around it differently.
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
    """A vector of one number per tensor; empty if there is no tensor."""
    return jnp.stack(scalars).astype(dtype) if scalars else jnp.zeros([0], dtype)


def narrow_like(x: jax.Array, nu: jax.Array) -> jax.Array:
    """`x` no wider than arithmetic with `nu`: what does not fit becomes infinite."""
    x, real = jnp.asarray(x), compute_dtype(nu)
    if jnp.finfo(x.dtype).max <= jnp.finfo(real).max:
        return x
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else real)


def direction(x: jax.Array) -> jax.Array:
    """``x / |x|``, 0 for 0, in the compute dtype; infinite parts outweigh the rest."""
    x = widen(x)
    if not jnp.iscomplexobj(x):
        return jnp.sign(x)
    parts = jnp.stack([x.real, x.imag])
    infinite = jnp.isinf(parts)
    has_infinite = infinite.any(axis=0, keepdims=True)
    parts = jnp.where(has_infinite, jnp.where(infinite, jnp.sign(parts), 0), parts)
    # Scaled before the norm is taken: squares of 1e20 would overflow. Twice, since the
    # reciprocal of 1e38, which XLA multiplies by, would be a denormal and flushed to 0.
    parts = jnp.where(jnp.abs(parts).max(axis=0, keepdims=True) > 1, parts / 16, parts)
    largest = jnp.abs(parts).max(axis=0, keepdims=True)
    parts = parts / jnp.where(largest > 0, largest, 1)
    norm = root((parts**2).sum(axis=0, keepdims=True))
    parts = parts / jnp.where(norm > 0, norm, 1)
    return jax.lax.complex(parts[0], parts[1])


def largest_like(x: jax.Array) -> float:
    """The largest number of the dtype of `x` whose square does not overflow.

    A little less for complex numbers, whose squared size is a sum of rounded squares.
    """
    narrow, wide = jnp.finfo(x.dtype), jnp.finfo(compute_dtype(x))
    steps_below = 8 if jnp.iscomplexobj(x) else 1
    root = 2.0 ** (wide.maxexp // 2) * (1 - steps_below * float(narrow.eps) / 2)
    return min(root, float(narrow.max))


def cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x` in another dtype; what is too large for it becomes its largest number."""
    if jnp.finfo(dtype).max >= jnp.finfo(x.dtype).max:
        return x.astype(dtype)
    if jnp.iscomplexobj(x):
        real = jnp.finfo(dtype).dtype
        return jax.lax.complex(cast(x.real, real), cast(x.imag, real))
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def totals(*masks: jax.Array) -> tuple[jax.Array, ...]:
    """Sum of each array of booleans or small whole numbers, all of one shape, int32.

    Exact up to 2**24, above that at least 2**24. Summed in float32, one by one: on TPU
    that is fused with what made the masks, where an integer sum reads it again; and on
    a mesh the only collective is that of a scalar, where row sums would need one of a
    vector. XLA:CPU runs such a sum in a scalar loop, but not one of several integers at
    once, which is four times as fast; on a mesh it would gather a number a device.
    """

    def one_by_one(*masks):
        totals = (mask.astype(jnp.float32).sum() for mask in masks)
        return tuple(jnp.minimum(x, _LARGEST_COUNT).astype(jnp.int32) for x in totals)

    def at_once(*masks):
        zeros = (jnp.zeros([], jnp.int32),) * len(masks)
        add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True))  # noqa: E731
        numbers = tuple(mask.astype(jnp.int32) for mask in masks)
        return tuple(jax.lax.reduce(numbers, zeros, add, tuple(range(masks[0].ndim))))

    if jax.device_count() > 1:
        return one_by_one(*masks)
    return jax.lax.platform_dependent(*masks, cpu=at_once, default=one_by_one)


def read_first(x: jax.Array, count: jax.Array) -> jax.Array:
    """`x`, for use after `count`, a number >= 0 that was counted with it.

    XLA:CPU overwrites a donated array in place only if it can tell that all who read
    its old value come first; without this it copies. Elsewhere it does nothing.
    """
    return jax.lax.platform_dependent(
        x,
        count,
        cpu=lambda x, count: jnp.where(count >= 0, x, 0),
        default=lambda x, count: x,
    )


def saturating_add(total: jax.Array, count: jax.Array) -> jax.Array:
    """Sum of two non-negative int32 that stops at the largest int32."""
    return total + jnp.minimum(count, _INT32_MAX - total)
