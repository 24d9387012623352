"""Pure step functions, and the loop that calls them.

A step is two compiled functions. `faulty_gradients` does nearly all the work and knows
nothing of the optimizer, so a program that compares four optimizers compiles it once;
`apply_gradients` is small and is compiled for each.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spam_optax
from lm.config import RunConfig
from lm.model import PRESETS, Decoder
from lm.optimizers import B1, Optimizer
from lm.records import Row


class TrainState(NamedTuple):
    """All that changes from step to step, and so all that a checkpoint holds."""

    step: jax.Array  # finished steps; shape=(), dtype=jnp.int32.
    params: optax.Params
    opt_state: optax.OptState
    fault_state: optax.OptState


class Task(NamedTuple):
    """What is the same for every optimizer."""

    config: RunConfig
    graphdef: nnx.GraphDef
    initial_params: optax.Params
    faults: optax.GradientTransformation
    batches: grain.MapDataset
    validation: np.ndarray  # (batches, batch size, sequence length + 1)


def initialize(config: RunConfig) -> tuple[nnx.GraphDef, optax.Params]:
    """The structure of the model, and its first parameters as a plain tree."""
    model = Decoder(PRESETS[config.model], rngs=nnx.Rngs(config.seed))
    graphdef, state = nnx.split(model)
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


def loss_fn(
    params: optax.Params, windows: jax.Array, graphdef: nnx.GraphDef
) -> jax.Array:
    """Mean cross-entropy of the next byte, in nats."""
    tokens = windows.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("graphdef", "faults"))
def faulty_gradients(params, fault_state, windows, *, graphdef, faults):
    """The loss, its gradient with this step's fault, and the next fault state."""
    loss, gradients = jax.value_and_grad(loss_fn)(params, windows, graphdef)
    gradients, fault_state = faults.update(gradients, fault_state, params)
    return loss, gradients, fault_state


@functools.partial(jax.jit, static_argnames=("optimizer",), donate_argnames=("state",))
def apply_gradients(state: TrainState, gradients, fault_state, *, optimizer: Optimizer):
    """The next state, and what to record of the update."""
    step = state.step + 1
    updates, opt_state = optimizer.transform.update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "learning_rate": optimizer.schedule(state.step),
        "grad_norm": optax.tree.norm(gradients),
        "clipped_grad_norm": optax.tree.norm(
            gradient_behind_mu(state.opt_state, opt_state, step, optimizer)
        ),
        "spikes_clipped": optax.tree.get(opt_state, "spike_count", 0),
    }
    return TrainState(step, params, opt_state, fault_state), metrics


def gradient_behind_mu(old_state, new_state, step, optimizer: Optimizer):
    """The gradient that entered the first moment: after all clipping.

    Solved from ``mu_new = b1 * mu_old + (1 - b1) * g``, with ``mu_old`` 0 in a reset
    step. That is true of every optimizer here, wherever in it the clipping happens,
    and repeats none of the library's clipping rules. It costs a few digits: with plain
    Adam the norm agrees with that of the raw gradient to about 1e-4, not exactly.
    """
    reset = spam_optax.functional.reset_position(step, optimizer.reset_interval) == 0
    keep = jnp.where(reset, 0.0, B1)
    return jax.tree.map(
        lambda old, new: (new - keep * old) / (1.0 - B1),
        optax.tree.get(old_state, "mu"),
        optax.tree.get(new_state, "mu"),
    )


@functools.partial(jax.jit, static_argnames=("graphdef",))
def evaluate(params, validation, *, graphdef) -> jax.Array:
    """Mean loss over a stack of batches."""
    losses = jax.lax.map(lambda windows: loss_fn(params, windows, graphdef), validation)
    return losses.mean()


def initial_state(task: Task, optimizer: Optimizer) -> TrainState:
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=jax.tree.map(jnp.copy, task.initial_params),  # a step donates its state
        opt_state=optimizer.transform.init(task.initial_params),
        fault_state=task.faults.init(task.initial_params),
    )


def train_step(state: TrainState, windows, task: Task, optimizer: Optimizer):
    """One step on one batch: the next state and its metrics, still on the device."""
    loss, gradients, fault_state = faulty_gradients(
        state.params,
        state.fault_state,
        windows,
        graphdef=task.graphdef,
        faults=task.faults,
    )
    state, metrics = apply_gradients(state, gradients, fault_state, optimizer=optimizer)
    return state, {"loss": loss, **metrics}


class StepRecorder:
    """Turns device metrics into rows, one step behind the device.

    Fetching a value waits for it. Fetched a step late, it is there already, and the
    device never stands idle while the host writes.
    """

    def __init__(self, task: Task, optimizer: Optimizer, record: Callable[[Row], None]):
        self._config = task.config
        self._fault_steps = frozenset(task.config.fault_steps)
        self._optimizer = optimizer
        self._record = record
        self._pending = None
        self._last_time = None  # None: the next step's time would not be its own

    def push(self, step: int, metrics) -> None:
        """Takes the metrics of `step` and records those of the step before."""
        self._record_pending()
        self._pending = step, metrics

    def flush(self) -> None:
        """Records what is pending; call it before other work than steps."""
        self._record_pending()
        self._last_time = None

    def _record_pending(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        row = {
            "optimizer": self._optimizer.name,
            "step": step,
            **{name: value.item() for name, value in jax.device_get(metrics).items()},
            "fault": step in self._fault_steps,
            "tokens_per_second": self._tokens_per_second(),
        }
        self._record(row)

    def _tokens_per_second(self) -> float | None:
        now = time.perf_counter()
        before, self._last_time = self._last_time, now
        return None if before is None else self._config.tokens_per_step / (now - before)


def train(
    state: TrainState,
    task: Task,
    optimizer: Optimizer,
    *,
    record: Callable[[Row], None],
    save: Callable[[TrainState], None],
    interrupted: Callable[[], bool],
) -> TrainState:
    """Trains from `state` to the last step of the run, or until `interrupted`.

    Args:
      state: Where to start: `initial_state`, or a restored checkpoint.
      task: Model, data and faults.
      optimizer: What turns gradients into updates.
      record: Called with one row a step and one an evaluation, in order.
      save: Called with the state at every checkpoint, at the last step and on an
        interrupt; all rows up to that step have been recorded by then.
      interrupted: Asked after every step.

    Returns:
      The last state.
    """
    config = task.config
    recorder = StepRecorder(task, optimizer, record)
    for step in range(int(state.step) + 1, config.steps + 1):
        windows = task.batches[step - 1]
        state, metrics = train_step(state, windows, task, optimizer)
        recorder.push(step, metrics)

        last = step == config.steps
        stop = interrupted()
        if last or step % config.eval_every == 0:
            recorder.flush()
            loss = evaluate(state.params, task.validation, graphdef=task.graphdef)
            row = {"step": step, "eval_loss": loss.item()}
            record({"optimizer": optimizer.name, **row})
        if last or stop or step % config.checkpoint_every == 0:
            recorder.flush()
            save(state)
        if stop:
            break
    return state
