"""Records of a run: metrics.jsonl and TensorBoard events.

metrics.jsonl has one JSON object a line: a step,

    optimizer, step            from 1
    loss                       of this step's batch, before its update; nats per byte
    learning_rate
    grad_norm                  global norm of the gradient, fault included
    clipped_grad_norm          of what entered the first moment, after all clipping
    spikes_clipped             coordinates clipped by SPAM in this step
    fault                      whether this step's gradient was corrupted
    tokens_per_second          null where compilation or other work came between

or an evaluation: `optimizer`, `step` and `eval_loss`. JSON knows no NaN or infinity:
a number that is not finite is null.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import tensorboardX

from lm.config import UsageError

Row = dict[str, Any]

SCALARS = (
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "clipped_grad_norm",
    "spikes_clipped",
    "tokens_per_second",
)


def finite(value: Any) -> Any:
    """`value`, or None in place of a NaN or an infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Metrics:
    """Writes rows, each on disk before the next step begins."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("a", encoding="utf-8", buffering=1)  # 1: line by line

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def __call__(self, row: Row) -> None:
        clean = {name: finite(value) for name, value in row.items()}
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Waits until what was written would survive a loss of power."""
        os.fsync(self._file.fileno())


class TensorBoard:
    """Writes the numbers of one optimizer's rows as TensorBoard scalars."""

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._writer = tensorboardX.SummaryWriter(
            str(folder), purge_step=first_step, flush_secs=10
        )

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception) -> None:
        self._writer.close()

    def __call__(self, row: Row) -> None:
        for name in SCALARS:
            if row.get(name) is not None:
                self._writer.add_scalar(name, row[name], row["step"])


def tee(*writers: Callable[[Row], None]) -> Callable[[Row], None]:
    """One function that hands a row to all `writers`, in order."""

    def write(row: Row) -> None:
        for writer in writers:
            writer(row)

    return write


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            row["optimizer"], row["step"]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}, line {number}, is damaged: {error}") from error
        rows.append(row)
    return rows


def keep(path: pathlib.Path, wanted: Callable[[Row], bool]) -> None:
    """Rewrites a metrics.jsonl with the `wanted` rows only."""
    rows = filter(wanted, read(path))
    replace(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def check_complete(
    path: pathlib.Path, optimizer: str, steps: int, evaluations: int
) -> None:
    """Raises `UsageError` unless all rows up to an optimizer's checkpoint are there."""
    rows = read(path)
    has = len(steps_of(rows, optimizer)), len(evaluations_of(rows, optimizer))
    if has != (steps, evaluations):
        raise UsageError(
            f"{path} holds {has[0]} steps and {has[1]} evaluations of {optimizer}, its"
            f" checkpoint {steps} and {evaluations}: start again in another folder"
        )


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or, if the program is killed, not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def steps_of(rows: Iterable[Row], optimizer: str) -> list[Row]:
    """The training steps of one optimizer, in order."""
    return [row for row in rows if row["optimizer"] == optimizer and "loss" in row]


def evaluations_of(rows: Iterable[Row], optimizer: str) -> list[Row]:
    """The evaluations of one optimizer, in order."""
    return [row for row in rows if row["optimizer"] == optimizer and "eval_loss" in row]
