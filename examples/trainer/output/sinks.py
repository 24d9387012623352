"""Where the metrics of a run go: metrics.jsonl, TensorBoard and, optionally, wandb.

metrics.jsonl has one JSON object per line. It is a step,

    optimizer, step            from 1
    batch                      number of its batch in the data, from 1; the step, unless
                               batches were left out
    loss                       of this step's batch, before its update; nats per token
    learning_rate
    grad_norm                  global norm of the gradient, fault included
    clipped_grad_norm          of what entered the first moment, after all clipping
    update_norm, param_norm    of the update, and of the parameters after it
    spikes_clipped             coordinates clipped by SPAM in this step
    max_attention_logit        the largest in this step, with --qk-clip
    heads_clipped              heads whose queries and keys were scaled, with --qk-clip
    skipped                    why the guard skipped this step, such as "loss spike";
                               null if it was taken
    steps_above_band           steps in a row whose loss was above its band; with
                               --rewind, else 0
    skipped_steps              number of steps skipped so far
    tensors                    the same norms of every tensor, its spike score (norm
                               over running mean) and the steps so far in which it
                               exceeded 10; tensors.json has the names
    fault                      "gradient" or "batch" if it was corrupted, else null
    tokens_per_second          null where compilation or other work came between
    flops_utilization          of the devices' bfloat16 peak, by the model; null for a
                               device that is not in trainer.hardware

or an evaluation: `optimizer`, `step`, `eval_loss` and `eval_perplexity`. A number that
is not finite is null, because JSON has no NaN or infinity.

When a run goes back to a checkpoint, its rows since then get the number of that rewind
as `rewound`. The row of the rewind has `step`, that of the checkpoint, `rewind`,
`rewound_from`, `reason`, `batches_left_out` and `places`, where the hosts go on in the
data.
"""

import contextlib
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterable
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from trainer import files, hosts
from trainer.config import RunConfig
from trainer.errors import UsageError

Row = dict[str, Any]

TENSORS_EVERY = 10  # steps between the norms of single tensors in TensorBoard, wandb
FLUSH_EVERY = 10  # seconds between writes to TensorBoard's file


def finite(value: Any) -> Any:
    """Returns `value` with None in place of every NaN or infinity."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(part) for key, part in value.items()}
        case list():
            return [finite(part) for part in value]
    return value


def scalars(row: Row, tensor_names: Iterable[str]) -> dict[str, float]:
    """Returns the numbers of a row by the names of their charts.

    TensorBoard and wandb group charts by what stands before the slash, and sort the
    groups: "eval", "train", and one group for each kind of number that every tensor
    has, such as "train_grad_norm". A chart has the numbers of tensors every few steps.
    """
    no_numbers = ("optimizer", "step", "batch", "fault", "skipped", "tensors")
    numbers = {}
    for name, value in row.items():
        if name not in no_numbers:
            is_evaluation = name.startswith("eval_")
            name = name.replace("_", "/", 1) if is_evaluation else f"train/{name}"
            numbers[name] = value
    if "batch" in row:
        numbers["train/batches_left_out"] = row["batch"] - row["step"]
    if "tensors" in row and row["step"] % TENSORS_EVERY == 0:
        for kind, values in row["tensors"].items():
            for name, value in zip(tensor_names, values, strict=True):
                numbers[f"train_{kind}/{name}"] = value
    return {name: value for name, value in numbers.items() if value is not None}


class Metrics:
    """Writes rows, each on disk before the next step begins."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("a", encoding="utf-8", buffering=1)  # 1: line by line

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def __call__(self, row: Row) -> None:
        self._file.write(json.dumps(finite(row), allow_nan=False) + "\n")

    def sync(self) -> None:
        """Waits until what was written would survive a loss of power."""
        os.fsync(self._file.fileno())


class TensorBoard:
    """Writes the numbers of one optimizer's rows as TensorBoard scalars.

    It does not use a SummaryWriter of tensorboardX, whose thread dies when the disk is
    full; the program would then wait for it forever.
    """

    def __init__(
        self, folder: pathlib.Path, first_step: int, tensor_names: Iterable[str]
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._tensor_names = tensor_names
        file_name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = RecordWriter(str(folder / file_name))
        self._next_flush = 0.0
        self._add(0, file_version="brain.Event:2")
        # Hides what was written after the checkpoint from which a run goes on.
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def __call__(self, row: Row) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in scalars(row, self._tensor_names).items()
        ]
        self._add(row["step"], summary=Summary(value=values))

    def _add(self, step: int, **content) -> None:
        now = time.time()
        event = Event(wall_time=now, step=step, **content)
        self._file.write(event.SerializeToString())
        if now > self._next_flush:
            self._file.flush()
            self._next_flush = now + FLUSH_EVERY


class Wandb:
    """Sends the numbers of one optimizer's rows to Weights & Biases.

    The run's id is that of its folder and optimizer: a resumed run goes on there. The
    step is a number among others, because wandb ignores steps that go back, as they do
    when a run is resumed or rewound.
    """

    def __init__(
        self,
        project: str,
        run_id: str,
        config: dict[str, Any],
        tensor_names: Iterable[str],
    ):
        wandb = import_wandb()
        self._tensor_names = tensor_names
        self._run = wandb.init(
            project=project, id=run_id, name=run_id, config=config, resume="allow"
        )
        self._run.define_metric("*", step_metric="step")

    def __enter__(self) -> "Wandb":
        return self

    def __exit__(self, *exception) -> None:
        self._run.finish()

    def __call__(self, row: Row) -> None:
        self._run.log({"step": row["step"], **scalars(row, self._tensor_names)})


def import_wandb():
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            "--wandb needs the package wandb: pip install wandb"
        ) from error
    return wandb


class MetricSinks:
    """Passes the rows of one optimizer to all sinks, on host 0 alone."""

    def __init__(
        self, folder, task, optimizer: str, step: int, progress, wandb_project
    ):
        self._open = contextlib.ExitStack()
        self._writers = []
        self._metrics = None
        if not hosts.is_main():
            return
        names = task.tensor_names
        self._metrics = Metrics(folder.metrics)
        tensorboard = TensorBoard(folder.tensorboard / optimizer, step + 1, names)
        writers = [self._metrics, tensorboard]
        if wandb_project:
            run_id = f"{folder.path.name}-{optimizer}"
            settings = task.config.settings()
            writers.append(Wandb(wandb_project, run_id, settings, names))
        self._writers = [self._open.enter_context(writer) for writer in writers]
        self._writers.append(progress)

    def __enter__(self) -> "MetricSinks":
        return self

    def __exit__(self, kind, *exception) -> None:
        # After an error, a full disk fails again when files are closed.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._open.close()

    def write(self, row: Row) -> None:
        for writer in self._writers:
            writer(row)

    def sync(self) -> None:
        """Waits until all rows so far would survive a loss of power."""
        if self._metrics:
            self._metrics.sync()


def read(path: pathlib.Path) -> list[Row]:
    """Reads the rows of a metrics.jsonl, without a last line that a crash cut short."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            row["optimizer"]
            if not isinstance(row["step"], int):
                raise ValueError(f"its step is {row['step']!r}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}, is damaged: {error}") from error
        rows.append(row)
    return rows


def is_halt(row: Row) -> bool:
    """Returns whether a step was not finite, and not skipped by a guard."""
    values = row["loss"], row["update_norm"]
    is_finite = all(x is not None and math.isfinite(x) for x in values)
    return not is_finite and row["skipped"] is None


def recorded(path: pathlib.Path, optimizer: str, config: RunConfig) -> int:
    """Returns the last step up to which no row of an optimizer is missing."""
    rows = read(path)
    steps = {row["step"] for row in steps_of(rows, optimizer)}
    evaluations = {row["step"] for row in evaluations_of(rows, optimizer)}
    step = 0
    while step + 1 in steps and (
        step + 1 in evaluations or not config.evaluates_at(step + 1)
    ):
        step += 1
    return step


def cut(path: pathlib.Path, optimizer: str, step: int) -> None:
    """Removes an optimizer's rows after the step of its checkpoint.

    Rows that a rewind before that step took back stay.
    """
    rows = read(path)
    rewinds = {r["rewind"] for r in rewinds_of(rows, optimizer) if r["step"] <= step}
    kept = (
        row
        for row in rows
        if row["optimizer"] != optimizer
        or (row["rewound"] in rewinds if "rewound" in row else row["step"] <= step)
    )
    write(path, kept)


def rewind(path: pathlib.Path, row: Row) -> None:
    """Adds the row of a rewind, and marks the optimizer's rows after its step."""
    rows = read(path)
    for other in rows:
        is_taken_back = other["step"] > row["step"] and "rewound" not in other
        if other["optimizer"] == row["optimizer"] and is_taken_back:
            other["rewound"] = row["rewind"]
    write(path, [*rows, row])


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Replaces the rows of a metrics.jsonl."""
    files.replace(
        path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    )


def steps_of(rows: Iterable[Row], optimizer: str) -> list[Row]:
    """Returns the training steps of one optimizer, in order."""
    return [row for row in kept_of(rows, optimizer) if "loss" in row]


def evaluations_of(rows: Iterable[Row], optimizer: str) -> list[Row]:
    """Returns the evaluations of one optimizer, in order."""
    return [row for row in kept_of(rows, optimizer) if "eval_loss" in row]


def kept_of(rows: Iterable[Row], optimizer: str) -> list[Row]:
    """Returns the rows of one optimizer that no rewind took back."""
    return [r for r in rows if r["optimizer"] == optimizer and "rewound" not in r]


def taken_back(rows: Iterable[Row], optimizer: str) -> list[Row]:
    """Returns the training steps of one optimizer that rewinds took back."""
    return [
        row
        for row in rows
        if row["optimizer"] == optimizer and "rewound" in row and "loss" in row
    ]


def rewinds_of(rows: Iterable[Row], optimizer: str) -> list[Row]:
    """Returns the rewinds of one optimizer, in order."""
    return [row for row in kept_of(rows, optimizer) if "rewind" in row]
