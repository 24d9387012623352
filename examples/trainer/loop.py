"""The loop around the training step, and the rows that it records."""

import math
import time
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from trainer import data, hosts, metrics, sharding, train_step
from trainer.checkpoints import DataPosition
from trainer.config import RunConfig
from trainer.data import shards
from trainer.errors import DataError, UsageError
from trainer.optimizers import Optimizer
from trainer.output.sinks import Row, is_halt
from trainer.train_step import Task, TrainState

BATCHES_AT_ONCE = 4  # that a host takes, if there are several hosts


class Halted(UsageError):
    """Reports a step that was not finite; training stopped at the state before it."""


class DataLost(DataError):
    """Reports that no batch could be read for a step; the state before is saved."""


class Rewind(Exception):
    """Reports that the run goes back to a checkpoint, from the step of a row."""

    def __init__(self, step: int, row: Row, place: DataPosition):
        super().__init__()
        self.step = step  # of the checkpoint
        self.row = row
        self.place = place  # in the data, after that row


class StepRecorder:
    """Turns device metrics into rows, one step behind the device.

    Fetching a value waits until it is computed. One step later it is there already, and
    the device need not wait for the host.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        record: Callable[[Row], None],
        left_out: int,
    ):
        self._config = task.config
        self._left_out = left_out
        self._optimizer = optimizer
        self._record = record
        self._flops_utilization = metrics.flops_utilization(
            task.model, task.config.sequence_length, task.mesh
        )
        self._pending = None
        self._last_time = None  # None: the time of the next step includes other work
        self.halted: Row | None = None  # the row of a step that was not finite
        self.last: Row = {"steps_above_band": 0}

    def push(self, step: int, measured: metrics.Metrics) -> None:
        """Takes the metrics of `step` and records those of the step before."""
        self._record_pending()
        self._pending = step, measured

    def flush(self) -> None:
        """Records what is pending; call it before other work than steps."""
        self._record_pending()
        self._last_time = None

    def _record_pending(self) -> None:
        if self._pending is None or self.halted:
            return
        step, measured = self._pending
        self._pending = None
        measured = jax.tree.map(np.ndarray.tolist, jax.device_get(measured))
        measured["skipped"] = metrics.reason_text(measured["skipped"])
        speed = self._tokens_per_second()
        number = step + self._left_out
        self.last = row = {
            "optimizer": self._optimizer.name,
            "step": step,
            "batch": number,
            **measured,
            "fault": fault(self._config, step, number),
            "tokens_per_second": speed,
            "flops_utilization": speed and self._flops_utilization(speed),
        }
        self._record(row)
        if is_halt(row):
            self.halted = row

    def _tokens_per_second(self) -> float | None:
        now = time.perf_counter()
        before, self._last_time = self._last_time, now
        return None if before is None else self._config.tokens_per_step / (now - before)


def fault(config: RunConfig, step: int, number: int) -> str | None:
    """Returns what a fault corrupts in a step with the batch `number`."""
    if step in config.fault_steps:
        return "gradient"
    return "batch" if number in config.bad_batch_numbers else None


def fetched(
    batches: grain.DatasetIterator,
) -> Iterator[tuple[np.ndarray, DataPosition]]:
    """Yields this host's batches, each with the place in the data after it.

    Several hosts take a few batches at a time and then exchange how many they got,
    since every exchange waits for the devices.

    Raises:
      DataError: On every host, at the same batch, if one of them cannot read it.
    """
    together = BATCHES_AT_ONCE if jax.process_count() > 1 else 1
    while True:
        taken, problem = [], ""
        try:
            while len(taken) < together:
                batch = next(batches)
                taken.append((batch, batches.get_state()))
        except UsageError as error:
            problem = str(error)
        except Exception as error:  # from reading or encoding in Grain's thread
            problem = f"cannot read the data: {shards.reason(error)}"
        count, problem = min(map(tuple, hosts.gather([len(taken), problem])))
        yield from taken[:count]
        if problem:
            raise DataError(problem)


def train(
    state: TrainState,
    task: Task,
    optimizer: Optimizer,
    batches: grain.DatasetIterator,
    *,
    record: Callable[[Row], None],
    save: Callable[[TrainState, DataPosition], None],
    stop: Callable[[int], bool],
    rewind_to: Callable[[int], int | None] = lambda step: None,
    left_out: int = 0,
) -> TrainState:
    """Trains from `state` to the last step of the run, or until `stop`.

    Args:
      state: Where to start: a first state, or a restored checkpoint.
      task: Model, data and faults.
      optimizer: The optimizer.
      batches: This host's batches, from the one after `state`'s on.
      record: Called with one row a step and one an evaluation, in order.
      save: Called with the state, and the place of `batches` that goes with it, at
        every checkpoint, at the last step, when stopped or halted; all rows up to that
        step have been recorded by then.
      stop: Called after every step with its number; returns whether to stop.
      rewind_to: Called with the first step that went wrong; returns the step of a
        checkpoint before it to go back to, or None to go on.
      left_out: Number of batches that were left out before.

    Returns:
      The last state.

    Raises:
      Halted: If a loss or an update was not finite.
      DataLost: If a host could not read its part of a batch.
      Rewind: If the loss was above its band for too long, or a step was not finite,
        and there is a checkpoint to go back to.
    """
    config = task.config
    recorder = StepRecorder(task, optimizer, record, left_out)
    host = data.Host(jax.process_index(), jax.process_count())

    def rewind_if_needed():
        row = recorder.last
        if recorder.halted or row["steps_above_band"] == config.rewind_after:
            first_bad = row["step"] + 1 - max(1, row["steps_above_band"])
            if (target := rewind_to(first_bad)) is not None:
                raise Rewind(target, row, places[row["step"]])

    first = int(state.step) + 1
    places = {first - 1: batches.get_state()}
    fetching = fetched(batches)
    for step in range(first, config.steps + 1):
        try:
            batch, places[step] = next(fetching)
        except DataError as error:
            recorder.flush()
            save(state, places[int(state.step)])
            if recorder.halted:
                raise Halted(halt_message(recorder.halted, task, optimizer)) from error
            kept = f"step {step - 1} is saved" if step > 1 else "nothing is saved yet"
            raise DataLost(
                f"{optimizer.name}: no batch for step {step}, {kept}: {error}"
            ) from error
        number = step + left_out
        if number in config.bad_batch_numbers:
            tokens = data.random_batch(config, task.model.vocabulary, number, host)
            batch = tokens.astype(batch.dtype)
        batch = sharding.put_batch(batch, task.mesh)
        state, measured = train_step.train_step(
            state,
            batch,
            graphdef=task.graphdef,
            faults=task.faults,
            watch=task.watch,
            optimizer=optimizer,
            z_loss=config.z_loss,
        )
        recorder.push(step, measured)
        places.pop(step - 3, None)  # a halt is noticed one step late

        last, stopped = step == config.steps, stop(step)
        due = {
            "evaluation": config.evaluates_at(step),
            "checkpoint": last or stopped or step % config.checkpoint_every == 0,
        }
        if any(due.values()):
            recorder.flush()
        rewind_if_needed()
        if recorder.halted:
            save(state, places[int(state.step)])
            raise Halted(halt_message(recorder.halted, task, optimizer))
        if due["evaluation"]:
            record(evaluation(state, step, task, optimizer))
        # A checkpoint with a loss above its band is not one to go back to.
        is_good = recorder.last["steps_above_band"] == 0
        if due["checkpoint"] and (is_good or last or stopped):
            save(state, places[step])
        if stopped:
            break
    return state


def evaluation(state: TrainState, step: int, task: Task, optimizer: Optimizer) -> Row:
    loss = train_step.evaluate(
        state.params, task.validation, graphdef=task.graphdef
    ).item()
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {
        "optimizer": optimizer.name,
        "step": step,
        "eval_loss": loss,
        "eval_perplexity": perplexity,
    }


def halt_message(row: Row, task: Task, optimizer: Optimizer) -> str:
    """Names the failed step, the tensor with the worst gradient, and what to try."""
    what = "update" if math.isfinite(row["loss"]) else "loss"
    scores = np.array(row["tensors"]["spike_score"])  # infinite if not finite
    worst = int(np.argmax(np.nan_to_num(scores, nan=np.inf)))
    norm = row["tensors"]["grad_norm"][worst]
    size = (
        f"norm {norm:.3g}, {scores[worst]:.3g} x its running mean"
        if math.isfinite(norm)
        else "not finite"
    )
    help_from = ", or ".join(suggested_flags(task.config, optimizer))
    return (
        f"{optimizer.name}: the {what} of step {row['step']} is not finite; worst"
        f" gradient: {task.tensor_names[worst]} ({size}). The state of"
        f" step {row['step'] - 1} is kept. Try {help_from}"
    )


def suggested_flags(config: RunConfig, optimizer: Optimizer) -> Iterator[str]:
    """Yields flags that may help and are not in use."""
    yield "a lower --learning-rate"
    if not optimizer.is_guarded:
        yield "--guard"
    if optimizer.name != "clip_spam":
        yield "--optimizer clip_spam"
    if config.model.initialization == "standard" and config.model.norm != "scaled":
        yield "--initialization stable --embedding scaled"
