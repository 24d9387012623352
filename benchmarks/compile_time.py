"""How long tracing and compiling a step takes, for XLA:CPU and for the TPU compiler."""

import importlib.util
import itertools
import time

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import spam_optax
from benchmarks import compiled, optimizers, shapes, steps

_RATE = 1e-3
ROWS = {
    optimizers.BASELINE: optimizers.adamw,
    "spam, no counts": optimizers.spam,
    "spam": lambda: optimizers.spam(count=True),
    "sparse_spam 1/4, no counts": optimizers.sparse_spam,
    "stable_spam, no counts": lambda: spam_optax.stable_spam(_RATE),
    "stable_adamw, no counts": lambda: spam_optax.stable_adamw(_RATE),
    "adam_mini, no counts": lambda: spam_optax.adam_mini(
        _RATE, partition=spam_optax.adam_mini_partition(8)
    ),
    "track_spikes(adam)": lambda: spam_optax.track_spikes(optimizers.adam()),
}


def measure(quick, track):
    """Rows for each compiler. That of a TPU is left out without libtpu."""
    params = (shapes.Llama(64, 176, 2, 1000) if quick else shapes.DEEP).params()
    platforms = ["cpu"] + ["tpu"] * (importlib.util.find_spec("libtpu") is not None)
    jobs = [(platform, name) for platform in platforms for name in ROWS]
    return {
        "leaves": len(jax.tree.leaves(params)),
        "rows": [
            _row(platform, name, params)
            for platform, name in track(jobs, description="compile")
        ],
    }


def _row(platform, name, params):
    """The processor seconds of each stage, and the operations before XLA."""
    tx = ROWS[name]()
    arguments = params, jax.eval_shape(tx.init, params), params
    if platform == "tpu":
        sharding = NamedSharding(Mesh(compiled.devices("v5e")[:1], ("x",)), P())
        arguments = jax.tree.map(lambda x: x.update(sharding=sharding), arguments)
    jax.clear_caches()
    marks = [time.process_time()]
    traced = steps.jit_step(tx).trace(*arguments)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    program = lowered.compile()
    marks.append(time.process_time())
    trace, lower, compile_ = (b - a for a, b in itertools.pairwise(marks))
    return {
        "platform": platform,
        "optimizer": name,
        "seconds": {"trace": trace, "lower": lower, "compile": compile_},
        "operations": lowered.as_text().count(" = "),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes
        / shapes.size(params),
    }
