"""Time and memory of a step on this machine, of every optimizer, in both orders."""

import functools
import importlib.util
import itertools
import json
import subprocess
import sys

import jax

from benchmarks import environment, optimizers, shapes, steps

_DENSE = (optimizers.BASELINE, "spam, no counts", "spam")
_QUICK = (*_DENSE, "sparse_spam 1/4")
# What takes minutes to compile for 201 arrays is left out there.
_LEAVES = (
    *("optax.adam", *_DENSE, "optax.adafactor", "optax.lion", *optimizers.MATRIX),
    *("sparse_spam 1/4, no counts", "sparse_spam 1/4", "spam_clip, adam"),
)


def measure(quick, track):
    """Rows for twelve matrices and for the arrays of a LLaMA; torch's, if installed."""
    rounds = 3 if quick else 15
    matrices = shapes.matrices(12, 512 if quick else 2048)
    leaves = (shapes.Llama(64, 176, 2, 1000) if quick else shapes.DEEP).params()
    names = _QUICK if quick else optimizers.ELEMENTWISE
    in_both = list(itertools.product(names, steps.ORDERS))
    mixed = [(name, steps.PARAMS_FIRST) for name in (_QUICK if quick else _LEAVES)]
    mixed += [(name, steps.GRADIENTS_FIRST) for name in _DENSE]
    return {
        "matrices": _measure("matrices", matrices, in_both, rounds, track),
        "leaves": _measure("leaves", leaves, mixed, rounds, track),
    }


def _measure(name, params, jobs, rounds, track):
    return {
        "parameters": shapes.size(params),
        "leaves": len(jax.tree.leaves(params)),
        "rows": _jax_rows(name, params, jobs, rounds, track),
        "torch": _torch_rows(name, params, rounds, track),
    }


def _jax_rows(name, params, jobs, rounds, track):
    table = optimizers.ELEMENTWISE | optimizers.MATRIX
    contenders = [
        steps.compile_contender(x, table[x], params, order)
        for x, order in track(jobs, description=f"step: compile, {name}")
    ]
    makers = {x: table[x] for x, _ in jobs}
    title = f"step: {rounds} rounds, {name}"
    show = functools.partial(track, total=rounds + 1, description=title)
    return steps.compete(contenders, params, makers, rounds, show)


def _torch_rows(name, params, rounds, track):
    """Rows from a process of its own, where no thread of JAX is in the way."""
    if importlib.util.find_spec("torch") is None:
        return None
    job = {
        "shapes": [x.shape for x in jax.tree.leaves(params)],
        "rounds": rounds,
        "threads": environment.cores(),
    }
    command = [sys.executable, "-m", "benchmarks.torch_engine"]
    for _ in track([None], description=f"step: torch, {name}"):
        finished = subprocess.run(
            command, input=json.dumps(job), stdout=subprocess.PIPE, text=True
        )
    if finished.returncode:
        raise RuntimeError(f"torch_engine failed with code {finished.returncode}")
    return json.loads(finished.stdout)
