"""Time and memory of a step on this machine, of every optimizer, in both orders."""

import importlib.util
import json
import subprocess
import sys

import jax

from benchmarks import environment, optimizers, shapes, steps


def measure(quick, track):
    """A table of rows for each set of parameters; torch's rows too if there is one."""
    rounds = 3 if quick else 15
    sets = {
        "matrices": shapes.matrices(12, 512 if quick else 2048),
        "leaves": (shapes.Llama(64, 176, 4, 1000) if quick else shapes.DEEP).params(),
    }
    makers = {
        "matrices": optimizers.ELEMENTWISE,
        "leaves": optimizers.ELEMENTWISE | optimizers.MATRIX,
    }
    return {
        name: {
            **_description(params),
            "rows": _jax_rows(name, params, makers[name], rounds, track),
            "torch": _torch_rows(name, params, rounds, track),
        }
        for name, params in sets.items()
    }


def _description(params):
    leaves = jax.tree.leaves(params)
    return {"parameters": shapes.size(params), "leaves": len(leaves)}


def _jax_rows(name, params, makers, rounds, track):
    pairs = [(x, order) for x in makers for order in steps.ORDERS]
    contenders = [
        steps.compile_contender(x, makers[x], params, order)
        for x, order in track(pairs, description=f"step: compile for {name}")
    ]
    turns = steps.interleave(contenders, steps.Arena(params, makers), rounds)
    for _ in track(turns, rounds + 1, description=f"step: {rounds} rounds, {name}"):
        pass
    return steps.summary(contenders, shapes.size(params))


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
