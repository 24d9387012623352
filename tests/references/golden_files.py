"""Trajectories of the authors' implementations, and runs to compare with them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN_HINT = """
{name} differs from the authors' implementation by {error:.1e} at step {step}.
The golden files hold trajectories of the published optimizer and are never updated to
fit: a difference means that this code no longer computes the published method."""


def trajectory(tx, params, gradients):
    """Runs over stacked gradients; returns the params and states after each step."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    scan = jax.jit(lambda carry, gs: jax.lax.scan(step, carry, gs)[1])
    return scan((params, tx.init(params)), jax.tree.map(jnp.asarray, gradients))


def load_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        tensors = range(len(meta["shapes"]))
        start, gradients, params = (
            [file[f"{field}_{i}"] for i in tensors]
            for field in ("params0", "grads", "params")
        )
    return start, gradients, params
