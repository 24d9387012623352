"""Where arrays live on a mesh of devices.

The mesh has three axes. `data` splits the batch; `fsdp` splits the batch too, and every
matrix, whose parts are gathered where they are used; `tensor` splits the heads and the
feed-forward layer. XLA inserts the communication. Without a mesh in force nothing here
does anything.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import spam_optax
from trainer.errors import UsageError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split a batch
BATCH = P(None, ROWS)  # of (accumulate, rows, tokens)

# The first pattern that ends a tensor's name decides. An optimizer's state has the
# names of the parameters at the end of its own, and so follows them. A tensor that no
# pattern fits is whole on every device: give the matrices of a new layer a pattern.
RULES = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"(out|down)/kernel", (None, "tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """Sizes of the mesh's axes, which change the results by rounding only."""

    data: int | None = None  # None: the devices that are left
    fsdp: int = 1
    tensor: int = 1


def make_mesh(
    parallelism: Parallelism, rows: int, devices: list[jax.Device] | None = None
) -> Mesh:
    """Makes a mesh of the devices for micro-batches of `rows` sequences.

    Without `data`, as many devices are used as can share the rows evenly.
    """
    devices = jax.devices() if devices is None else devices
    fsdp, tensor = parallelism.fsdp, parallelism.tensor
    data = parallelism.data
    if data is None:
        left = max(1, len(devices) // (fsdp * tensor))
        data = math.gcd(left, max(1, rows // fsdp))
    sizes = data, fsdp, tensor
    used = math.prod(sizes)
    shown = f"a mesh of {data} x {fsdp} x {tensor} (data, fsdp, tensor)"
    if not 0 < used <= len(devices):
        raise UsageError(f"{shown} takes {used} devices, there are {len(devices)}")
    if rows % (data * fsdp):
        raise UsageError(
            f"{shown} splits a batch into {data * fsdp} parts, which {rows} sequences"
            " (--batch-size over --accumulate) cannot be"
        )
    if used < len(devices) and jax.process_count() > 1:
        raise UsageError(
            f"{shown} leaves {len(devices) - used} of {len(devices)} devices idle:"
            " several hosts need all of theirs, so choose another --batch-size or mesh"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:used])


def spec(name: str, shape: tuple[int, ...], mesh: Any) -> P:
    """Returns how a tensor is split; an axis that does not divide it is left out.

    Axes of one device are left out as well, as XLA does. So arrays and their
    descriptions have equal shardings, and share compiled programs.
    """
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", name) and len(axes) == len(shape):
            kept = [
                axis
                if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
                else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            while kept and kept[-1] is None:
                kept.pop()
            return P(*kept)
    return P()


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps over the tensors of a tree and their names."""
    leaves, structure = jax.tree.flatten(tree)
    names = spam_optax.tensor_names(tree)
    return structure.unflatten(map(function, names, leaves))


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Returns shapes, dtypes and shardings of `tree`, for compiling and restoring.

    The tree is of parameters, or of anything that holds tensors with their names.
    """

    def describe(name, x):
        sharding = NamedSharding(mesh, spec(name, x.shape, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return map_named(describe, tree)


def constrain(tree: Any) -> Any:
    """Keeps parameters, gradients or a state on their devices, inside a jit."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def keep(name, x):
        return jax.lax.with_sharding_constraint(x, spec(name, x.shape, mesh))

    return map_named(keep, tree)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps activations split along their first axis, inside a jit."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(ROWS))


def gather_columns(table: jax.Array) -> jax.Array:
    """Leaves a table split by rows only, inside a jit."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table
    rows = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table, P(rows))


def put_batch(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """Makes one global batch of the parts that the hosts have."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), local)


def put_everywhere(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Splits a stack of batches, which every host has whole, among all devices."""
    rows = math.prod(mesh.shape[axis] for axis in ROWS)
    sharding = NamedSharding(mesh, BATCH if array.shape[1] % rows == 0 else P())
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])
