"""Measures how the gradient flows through the layers of a model while it trains."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import optax
from flax import nnx

from spam_optax import functional
from studies import engine
from trainer import data, model, optimizers, sharding, train_step
from trainer.config import RunConfig
from trainer.data import text_files

MODELS = {
    "standard": {},
    "stable": {"initialization": "stable", "embedding": "scaled"},
    "stable-plain": {"initialization": "stable"},
    "stable-normed": {"initialization": "stable", "embedding": "normed"},
    "wesar": {"initialization": "wesar"},
    "scaled-norm": {"norm": "scaled"},
}
SUB_LAYERS = {"attention": "attention", "ffn": "feed-forward"}
MEASURED = (0, 10, 30, 100, 300, 1000, 3000, 10_000)
DIGITS = 5
BOUND = "#D55E00"

# What is measured of a sub-layer: its name, its block, the factor of its normalization,
# and the stream that enters it.
Observe = Callable[[str, nnx.Module, jax.Array, jax.Array], Any]


class Run(NamedTuple):
    """One run."""

    name: str  # of MODELS
    config: RunConfig


class GradientFlow(engine.Study):
    """Trains each model with Adam, and measures all its layers a few times."""

    def settings(self, run: Run) -> dict[str, Any]:
        settings = run.config.settings()
        del settings["optimizers"]  # always Adam
        return {"name": run.name} | settings

    def name(self, run: Run) -> str:
        return f"{run.name}-{engine.digest(self.settings(run))}"

    def data_digest(self, run: Run) -> str:
        return text_files.text_digest(run.config.data)

    def compile(self, run: Run) -> engine.Train:
        return train  # JAX compiles the steps when they run


def measured_steps(steps: int) -> list[int]:
    """Returns the steps after which a run is measured, the last one included."""
    return [step for step in MEASURED if step < steps] + [steps]


def train(run: Run, progress: engine.Progress) -> engine.Record:
    """Trains a run; returns one list per measured quantity, with a row per step."""
    config = run.config
    tokenizer, tokens, _ = text_files.load(config.data, config.tokenizer)
    data.check_length("train", tokens.train, tokenizer, config)
    length, rows = config.sequence_length, config.batch_size
    batches = text_files.batches(tokens.train, length, rows, config.seed)
    fixed = data.evaluation_batches(tokens.validation, tokenizer, config)[0]
    mesh = sharding.make_mesh(sharding.Parallelism(data=1), rows)
    shape = model.for_platform(config.model, tokenizer.vocabulary, "cpu")
    task = train_step.make_task(config, shape, mesh)
    optimizer = optimizers.make("adam", config)
    state = train_step.initial_state(task, optimizer)
    bounds = find_bounds(state.params, fixed, task.graphdef)
    steps, measured = measured_steps(config.steps), []
    for step in range(config.steps + 1):
        if step in steps:
            if state.halted:
                raise FloatingPointError(f"a step before {step} was not finite")
            measured.append(measure(state.params, fixed, task.graphdef))
        if step < config.steps:
            state, _ = train_step.train_step(
                state,
                batches[step][None],
                graphdef=task.graphdef,
                faults=task.faults,
                watch=task.watch,
                optimizer=optimizer,
            )
        progress(step / config.steps)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *measured)
    numbers = stacked | {f"{name}_bound": x for name, x in bounds.items()}
    return {
        "steps": steps,
        **{name: engine.to_json(x, DIGITS) for name, x in numbers.items()},
    }


# ------------------------------------------------------------------------ measurements


def sub_layer(name: str, block: nnx.Module, factor: jax.Array):
    """Returns a sub-layer with its normalization, without the residual connection."""
    norm, layer = getattr(block, f"{name}_norm"), getattr(block, name)
    return lambda x_BTD: layer(factor * norm(x_BTD))


def through_sub_layers(
    decoder: model.Decoder, x_BTD: jax.Array, observe: Observe
) -> tuple[jax.Array, dict[str, Any]]:
    """Applies the blocks in turn, and observes each sub-layer before it is applied.

    Returns the stream after the last block, and the observations by sub-layer, with a
    leading axis of layers.
    """
    graphdef, blocks = nnx.split(decoder.blocks)
    numbers = jnp.arange(1, decoder.config.layers + 1)
    scaled = decoder.config.norm == "scaled"
    factors = 1 / jnp.sqrt(numbers) if scaled else jnp.ones(numbers.shape)

    def apply(x_BTD, layer):
        state, factor = layer
        block, seen = nnx.merge(graphdef, state), {}
        for name in SUB_LAYERS:
            seen[name] = observe(name, block, factor, x_BTD)
            x_BTD = x_BTD + sub_layer(name, block, factor)(x_BTD)
        return x_BTD, seen

    return jax.lax.scan(apply, x_BTD, (blocks, factors))


def rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(x**2))


@functools.partial(jax.jit, static_argnums=2)
def measure(
    params: optax.Params, windows: jax.Array, graphdef: nnx.GraphDef
) -> dict[str, jax.Array]:
    """Returns loss and gradient norms of a batch, and its first sequence's Jacobians.

    The norm of a layer's gradient is that of all its parameters. The Jacobians are
    those of the whole sequence, all its positions and features.
    """
    loss, gradient = jax.value_and_grad(train_step.loss_fn)(params, windows, graphdef)
    blocks = {"blocks": gradient["blocks"]}
    norms = functional.layer_gradient_norms(blocks, ("blocks",))

    def observe(name, block, factor, x_BTD):
        f = sub_layer(name, block, factor)
        return functional.jacobian_norm(f, x_BTD), rms(x_BTD)

    decoder = nnx.merge(graphdef, params)
    stream = decoder.look_up(windows[:1, :-1].astype(jnp.int32))
    _, seen = through_sub_layers(decoder, stream, observe)
    return {
        "loss": loss,
        "gradient_norm": jnp.linalg.norm(jnp.stack([*norms.values()]), axis=0),
        **{name: norm for name, (norm, _) in seen.items()},
        "stream_rms": seen["attention"][1],
    }


@functools.partial(jax.jit, static_argnums=2)
def find_bounds(
    params: optax.Params, windows: jax.Array, graphdef: nnx.GraphDef
) -> dict[str, jax.Array]:
    """Returns Spike No More's bounds on the Jacobians, of all layers by sub-layer.

    They hold for matrices of independent normal numbers: at initialization. Those of
    the paper have the residual connection's 1 in addition.
    """

    def std(linear):
        """The deviation of a matrix as it is applied, WeSaR's factor included."""
        return linear(jnp.eye(linear.in_features)).std()

    def observe(name, block, factor, x_BTD):
        width, stream = x_BTD.shape[-1], rms(x_BTD) / factor
        if name == "ffn":
            ffn = block.ffn
            bound = functional.ffn_jacobian_bound(
                width, ffn.up.out_features, std(ffn.up), std(ffn.down), stream
            )
        else:
            out = block.attention.out
            block.attention.out = lambda x: x  # leaves the concatenated heads
            normed = factor * block.attention_norm(x_BTD)
            heads = functional.jacobian_norm(block.attention, normed)
            block.attention.out = out
            bound = functional.attention_jacobian_bound(width, std(out), stream, heads)
        return bound - 1

    decoder = nnx.merge(graphdef, params)
    stream = decoder.look_up(windows[:1, :-1].astype(jnp.int32))
    return through_sub_layers(decoder, stream, observe)[1]


# ------------------------------------------------------------------------- the picture


def draw(records: dict[str, engine.Record]) -> matplotlib.figure.Figure:
    """Draws a column per model, and a row each for gradients and sub-layers."""
    rows = {"gradient_norm": "gradient norm\nof the layer"} | {
        name: f"Jacobian norm of\n{label}" for name, label in SUB_LAYERS.items()
    }
    figure = matplotlib.figure.Figure(
        figsize=(1.5 + 3.3 * len(records), 7), dpi=110, layout="constrained"
    )
    panels = figure.subplots(
        len(rows), len(records), sharex=True, sharey="row", squeeze=False
    )
    for column, (name, record) in zip(panels.T, records.items(), strict=True):
        settings = record["settings"]
        column[0].set_title(
            f"{name}\nloss {record['loss'][-1]:.2f} after {settings['steps']} steps"
        )
        layers = range(1, settings["layers"] + 1)
        for panel, key in zip(column, rows, strict=True):
            panel.set_yscale("log")
            panel.spines[["top", "right"]].set_visible(False)
            colors = matplotlib.colormaps["viridis_r"]
            count = len(record["steps"])
            for i, step in enumerate(record["steps"]):
                color = colors(0.08 + 0.92 * i / max(1, count - 1))
                panel.plot(layers, record[key][i], color=color, label=f"step {step}")
            if key in SUB_LAYERS:
                bound = record[f"{key}_bound"]
                panel.plot(layers, bound, "--", color=BOUND, label="bound at step 0")
        column[-1].set_xlabel("layer")
    for panel, label in zip(panels[:, 0], rows.values(), strict=True):
        panel.set_ylabel(label)
    handles, labels = panels[-1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure
