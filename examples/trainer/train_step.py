"""The training step: pure functions of a state and a batch."""

import functools
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import spam_optax
from trainer import metrics, model, sharding
from trainer.config import RunConfig
from trainer.optimizers import Optimizer

MOST_SKIPPED = 8  # steps in a row; as many as skip_spikes skips for a spike


class TrainState(NamedTuple):
    """Everything on the devices that changes from step to step.

    It holds no random key of its own. The optimizer state of sparse_spam has the seeds
    of its masks, faults are drawn from the run's seed and the step in `fault_state`,
    and the order of the data follows from the position of its iterator.
    """

    step: jax.Array  # finished steps; shape=(), dtype=jnp.int32.
    halted: jax.Array  # a step was not finite: this is the state before it; bool.
    params: optax.Params
    opt_state: optax.OptState
    fault_state: optax.OptState
    watch_state: optax.OptState = ()  # the history of the loss, for --rewind


class Task(NamedTuple):
    """Everything that is the same for every optimizer of a run."""

    config: RunConfig
    model: model.ModelConfig  # config.model for the tokenizer and the devices
    graphdef: nnx.GraphDef
    shapes: optax.Params  # shapes and dtypes of the parameters
    faults: optax.GradientTransformation
    watch: optax.GradientTransformation
    mesh: Mesh
    train: grain.IterDataset | None  # this host's (accumulate, rows, length + 1)
    validation: jax.Array | None  # (batches, rows, sequence length + 1)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the tensors, in the order of the norms that a step records."""
        return spam_optax.tensor_names(self.shapes)


def make_task(
    config: RunConfig,
    model_config: model.ModelConfig,
    mesh: Mesh,
    train: grain.IterDataset | None = None,
    validation: np.ndarray | None = None,
) -> Task:
    """Makes a task. A step that is only compiled or timed needs no data."""
    graphdef, shapes = model.abstract(model_config)
    if validation is not None:
        validation = sharding.put_everywhere(validation, mesh)
    return Task(
        config=config,
        model=model_config,
        graphdef=graphdef,
        shapes=shapes,
        faults=make_faults(config),
        watch=make_watch(config),
        mesh=mesh,
        train=train,
        validation=validation,
    )


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


def make_watch(config: RunConfig) -> optax.GradientTransformation:
    """Counts the steps in a row whose loss is above its band, by the guard's rule.

    It watches the loss alone, and changes no update.
    """
    if not config.rewind:
        return optax.identity()
    return spam_optax.skip_spikes(
        optax.identity(), max_consecutive=config.rewind_after, needs_loss=True
    )


@functools.partial(jax.jit, static_argnames=("config", "seed"))
def initial_params(config: model.ModelConfig, seed: int) -> optax.Params:
    """Draws the first parameters, each part on its devices."""
    _, state = nnx.split(model.Decoder(config, rngs=nnx.Rngs(seed)))
    return sharding.constrain(nnx.to_pure_dict(state))


def initial_state(task: Task, optimizer: Optimizer) -> TrainState:
    """Returns the state before the first step."""

    # The parameters are drawn by a program of their own, which is compiled once for all
    # optimizers.
    @jax.jit
    def with_params(params):
        return TrainState(
            step=jnp.zeros([], jnp.int32),
            halted=jnp.zeros([], bool),
            params=params,
            opt_state=sharding.constrain(optimizer.transform.init(params)),
            fault_state=task.faults.init(params),
            watch_state=task.watch.init({}),
        )

    return with_params(initial_params(task.model, task.config.seed))


def token_losses(
    params: optax.Params, windows: jax.Array, graphdef: nnx.GraphDef
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns each next token's cross-entropy in nats, and the log-partition.

    The third result is the largest attention logit of every head, for QK-clip.
    """
    tokens = windows.astype(jnp.int32)
    logits, attention_logits = model.forward(graphdef, params, tokens[:, :-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # The target's logit is picked by a comparison, because the gradient of an indexed
    # read is a scatter into the logits, which is slow on TPUs and slow to compile.
    vocabulary = jnp.arange(logits.shape[-1])
    is_target = tokens[:, 1:, None] == vocabulary[None, None, :]
    losses = log_z - jnp.sum(logits, axis=-1, where=is_target)
    return losses, log_z, attention_logits


def loss_fn(
    params: optax.Params, windows: jax.Array, graphdef: nnx.GraphDef
) -> jax.Array:
    """Returns the mean cross-entropy of the next token, in nats."""
    return token_losses(params, windows, graphdef)[0].mean()


def gradient_of_batch(
    params: optax.Params, batch: jax.Array, graphdef: nnx.GraphDef, z_loss: float
) -> tuple[jax.Array, optax.Updates, jax.Array | None]:
    """Computes loss and gradient of (parts, rows, tokens), one part after the other.

    The gradient includes the z-loss of PaLM, ``z_loss * log_z ** 2``, which keeps the
    logits from drifting. The returned loss does not include it. The third result is the
    largest attention logit of every head, for QK-clip.
    """

    def objective(params, windows):
        losses, log_z, attention_logits = token_losses(params, windows, graphdef)
        loss = losses.mean()
        total = loss + z_loss * jnp.mean(log_z**2) if z_loss else loss
        return total, (loss, attention_logits)

    def of_part(windows):
        gradient, (loss, logits) = jax.grad(objective, has_aux=True)(params, windows)
        return (loss, sharding.constrain(gradient)), logits

    def add_part(sums, windows):
        part, logits = of_part(windows)
        return jax.tree.map(jnp.add, sums, part), logits

    if len(batch) == 1:
        means, logits = of_part(batch[0])
        return *means, logits
    zeros = jnp.zeros([]), sharding.constrain(optax.tree.zeros_like(params))
    sums, logits = jax.lax.scan(add_part, zeros, batch)
    means = jax.tree.map(lambda x: x / len(batch), sums)
    return *means, None if logits is None else logits.max(0)


def apply_gradient(
    gradient: optax.Updates,
    params: optax.Params,
    opt_state: optax.OptState,
    fault_state: optax.OptState,
    transform: optax.GradientTransformation,
    faults: optax.GradientTransformation,
    **measured: jax.Array | None,
) -> tuple[optax.Updates, optax.Params, optax.OptState, optax.OptState]:
    """Gives the optimizer a gradient, which a fault may have corrupted.

    `measured` has what else the optimizer takes: the loss as `value`, and the
    `attention_logits`.

    Returns that gradient, the parameters, and the states of optimizer and faults.
    """
    gradient, fault_state = faults.update(gradient, fault_state, params)
    update, opt_state = optax.with_extra_args_support(transform).update(
        gradient, opt_state, params, **measured
    )
    return gradient, optax.apply_updates(params, update), opt_state, fault_state


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "faults", "watch", "optimizer", "z_loss"),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    faults: optax.GradientTransformation,
    watch: optax.GradientTransformation,
    optimizer: Optimizer,
    z_loss: float = 0.0,
) -> tuple[TrainState, metrics.Metrics]:
    """Trains on one batch; returns the next state and the metrics to record.

    If the loss or the update is not finite, and no guard skips the step, the state does
    not change and is marked as halted. Later steps then leave it as it is.
    """
    loss, gradient, attention_logits = gradient_of_batch(
        state.params, batch, graphdef, z_loss
    )
    gradient, params, opt_state, fault_state = apply_gradient(
        gradient,
        state.params,
        state.opt_state,
        state.fault_state,
        optimizer.transform,
        faults,
        value=loss,
        attention_logits=attention_logits,
    )
    _, watch_state = optax.with_extra_args_support(watch).update(
        {}, state.watch_state, value=loss, grad_norm=0.0
    )
    measured = {
        "loss": loss,
        "steps_above_band": optax.tree.get(watch_state, "skipped_in_a_row", 0),
        **metrics.of_step(
            state.step + 1, gradient, params, state.opt_state, opt_state, optimizer
        ),
    }
    finite = jnp.isfinite(loss) & jnp.isfinite(measured["update_norm"])
    # A guard skips steps that are not finite, but not for ever.
    in_a_row = optax.tree.get(opt_state, "skipped_in_a_row", jnp.int32(0))
    gives_up = in_a_row > MOST_SKIPPED
    going = (finite | (in_a_row > 0)) & ~gives_up & ~state.halted
    measured["skipped"] = jnp.where(gives_up, 0, measured["skipped"])
    measured["update_norm"] = jnp.where(gives_up, jnp.nan, measured["update_norm"])
    new = TrainState(
        state.step + 1, state.halted, params, opt_state, fault_state, watch_state
    )
    kept = jax.tree.map(lambda new, old: jnp.where(going, new, old), new, state)
    return sharding.constrain(kept._replace(halted=~going)), measured


def lower_step(task: Task, optimizer: Optimizer, dtype: np.dtype) -> jax.stages.Lowered:
    """Lowers the step for the devices of the task; takes no memory on them.

    After ``lower_step(...).compile()`` a run of the same objects compiles no step.
    `dtype` is that of the tokens.
    """
    config = task.config
    state = jax.eval_shape(lambda: initial_state(task, optimizer))
    rows = config.batch_size // config.accumulate
    batch = jax.ShapeDtypeStruct(
        (config.accumulate, rows, config.sequence_length + 1),
        dtype,
        sharding=NamedSharding(task.mesh, sharding.BATCH),
    )
    return train_step.lower(
        sharding.abstract(state, task.mesh),
        batch,
        graphdef=task.graphdef,
        faults=task.faults,
        watch=task.watch,
        optimizer=optimizer,
        z_loss=config.z_loss,
    )


@functools.partial(jax.jit, static_argnames=("graphdef",))
def evaluate(
    params: optax.Params, validation: jax.Array, *, graphdef: nnx.GraphDef
) -> jax.Array:
    """Returns the mean loss over a stack of batches."""
    losses = jax.lax.map(lambda windows: loss_fn(params, windows, graphdef), validation)
    return losses.mean()
