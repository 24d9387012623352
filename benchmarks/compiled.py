"""Measures the bytes of a step with the TPU compiler, which needs no TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import optimizers, shapes, steps
from trainer import hlo

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHARDINGS = {"rows": P("x"), "columns": P(None, "x"), "both": P("x", "y")}
WIDTH = 8192


def _sparse(density, **kwargs):
    return functools.partial(
        optimizers.sparse_spam, density, **({"count": True} | kwargs)
    )


_counted = functools.partial(optimizers.spam, count=True)


_MOMENTS = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
# Per row: the optimizer and the dtype of the gradients.
ROWS = {
    "optax.adam": (optimizers.adam, jnp.float32),
    "optax.adam, bfloat16 gradients": (optimizers.adam, jnp.bfloat16),
    "optax.adamw": (optimizers.adamw, jnp.float32),
    "spam, no counts": (optimizers.spam, jnp.float32),
    "spam": (_counted, jnp.float32),
    "spam, bfloat16 moments": (functools.partial(_counted, **_MOMENTS), jnp.float32),
    "spam, bfloat16 gradients": (_counted, jnp.bfloat16),
    "spam_clip, adam": (optimizers.clip_then_adam, jnp.float32),
    "sparse_spam 1/4, no counts": (_sparse(0.25, count=False), jnp.float32),
    "sparse_spam 1/4": (_sparse(0.25), jnp.float32),
    "sparse_spam 1/4, weight decay": (_sparse(0.25, weight_decay=0.1), jnp.float32),
    "sparse_spam 1/4, bfloat16 moments": (_sparse(0.25, **_MOMENTS), jnp.float32),
    "sparse_spam 1/4, bfloat16 gradients": (_sparse(0.25), jnp.bfloat16),
    "sparse_spam 1/2": (_sparse(0.5), jnp.float32),
    "sparse_spam 0.3225": (_sparse(0.3225), jnp.float32),
    "sparse_spam 0.1": (_sparse(0.1), jnp.float32),
}
# Those that are compiled for every chip; the others only for v5e.
MAIN_ROWS = (
    *("optax.adam", "spam", "spam_clip, adam"),
    *("sparse_spam 1/4, no counts", "sparse_spam 1/4"),
)
SHARDED = {
    "optax.adamw": optimizers.adamw,
    "spam, no counts": optimizers.spam,
    "spam": _counted,
    "sparse_spam 1/4": _sparse(0.25),
    "sparse_spam 1/4, row_blocks=2": _sparse(0.25, row_blocks=2),
}


def measure(quick, track):
    """Bytes a step moves on one chip, and collectives on four; None without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    jobs = [("v5e", name) for name in (MAIN_ROWS if quick else ROWS)]
    if not quick:
        jobs += [(chip, name) for chip in ("v5p", "v6e") for name in MAIN_ROWS]
    names = ["spam"] if quick else SHARDED
    sharded = [(name, x) for name in names for x in SHARDINGS]
    return {
        "rows": [
            one_chip(name, chip)
            for chip, name in track(jobs, description="compiled for one chip")
        ],
        "collectives": [
            {"optimizer": name, "sharding": x, "kinds": collectives(name, x)}
            for name, x in track(sharded, description="compiled for 2 x 2 chips")
        ],
    }


def one_chip(name, chip):
    """Bytes per parameter that a step on one chip moves, must move, and allocates."""
    make, gradient_dtype = ROWS[name]
    mesh = Mesh(devices(chip)[:1], ("x",))
    arguments, compiled = compile_step(make(), mesh, P(), gradient_dtype)
    params, state, gradients = map(shapes.nbytes, arguments)
    return {
        "chip": chip,
        "optimizer": name,
        "bytes": compiled.cost_analysis()["bytes accessed"] / WIDTH**2,
        "floor": (gradients + 2 * (params + state)) / WIDTH**2,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes / WIDTH**2,
    }


def collectives(name, sharding):
    """The kinds of collectives, and how many numbers the largest of each returns."""
    mesh = Mesh(devices("v5e").reshape(2, 2), ("x", "y"))
    spec = SHARDINGS[sharding]
    _, compiled = compile_step(SHARDED[name](), mesh, spec, jnp.float32)
    largest = {}
    for kind, results in hlo.collectives(compiled.as_text()):
        sizes = [array.size for array in results]
        largest[kind] = max(largest.get(kind, 0), *sizes)
    return largest


def compile_step(tx, mesh, spec, gradient_dtype):
    """The shapes of a step on one matrix of `WIDTH`, and the step compiled for them."""

    def shaped(x):
        sharding = NamedSharding(mesh, spec if len(x.shape) == 2 else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = shapes.matrices(1, WIDTH)
    gradients = jax.tree.map(lambda x: x.update(dtype=gradient_dtype), params)
    arguments = params, jax.eval_shape(tx.init, params), gradients
    arguments = jax.tree.map(shaped, arguments)
    return arguments, steps.jit_step(tx).lower(*arguments).compile()


def devices(chip):
    """The chips of a small topology, as the compiler knows them."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    )
    return np.array(topology.devices)
