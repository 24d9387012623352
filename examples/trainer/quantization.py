"""Simulated quantization: linear layers compute with values of 4 or 8 bits.

The weights and activations of a linear layer are quantized and then dequantized. They
are rounded in groups of consecutive entries along the axis that the product sums over.
Products, parameters, gradients and moments keep their dtypes. So a run shows how few
bits affect training, but it saves no time and no memory.

For one group x, ``round`` returns the nearest value of the format, or of two equally
near ones the even one:

    symmetric    s = max |x| / L,  y = s * round(x / s)
    asymmetric   low = min(x, 0),  s = (max(x, 0) - low) / 15,  z = round(-8 - low / s)
                 y = s * (clip(round(x / s + z), -8, 7) - z)

    format     values of either sign                 L     weights      kept exactly
    int8       whole numbers                         127   symmetric    0
    int4       whole numbers                         7     asymmetric   2
    fp4        0, 1/2, 1, 3/2, 2, 3, 4, 6 (E2M1)     6     symmetric    2
    fp4_e1m2   0, 1/4, 1/2, ..., 7/4 (E1M2)          7/4   symmetric    2

Activations are symmetric. The last column counts the largest activations of each group,
which are not rounded. The scale s is then that of the others. The gradient passes
straight through: with respect to x it is the gradient with respect to y. E1M2 has the
values of int4 at another scale, so these two differ in the weights alone.

The rules are those of the 4-bit runs of Stable-SPAM (arXiv 2502.17055), which have
groups of 256. They keep large activations in INT4; here FP4 keeps them too. That z is
whole and that kept activations do not count for s are choices made here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def round_e2m1(x: jax.Array) -> jax.Array:
    """Rounds to floats with two bits of exponent and one bit of mantissa."""
    size = jnp.abs(x)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    return step * jnp.round(x / step)


def round_e1m2(x: jax.Array) -> jax.Array:
    """Rounds to floats with one bit of exponent and two bits of mantissa."""
    return jnp.round(4 * x) / 4


@dataclasses.dataclass(frozen=True)
class Format:
    """The values that a group is rounded to, and what is not rounded."""

    limit: float  # the largest value, L
    round: Callable[[jax.Array], jax.Array]  # for values from -L to L
    symmetric_weights: bool = True
    kept: int = 2  # activations per group


FORMATS = {
    "int8": Format(127.0, jnp.round, kept=0),
    "int4": Format(7.0, jnp.round, symmetric_weights=False),
    "fp4": Format(6.0, round_e2m1),
    "fp4_e1m2": Format(1.75, round_e1m2),
}


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """A `lax.dot_general` that quantizes its operands: activations and a matrix.

    Instances with equal fields are equal, so that models compile once.
    """

    format: str  # of FORMATS
    group: int  # entries
    product: Callable[..., jax.Array] = jax.lax.dot_general

    def __call__(
        self, x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **kwargs: Any
    ) -> jax.Array:
        ((axis,), (kernel_axis,)), _ = dimension_numbers
        x = quantize_activations(self.format, self.group, x, axis)
        kernel = quantize_weights(self.format, self.group, kernel, kernel_axis)
        return self.product(x, kernel, dimension_numbers, **kwargs)


def quantize_weights(name: str, group: int, x: jax.Array, axis: int) -> jax.Array:
    """Returns weights rounded to the format `name`, of the same shape and dtype."""
    chosen = FORMATS[name]
    if not chosen.symmetric_weights:
        return straight_through(asymmetric_int4, group, axis, x)
    symmetric = functools.partial(round_symmetric, chosen, kept=0)
    return straight_through(symmetric, group, axis, x)


def quantize_activations(name: str, group: int, x: jax.Array, axis: int) -> jax.Array:
    """Returns activations rounded to the format `name`, of the same shape and dtype."""
    chosen = FORMATS[name]
    symmetric = functools.partial(round_symmetric, chosen, kept=chosen.kept)
    return straight_through(symmetric, group, axis, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def straight_through(
    function: Callable[..., jax.Array], group: int, axis: int, x: jax.Array
) -> jax.Array:
    """Applies a function of float32 groups; its derivative is that of the identity.

    A group has `group` entries along `axis`, or all of them if `group` does not divide
    their number. The function takes groups along the axis that it gets as `axis`.
    """
    length = x.shape[axis]
    size = length if length % group else group
    shape = (*x.shape[:axis], length // size, size, *x.shape[axis + 1 :])
    y = function(x.reshape(shape).astype(jnp.float32), axis=axis + 1)
    return y.reshape(x.shape).astype(x.dtype)


@straight_through.defjvp
def _(function, group, axis, primals, tangents):
    return straight_through(function, group, axis, *primals), *tangents


def round_symmetric(chosen: Format, x: jax.Array, *, axis: int, kept: int) -> jax.Array:
    """Rounds each group to multiples of its scale, but keeps the `kept` largest."""
    size = jnp.abs(x)
    limit = largest_but(kept, size, axis)
    scale = or_one(limit / chosen.limit)
    # The entry that sets the scale has the value L, but for the rounding of floats.
    return jnp.where(size >= limit, x, scale * chosen.round(x / scale))


def largest_but(others: int, size: jax.Array, axis: int) -> jax.Array:
    """Returns the largest of each group when `others` entries are taken away.

    These passes over a group take a third of the time of `jax.lax.top_k` on CPU.
    """
    limit = size.max(axis, keepdims=True)
    for _ in range(others):
        is_below = size < limit
        below = jnp.max(size, axis, keepdims=True, where=is_below, initial=0)
        count = jnp.sum(~is_below, axis, keepdims=True)
        limit = jnp.where(count > others, limit, below)
    return limit


def asymmetric_int4(x: jax.Array, *, axis: int) -> jax.Array:
    """Rounds each group to 16 evenly spaced values, 0 included."""
    low = jnp.minimum(x.min(axis, keepdims=True), 0)
    high = jnp.maximum(x.max(axis, keepdims=True), 0)
    scale = or_one((high - low) / 15)
    zero = jnp.round(-8 - low / scale)
    return scale * (jnp.clip(jnp.round(x / scale + zero), -8, 7) - zero)


def or_one(scale: jax.Array) -> jax.Array:
    """Returns the scale, or 1 for a group of zeros."""
    return jnp.where(scale == 0, 1, scale)
