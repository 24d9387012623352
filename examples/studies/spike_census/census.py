"""Every spike of a training run's gradients, counted without keeping the gradients.

The gradient spike score of a coordinate, ``|g_t| / mean over the run of |g|``, needs a
mean that is known only when the run is over. So each run is made twice: the first pass
adds up the mean, the second, the same run again bit for bit, compares with it. That
takes twice the time, and at any number of steps the memory of five copies of the
parameters: parameters, Adam's two moments, the mean, and the sum it comes from. The
second pass adds up the sum again, and if that has not the same bits it was not the same
run, and nothing is reported.
"""

import dataclasses
import functools
import pathlib
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
from studies.spike_census import architectures
from trainer import model, optimizers, train_step
from trainer.config import RunConfig
from trainer.data import text_files
from trainer.errors import UsageError

MODELS = {
    "llama": (model.Decoder, "plain"),
    "llama-scaled": (model.Decoder, "scaled"),
    "llama-normed": (model.Decoder, "normed"),
    "gpt2": (architectures.GPT2, "plain"),
    "hawk": (architectures.Hawk, "plain"),
}
TEXTS = {"shakespeare": text_files.SHAKESPEARE, "prose": text_files.PROSE}
HEAD_WIDTH = 16
GSS_THRESHOLD = 50.0  # on |g| / mean |g|
ONLINE_THRESHOLD = 5000.0  # on g**2 / v
ADAM = optax.scale_by_adam(optimizers.B1, optimizers.B2)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that decides the numbers of one run."""

    model: str = "llama"  # a key of MODELS
    text: str = "shakespeare"  # a key of TEXTS, or the path of a text file
    tokenizer: str = "bytes"  # see tokenization.load
    batch_size: int = 16  # sequences a step
    sequence_length: int = 64  # tokens
    layers: int = 3
    width: int = 64  # a multiple of HEAD_WIDTH
    steps: int = 600
    learning_rate: float = 4e-3  # at its peak
    seed: int = 0  # of parameters and batches

    @property
    def name(self) -> str:
        text = self.text if self.text in TEXTS else pathlib.Path(self.text).stem
        tokenizer = self.tokenizer.replace(":", "-").replace("/", "-")
        return f"{self.model}_{text}_{tokenizer}_b{self.batch_size}"


class Text(NamedTuple):
    """A text to train on, as tokens."""

    tokens: np.ndarray
    vocabulary: int
    digest: str  # changes when the text or the tokenizer does


class Task(NamedTuple):
    """One run, ready to start."""

    graphdef: nnx.GraphDef
    params: optax.Params  # the first ones
    batches: grain.MapDataset  # batch n is a function of the seed and n alone
    rates: np.ndarray  # the learning rate of every step


class State(NamedTuple):
    """All that a pass carries from step to step: five trees like the parameters."""

    params: optax.Params
    adam: optax.ScaleByAdamState
    mean: optax.Params  # of |g| over the run; zeros in the first pass
    total: optax.Params  # of |g| / steps so far: in the end, the mean


class Pass(NamedTuple):
    """What one pass over a run showed."""

    mean: optax.Params  # of |g|
    losses: np.ndarray  # of each step's batch, before its update
    counts: dict[str, np.ndarray]  # steps x tensors: see `statistics`
    halted_at: int | None  # the step, from 1, that was not finite


def load_text(name: str, tokenizer: str) -> Text:
    """The training part of a text: a key of TEXTS, or a path."""
    path = str(TEXTS.get(name, name))
    made, tokens, digest = text_files.load(path, tokenizer)
    return Text(tokens.train, made.vocabulary, digest)


def check_length(setting: Setting, text: Text) -> None:
    """Raises UsageError if the text is too short for one batch."""
    needed = setting.batch_size * setting.sequence_length + 1
    if len(text.tokens) < needed:
        raise UsageError(
            f"the text {setting.text} is too short: one batch takes {needed:,} tokens,"
            f" its training part has {len(text.tokens):,}"
        )


def make_task(setting: Setting, text: Text) -> Task:
    """Model and batches of a run, from its seed."""
    kind, embedding = MODELS[setting.model]
    shape = model_config(setting, text.vocabulary, embedding)
    graphdef, state = nnx.split(kind(shape, rngs=nnx.Rngs(setting.seed)))
    schedule = optimizers.schedule(
        RunConfig(steps=setting.steps, learning_rate=setting.learning_rate)
    )
    return Task(
        graphdef,
        nnx.to_pure_dict(state),
        text_files.batches(
            text.tokens, setting.sequence_length, setting.batch_size, setting.seed
        ),
        np.asarray(schedule(np.arange(setting.steps))),
    )


def model_config(
    setting: Setting, vocabulary: int, embedding: str
) -> model.ModelConfig:
    return model.ModelConfig(
        layers=setting.layers,
        width=setting.width,
        heads=setting.width // HEAD_WIDTH,
        ffn_width=11 * setting.width // 4,
        vocabulary=vocabulary,
        positions=setting.sequence_length,
        embedding=embedding,
        scan_unroll=setting.layers,
    )


# -------------------------------------------------------------------- what is counted


def is_stacked(path: tuple) -> bool:
    """Whether a tensor has a leading axis of layers."""
    return path[0].key == "blocks"


def tensor_sizes(params: optax.Params) -> dict[str, int]:
    """Coordinates of every tensor; those of different layers are different tensors."""
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
    """`reduce` of every tensor, in the order of `tensor_sizes`."""
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kept = 1 if is_stacked(path) else 0
        reduced = reduce(leaf, axis=tuple(range(kept, leaf.ndim)))
        parts.append(jnp.atleast_1d(reduced))
    return jnp.concatenate(parts)


def offline_score(gradient: jax.Array, mean: jax.Array) -> jax.Array:
    """`functional.gradient_spike_score` of one step, for a mean that is known."""
    return jnp.abs(gradient) / jnp.where(mean > 0, mean, 1)


def statistics(
    gradient: optax.Updates, mean: optax.Params, nu: optax.Params
) -> dict[str, jax.Array]:
    """Spikes of every tensor in one step, and the largest score, by both definitions.

    `nu` is Adam's second moment before the step, not bias corrected.
    """
    scores = {
        "gss": (jax.tree.map(offline_score, gradient, mean), GSS_THRESHOLD),
        "online": (
            jax.tree.map(functional.online_spike_score, gradient, nu),
            ONLINE_THRESHOLD,
        ),
    }
    found = {}
    for name, (score, threshold) in scores.items():
        above = jax.tree.map(lambda x, limit=threshold: x > limit, score)
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
    """One step of Adam; what its gradient showed; whether all of it was finite."""
    found = statistics(gradient, state.mean, state.adam.nu)
    update, adam = ADAM.update(gradient, state.adam)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, update)
    total = jax.tree.map(lambda old, g: old + jnp.abs(g) / steps, state.total, gradient)
    finite = jnp.isfinite(optax.tree.norm(gradient))
    return State(params, adam, state.mean, total), found, finite


def one_pass(
    task: Task, mean: optax.Params, steps: int, on_step: Callable[[], None]
) -> Pass:
    """Trains for `steps` steps, or until the loss or the gradient is not finite."""
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
                raise UsageError("the first step's loss or gradient is not finite")
            halted_at = step + 1
            break
        rows.append(jax.device_get({"loss": loss, **found}))
        on_step()
    counts = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Pass(state.total, counts.pop("loss"), counts, halted_at)


def count_spikes(task: Task, on_step: Callable[[], None]) -> Pass:
    """Both passes; the result is the second's.

    If a step is not finite, the run ends before it, for the mean as well.

    Raises:
      UsageError: If the first step is not finite, or the second pass was not the same
        run.
    """
    steps = len(task.rates)
    nothing = optax.tree.zeros_like(task.params)
    first = one_pass(task, nothing, steps, on_step)
    halted_at = first.halted_at
    if halted_at is not None:
        first = one_pass(task, nothing, halted_at - 1, on_step)
    second = one_pass(task, first.mean, len(first.losses), on_step)
    check_same(first, second)
    return second._replace(halted_at=halted_at)


def check_same(first: Pass, second: Pass) -> None:
    """Raises UsageError unless both passes were the same run, bit for bit."""
    same = np.array_equal(first.losses, second.losses) and all(
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(first.mean), jax.tree.leaves(second.mean), strict=True
        )
    )
    if not same:
        raise UsageError(
            "the run was not the same the second time, so its mean gradient is not that"
            " of the first; on GPU, set XLA_FLAGS=--xla_gpu_deterministic_ops=true"
        )
