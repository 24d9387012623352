r"""The layout of sparse momentum: pure functions of arrays.

A matrix of `rows` rows is cut into `row_blocks` blocks of rows, and a block of
:math:`R` rows into slabs of about :math:`n = \mathrm{round}(\rho R)` rows, for the
density :math:`\rho`. The last slab may be shorter. Row :math:`r` of a block's moments
stands for rows :math:`r, n + r, 2n + r, \dots` of the block. In each column these
entries form a group. One of them, the selected member or *lane*, has momentum.
Gathering gradients and placing updates are therefore elementwise operations over the
slabs, without indices. On a mesh every group can stay on one device.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOST_BLOCKS = 2**16
_MOST_LANES = 2**12 - 1  # The members of larger groups would not be equally likely.
_FACTORS = np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)
_TILE = 8  # Rows of a tile of TPU memory.


class Layout(NamedTuple):
    """The groups of the entries of a matrix or of a stack of matrices.

    Attributes:
      shape: Shape of the parameter.
      blocks: Number of blocks of rows.
      kept: Number of rows of moments per block.
      rows: Number of rows per block.
      lanes: Number of entries in the largest groups, and number of slabs.
      missing_rows: Number of rows by which the last slab is shorter than the others.
      lane_dtype: The smallest dtype that holds a lane.
      moment_shape: Shape of the moments.
      blocked_shape: Shape of the moments with an axis of blocks.
    """

    shape: tuple[int, ...]
    blocks: int
    kept: int
    rows: int
    lanes: int
    missing_rows: int
    lane_dtype: np.dtype
    moment_shape: tuple[int, ...]
    blocked_shape: tuple[int, ...]


def make(shape: tuple[int, ...], blocks: int, kept: int) -> Layout:
    """Returns the layout with `kept` rows of moments in each of `blocks` blocks."""
    *leading, all_rows, columns = shape
    rows = all_rows // blocks
    lanes = -(-rows // kept)
    return Layout(
        shape=tuple(shape),
        blocks=blocks,
        kept=kept,
        rows=rows,
        lanes=lanes,
        missing_rows=lanes * kept - rows,
        lane_dtype=np.min_scalar_type(lanes - 1),
        moment_shape=(*leading, blocks * kept, columns),
        blocked_shape=(*leading, blocks, kept, columns),
    )


def at_density(shape: tuple[int, ...], density: float, row_blocks: int) -> Layout:
    """Returns the layout of a matrix of this shape.

    Slabs of 128 rows or more have whole TPU tiles of 8 rows.
    """
    blocks = math.gcd(shape[-2], row_blocks)
    rows = shape[-2] // blocks
    kept = max(1, round(density * rows))
    if 16 * _TILE <= kept < rows:
        kept = _TILE * round(kept / _TILE)
    fewest = -(-rows // _MOST_LANES)
    return make(shape, blocks, min(rows, max(kept, fewest)))


def of_moments(
    shape: tuple[int, ...], moment_shape: tuple[int, ...], row_blocks: int
) -> Layout:
    """Returns the layout of a matrix whose moments have this shape."""
    blocks = math.gcd(shape[-2], row_blocks)
    return make(shape, blocks, moment_shape[-2] // blocks)


def slabs(layout: Layout, x: jax.Array) -> list[jax.Array]:
    """Returns the slabs of `x`. The last one is padded with zeros.

    They are slices, which compilers fuse with the operations that use them.
    """
    *leading, _, columns = layout.shape
    x = x.reshape(*leading, layout.blocks, layout.rows, columns)
    starts = range(0, layout.rows, layout.kept)
    found = [x[..., start : start + layout.kept, :] for start in starts]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, layout.missing_rows), (0, 0)]
    found[-1] = jnp.pad(found[-1], padding)
    return found


def pick(layout: Layout, x: jax.Array, lanes: jax.Array) -> jax.Array:
    """Returns the entries of `x` with momentum, in the shape of the moments."""
    *others, picked = slabs(layout, x)
    for lane, slab in enumerate(others):
        picked = jnp.where(lanes == lane, slab, picked)
    picked = picked.reshape(layout.moment_shape)
    # The barrier makes compilers store the result. Without it, XLA:CPU picks again for
    # each moment, and on TPU a step that counts moves 12 bytes more per parameter. A
    # short slab is padded, and TPU then moves less if it may choose.
    return picked if layout.missing_rows else jax.lax.optimization_barrier(picked)


def count(
    layout: Layout, predicate: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    """Counts the entries of each group for which `predicate` holds.

    The counts have the shape of the moments. The predicate is evaluated slab by slab,
    because on the whole array it would be a separate pass over memory.
    """
    holds = [predicate(slab).astype(jnp.float32) for slab in slabs(layout, x)]
    return functools.reduce(jnp.add, holds).reshape(layout.moment_shape)


def place(layout: Layout, x: jax.Array, lanes: jax.Array) -> jax.Array:
    """Puts `x`, in the shape of the moments, at its places in the parameter.

    All other entries are 0.
    """
    x = jnp.expand_dims(x.reshape(layout.blocked_shape), -3)
    return _join(layout, jnp.where(_slab_mask(layout, lanes), x, 0))


def mask(layout: Layout, lanes: jax.Array) -> jax.Array:
    """Marks the entries of the parameter that have momentum."""
    return _join(layout, _slab_mask(layout, lanes))


def _slab_mask(layout: Layout, lanes: jax.Array) -> jax.Array:
    """Marks the entries of the slabs, of shape (..., blocks, lanes, kept, columns)."""
    lanes = jnp.expand_dims(lanes, -3)
    shape = [1] * lanes.ndim
    shape[-3] = layout.lanes
    return lanes == jax.lax.broadcasted_iota(lanes.dtype, shape, lanes.ndim - 3)


def _join(layout: Layout, x: jax.Array) -> jax.Array:
    """Puts the slabs together to an array of the parameter's shape."""
    *leading, _, columns = layout.shape
    padded = layout.lanes * layout.kept
    x = x.reshape(*leading, layout.blocks, padded, columns)
    return x[..., : layout.rows, :].reshape(layout.shape)


def salts(names: Sequence[str]) -> list[jax.Array]:
    """Returns a number for each name, by which tensors differ in their lanes.

    XLA compiles one kernel for all tensors of a shape if the numbers are not constants
    in it. The barrier hides that they are.
    """
    numbers = [jnp.uint32(zlib.crc32(name.encode())) for name in names]
    return jax.lax.optimization_barrier(numbers)


def random_lanes(
    layout: Layout, seed: jax.Array, salt: jax.Array, moment: jax.Array
) -> jax.Array:
    """Returns the selected member of each group. All members are equally likely.

    The selection is a hash of the seed, the tensor's name and the place of the group.
    It is computed elementwise, so it takes no memory, and on a mesh every device
    computes its own part.
    """
    shape = layout.blocked_shape
    sharding = jax.typeof(moment.reshape(shape)).sharding
    iota = functools.partial(
        jax.lax.broadcasted_iota,
        jnp.uint32,
        shape,
        out_sharding=None if sharding.mesh.empty else sharding,
    )
    # All iotas have the full shape: on a mesh, XLA would gather smaller arrays.
    *outer, column = map(iota, range(len(shape)))
    index = column
    stride = 1
    for size, place in zip(reversed(shape[1:]), reversed(outer), strict=True):
        stride *= size
        index = index + place * np.uint32(stride % 2**32)
    # Both numbers are needed. With one, two tensors could have the same sequence.
    bits = (index ^ _mix(seed ^ salt)) * _FACTORS[0] ^ _mix(seed + salt)
    choices: jax.Array | np.uint32 = np.uint32(layout.lanes)
    if layout.missing_rows:
        in_last_slab = layout.kept - layout.missing_rows
        choices -= (outer[-1] >= in_last_slab).astype(jnp.uint32)
    return _scale(_mix(bits), choices, layout.lanes).astype(layout.lane_dtype)


def _mix(bits: jax.Array) -> jax.Array:
    """Mixes uint32: a bijection in which every output bit depends on every input bit.

    Wellons, `hash-prospector <https://github.com/skeeto/hash-prospector>`_.
    """
    bits = (bits ^ (bits >> 16)) * _FACTORS[0]
    bits = (bits ^ (bits >> 15)) * _FACTORS[1]
    return bits ^ (bits >> 15)


def _scale(bits: jax.Array, n: jax.Array | np.uint32, most: int) -> jax.Array:
    """Returns about ``bits * n // 2**32`` for ``n <= most``, without 64-bit numbers."""
    width = most.bit_length()
    return (bits >> width) * n >> (32 - width)
