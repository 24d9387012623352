"""The training step: pure functions of a state and a batch."""

import functools
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import spam_optax
from trainer import model, sharding
from trainer.config import RunConfig
from trainer.optimizers import Optimizer


class TrainState(NamedTuple):
    """All that changes from step to step, on the devices.

    There is no random state of its own: sparse_spam keeps the seeds of its masks in
    `opt_state`, faults are drawn from the run's seed and the step in `fault_state`, and
    the order of the data is in the position of its iterator.
    """

    step: jax.Array  # finished steps; shape=(), dtype=jnp.int32.
    halted: jax.Array  # a step was not finite: this is the state before it; bool.
    params: optax.Params
    opt_state: optax.OptState
    fault_state: optax.OptState


class Task(NamedTuple):
    """What is the same for every optimizer."""

    config: RunConfig
    model: model.ModelConfig
    graphdef: nnx.GraphDef
    faults: optax.GradientTransformation
    mesh: Mesh
    train: grain.IterDataset  # this host's (accumulate, rows, sequence length + 1)
    validation: jax.Array  # (batches, rows, sequence length + 1)


def initialize(
    config: RunConfig, model_config: model.ModelConfig | None = None
) -> tuple[nnx.GraphDef, optax.Params]:
    """The structure of the model, and its first parameters as a plain tree."""
    model_config = model_config or model.PRESETS[config.preset]
    decoder = model.Decoder(model_config, rngs=nnx.Rngs(config.seed))
    graphdef, state = nnx.split(decoder)
    return graphdef, nnx.to_pure_dict(state)


def make_faults(config: RunConfig) -> optax.GradientTransformation:
    """Corrupts the gradients of the fault steps, the same way for every optimizer."""
    if not config.fault_steps:
        return optax.identity()
    return spam_optax.testing.inject_spikes(
        config.seed,
        config.spike_rate,
        config.spike_factor,
        kind=config.spike_kind,
        steps=config.fault_steps,
    )


@functools.partial(jax.jit, static_argnames=("config", "model_config"))
def initial_params(config: RunConfig, model_config: model.ModelConfig) -> optax.Params:
    """The first parameters, each part where it belongs."""
    return sharding.constrain(initialize(config, model_config)[1])


@functools.partial(jax.jit, static_argnames=("optimizer", "faults"))
def first_state(
    params: optax.Params, optimizer: Optimizer, faults: optax.GradientTransformation
) -> TrainState:
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        halted=jnp.zeros([], bool),
        params=params,
        opt_state=sharding.constrain(optimizer.transform.init(params)),
        fault_state=faults.init(params),
    )


def initial_state(
    config: RunConfig,
    model_config: model.ModelConfig,
    optimizer: Optimizer,
    faults: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step."""
    # Apart, so that the program for the parameters is compiled once for all optimizers.
    params = initial_params(config, model_config)
    return first_state(params, optimizer, faults)


def token_losses(params: optax.Params, windows: jax.Array, graphdef: nnx.GraphDef):
    """Cross-entropy of every next token, in nats, and the log-partition function."""
    tokens = windows.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Picked by comparing: the gradient of an indexed read is a scatter into the logits,
    # which TPUs are slow at, and their compiler too.
    vocabulary = jnp.arange(logits.shape[-1])
    is_target = tokens[:, 1:, None] == vocabulary[None, None, :]
    return log_z - jnp.sum(logits, axis=-1, where=is_target), log_z


def loss_fn(
    params: optax.Params, windows: jax.Array, graphdef: nnx.GraphDef
) -> jax.Array:
    """Mean cross-entropy of the next token, in nats."""
    return token_losses(params, windows, graphdef)[0].mean()


def gradient_of_batch(params, batch, graphdef, z_loss):
    """Loss and gradient of (parts, rows, tokens), computed one part after the other.

    The gradient is that of the loss plus the z-loss, PaLM's ``z_loss * log_z ** 2``,
    which keeps the logits from drifting; the loss is reported without it.
    """

    def objective(params, windows):
        losses, log_z = token_losses(params, windows, graphdef)
        loss = losses.mean()
        total = loss + z_loss * jnp.mean(log_z**2) if z_loss else loss
        return total, loss

    def add_part(sums, windows):
        gradient, loss = jax.grad(objective, has_aux=True)(params, windows)
        return jax.tree.map(jnp.add, sums, (loss, sharding.constrain(gradient))), None

    if len(batch) == 1:
        gradient, loss = jax.grad(objective, has_aux=True)(params, batch[0])
        return loss, sharding.constrain(gradient)
    zeros = jnp.zeros([]), sharding.constrain(optax.tree.zeros_like(params))
    sums, _ = jax.lax.scan(add_part, zeros, batch)
    return jax.tree.map(lambda x: x / len(batch), sums)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "faults", "optimizer", "z_loss"),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    faults: optax.GradientTransformation,
    optimizer: Optimizer,
    z_loss: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on one batch: the next state, and what to record.

    If the loss or the update is not finite, the state stays as it was and is marked as
    halted; every later step then leaves it alone.
    """
    loss, gradient = gradient_of_batch(state.params, batch, graphdef, z_loss)
    gradient, fault_state = faults.update(gradient, state.fault_state, state.params)
    update, opt_state = optimizer.transform.update(
        gradient, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, update)
    metrics = {
        "loss": loss,
        "learning_rate": optimizer.schedule(state.step),
        "spikes_clipped": optax.tree.get(opt_state, "spike_count", 0),
        **tensor_metrics(state, gradient, params, opt_state, optimizer),
    }
    finite = jnp.isfinite(loss) & jnp.isfinite(metrics["update_norm"])
    going = finite & ~state.halted
    new = TrainState(state.step + 1, state.halted, params, opt_state, fault_state)
    kept = jax.tree.map(lambda new, old: jnp.where(going, new, old), new, state)
    return sharding.constrain(kept._replace(halted=~going)), metrics


def tensor_metrics(state, gradient, params, opt_state, optimizer) -> dict[str, Any]:
    """Norms of every tensor, in `spam_optax.tensor_names`' order, and global ones."""
    statistics = {
        name: optax.tree.get(opt_state, f"tensor_{name}")
        for name in ("grad_norm", "update_norm", "spike_score", "spike_steps")
    }
    bad = optax.tree.get(opt_state, "tensor_nonfinite") > 0
    norms = {
        "grad_norm": jnp.where(bad, jnp.nan, statistics["grad_norm"]),
        "clipped_grad_norm": norms_of(
            gradient_behind_mu(state, gradient, opt_state, optimizer)
        ),
        "update_norm": statistics["update_norm"],
        "param_norm": norms_of(params),
    }
    totals = {name: jnp.sqrt(jnp.sum(norm**2)) for name, norm in norms.items()}
    scores = {name: statistics[name] for name in ("spike_score", "spike_steps")}
    return {**totals, "tensors": {**norms, **scores}}


def norms_of(tree: Any) -> jax.Array:
    return jnp.stack([optax.tree.norm(leaf) for leaf in jax.tree.leaves(tree)])


def gradient_behind_mu(state, gradient, opt_state, optimizer: Optimizer):
    """The gradient that entered the first moment: after all clipping.

    Solved from ``mu_new = b1 * mu_old + (1 - b1) * g``, with ``mu_old`` 0 in a reset
    step. That is true of every optimizer with a first moment, wherever in it the
    clipping happens, and repeats none of the library's clipping rules. It costs a few
    digits: with plain Adam the norm agrees with that of the raw gradient to about 1e-4,
    not exactly. Of a tensor with sparse momentum it is the part that has momentum.
    """
    if optimizer.momentum_decay is None:
        return gradient
    b1 = optimizer.momentum_decay
    position = spam_optax.functional.reset_position(
        state.step + 1, optimizer.reset_interval
    )
    keep = jnp.where(position == 0, 0.0, b1)
    return jax.tree.map(
        lambda old, new: (new - keep * old) / (1.0 - b1),
        optax.tree.get(state.opt_state, "mu"),
        optax.tree.get(opt_state, "mu"),
    )


@functools.partial(jax.jit, static_argnames=("graphdef",))
def evaluate(params, validation, *, graphdef) -> jax.Array:
    """Mean loss over a stack of batches."""
    losses = jax.lax.map(lambda windows: loss_fn(params, windows, graphdef), validation)
    return losses.mean()


def make_task(
    config: RunConfig,
    model_config: model.ModelConfig,
    mesh: Mesh,
    train: grain.IterDataset,
    validation: np.ndarray,
) -> Task:
    """Everything the optimizers have in common, with nothing yet on the devices."""
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: model.Decoder(model_config, rngs=nnx.Rngs(0)))
    )
    return Task(
        config=config,
        model=model_config,
        graphdef=graphdef,
        faults=make_faults(config),
        mesh=mesh,
        train=train,
        validation=sharding.put_everywhere(validation, mesh),
    )


def abstract_params(task: Task) -> optax.Params:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(lambda: initialize(task.config, task.model)[1])


def tensor_names(task: Task) -> tuple[str, ...]:
    """In the order of the norms that a step records."""
    return spam_optax.tensor_names(abstract_params(task))
