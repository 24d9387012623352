"""Counts every gradient spike of a training run without storing the gradients.

The gradient spike score of a coordinate is ``|g_t| / mean over the run of |g|``. That
mean is known only when the run is over, so each run is made twice. The first pass
computes the mean. The second pass repeats the run bit for bit, and compares each
gradient with the mean.

This takes twice the time. At any number of steps it takes the memory of five copies of
the parameters: the parameters, Adam's two moments, the mean, and the sum that becomes
the mean. The second pass computes the sum again. If its bits differ from those of the
first pass, the runs were different, and nothing is reported.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spam_optax
from spam_optax import functional
from trainer import optimizers, train_step

GSS_THRESHOLD = 50.0  # of |g| / mean |g|, the gradient spike score
ONLINE_THRESHOLD = 5000.0  # of g**2 / v, the score that SPAM uses while training
KINDS = {"gss": GSS_THRESHOLD, "online": ONLINE_THRESHOLD}
ADAM = optax.scale_by_adam(optimizers.B1, optimizers.B2)


class Task(NamedTuple):
    """The inputs of one run."""

    graphdef: nnx.GraphDef
    params: optax.Params  # before training
    batches: grain.MapDataset  # batch n depends on the seed and n only
    rates: np.ndarray  # the learning rate of each step


class State(NamedTuple):
    """The state of a pass: five trees with the shapes of the parameters."""

    params: optax.Params
    adam: optax.ScaleByAdamState
    mean: optax.Params  # of |g| over the run; zeros in the first pass
    total: optax.Params  # sum of |g| / steps so far; after the last step, the mean


class Pass(NamedTuple):
    """The results of one pass."""

    mean: optax.Params  # of |g|
    losses: np.ndarray  # of each step's batch, before its update
    counts: dict[str, np.ndarray]  # steps x tensors: see `score_step`
    halted_at: int | None  # the step, from 1, that was not finite


# ----------------------------------------------------------------------- one gradient


def is_stacked(path: tuple) -> bool:
    """Returns whether a tensor has a leading axis of layers."""
    return path[0].key == "blocks"


def tensor_sizes(params: optax.Params) -> dict[str, int]:
    """Returns the number of coordinates of each tensor, with one tensor per layer."""
    sizes = {}
    names = spam_optax.tensor_names(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for name, (path, leaf) in zip(names, leaves, strict=True):
        if is_stacked(path):
            for layer in range(len(leaf)):
                numbered = name.replace("blocks", f"blocks.{layer}", 1)
                sizes[numbered] = leaf[layer].size
        else:
            sizes[name] = leaf.size
    return sizes


def per_tensor(reduce: Callable, tree: Any) -> jax.Array:
    """Applies `reduce` to each tensor, in the order of `tensor_sizes`."""
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kept = 1 if is_stacked(path) else 0
        reduced = reduce(leaf, axis=tuple(range(kept, leaf.ndim)))
        parts.append(jnp.atleast_1d(reduced))
    return jnp.concatenate(parts)


def offline_score(gradient: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns `functional.gradient_spike_score` of one step, for a known mean."""
    return jnp.abs(gradient) / jnp.where(mean > 0, mean, 1)


def score_step(
    gradient: optax.Updates, mean: optax.Params, nu: optax.Params
) -> dict[str, jax.Array]:
    """Counts the spikes of each tensor in one step, and returns the largest scores.

    There are two scores: the gradient spike score, and the online score of SPAM. The
    latter uses `nu`, Adam's second moment before the step without bias correction.
    """
    scores = {
        "gss": jax.tree.map(offline_score, gradient, mean),
        "online": jax.tree.map(functional.online_spike_score, gradient, nu),
    }
    found = {}
    for name, score in scores.items():
        above = jax.tree.map(lambda x, limit=KINDS[name]: x > limit, score)
        found[f"{name}_count"] = per_tensor(jnp.sum, above)
        found[f"{name}_max"] = per_tensor(jnp.max, score)
    return found


# ---------------------------------------------------------------------- the two passes


@jax.jit
def first_state(params: optax.Params, mean: optax.Params) -> State:
    return State(
        params, ADAM.init(params), mean, optax.tree.zeros_like(params, jnp.float32)
    )


@functools.partial(jax.jit, static_argnames="graphdef")
def loss_and_gradient(
    params: optax.Params, windows: jax.Array, *, graphdef: nnx.GraphDef
) -> tuple[jax.Array, optax.Updates]:
    return jax.value_and_grad(train_step.loss_fn)(params, windows, graphdef)


@functools.partial(jax.jit, donate_argnames="state")
def observe(
    state: State, gradient: optax.Updates, rate: jax.Array, steps: jax.Array
) -> tuple[State, dict[str, jax.Array], jax.Array]:
    """Makes one step of Adam.

    Returns the new state, the scores, and whether the gradient is finite.
    """
    found = score_step(gradient, state.mean, state.adam.nu)
    update, adam = ADAM.update(gradient, state.adam)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, update)
    total = jax.tree.map(lambda old, g: old + jnp.abs(g) / steps, state.total, gradient)
    finite = jnp.isfinite(optax.tree.norm(gradient))
    return State(params, adam, state.mean, total), found, finite


def one_pass(
    task: Task, mean: optax.Params, steps: int, progress: Callable[[float], None]
) -> Pass:
    """Trains for `steps` steps, or until the loss or the gradient is not finite.

    Raises:
      FloatingPointError: If the first step is not finite.
    """
    state = first_state(task.params, mean)
    rows, halted_at = [], None
    for step in range(steps):
        loss, gradient = loss_and_gradient(
            state.params, task.batches[step], graphdef=task.graphdef
        )
        state, found, finite = observe(
            state, gradient, task.rates[step], np.float32(steps)
        )
        if not (finite and np.isfinite(loss)):
            if not step:
                raise FloatingPointError(
                    "the loss or the gradient of the first step is not finite"
                )
            halted_at = step + 1
            break
        rows.append(jax.device_get({"loss": loss, **found}))
        progress((step + 1) / steps)
    counts = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Pass(state.total, counts.pop("loss"), counts, halted_at)


def count_spikes(task: Task, progress: Callable[[float], None]) -> Pass:
    """Makes both passes and returns the results of the second.

    If a step is not finite, both passes end before it.

    Raises:
      FloatingPointError: If the first step is not finite.
      RuntimeError: If the second pass differs from the first.
    """

    def half(done):
        return lambda fraction: progress((done + fraction) / 2)

    steps = len(task.rates)
    nothing = optax.tree.zeros_like(task.params)
    first = one_pass(task, nothing, steps, half(0))
    halted_at = first.halted_at
    if halted_at is not None:
        first = one_pass(task, nothing, halted_at - 1, half(0))
    second = one_pass(task, first.mean, len(first.losses), half(1))
    check_same(first, second)
    return second._replace(halted_at=halted_at)


def check_same(first: Pass, second: Pass) -> None:
    """Raises RuntimeError unless both passes were the same run, bit for bit."""
    same = np.array_equal(first.losses, second.losses) and all(
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(first.mean), jax.tree.leaves(second.mean), strict=True
        )
    )
    if not same:
        raise RuntimeError(
            "the second pass differs from the first, so the mean gradient is not that"
            " of the second; on GPU, set XLA_FLAGS=--xla_gpu_deterministic_ops=true"
        )
