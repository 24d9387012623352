"""The loss and the gradient norm of every step of a recorded run, from its log."""

import csv
import json
import math
import pathlib
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event

from trainer.errors import UsageError

STEP = ("step", "_step", "global_step", "iteration", "iter")
LOSS = ("loss", "train_loss", "train/loss", "training_loss", "learning/loss")
NORM = (
    "grad_norm",
    "gradient_norm",
    "train/grad_norm",
    "learning/grad_norm",
    "grad/norm/total",  # Levanter's
    "norm",
)
Row = dict[str, Any]
UNREADABLE = (
    ValueError,
    TypeError,
    RecursionError,
    csv.Error,
    zipfile.BadZipFile,
)


class Log(NamedTuple):
    """The steps of a run. A series that was not recorded at every step is None."""

    steps: np.ndarray
    losses: np.ndarray | None
    norms: np.ndarray | None
    notes: tuple[str, ...] = ()  # what may mislead a reader of the result


def read(
    path: pathlib.Path | str,
    loss: str | None = None,
    norm: str | None = None,
    only: tuple[str, str] | None = None,
) -> Log:
    """Reads the log of one run.

    Args:
      path: The file, or a folder of TensorBoard's event files.
      loss: The column of the losses. None: it is found by its usual names.
      norm: The column of the gradient norms, in the same way.
      only: A column and its value in the rows to read, for a log of several runs.

    Raises:
      UsageError: If the file cannot be read, or has no such column.
    """
    path = pathlib.Path(path)
    try:
        rows = [row for row in rows_of(path) if row]
    except UNREADABLE as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if only is not None:
        rows = [row for row in rows if str(row.get(only[0])) == only[1]]
        if not rows:
            raise UsageError(f"{path} has no row with {'='.join(only)}")
    names = [find(columns, loss, LOSS, path), find(columns, norm, NORM, path)]
    if names == [None, None]:
        raise UsageError(
            f"{path} has no loss and no gradient norm: expected a column"
            f" {', '.join(LOSS[:3])} or {NORM[0]}, found {listed(columns)}"
        )
    taken = merged(rows, find(columns, None, STEP, path), names, path)
    steps = np.array(list(taken))
    notes = []
    for i, name in enumerate(names):
        missing = sum(name not in row for row in taken.values())
        if name is not None and missing:
            notes.append(
                f"{name} is not used: {missing:,} of {len(steps):,} steps have none"
            )
            names[i] = None
    every = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    if every > 1:
        notes.append(f"one step in {every} is recorded, but a guard sees every step")
    losses, norms = (values(taken, name, path) for name in names)
    if losses is None and norms is None:
        reason = "; ".join(notes) or "no loss and no norm in it is finite"
        raise UsageError(f"{path} cannot be used: {reason}")
    return Log(steps, losses, norms, tuple(notes))


def rows_of(path: pathlib.Path) -> Iterable[Row]:
    """Yields the rows of a file, in its order."""
    if path.is_dir() or "tfevents" in path.name:
        return events(path)
    match path.suffix:
        case ".jsonl":
            return list(json_lines(path))
        case ".json":
            match json.loads(path.read_bytes()):
                case {"log_history": [*rows]} if all(isinstance(x, dict) for x in rows):
                    return rows
            raise ValueError("expected a trainer_state.json, with a log_history")
        case ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
            return [{k: v for k, v in row.items() if k and v} for row in rows]
        case ".npz":
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise ValueError("expected a file that numpy.savez wrote")
            with np.load(path) as arrays:
                columns = {k: x.tolist() for k, x in arrays.items() if x.ndim == 1}
            if len({len(x) for x in columns.values()}) > 1:
                raise ValueError("expected arrays of one length")
            rows = zip(*columns.values(), strict=True)
            return [dict(zip(columns, row, strict=True)) for row in rows]
    raise ValueError("expected .jsonl, .json, .csv, .npz or TensorBoard's event files")


def json_lines(path: pathlib.Path) -> Iterator[Row]:
    """Yields the objects of a file, without a last line that was cut short."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            raise ValueError(f"line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield row


def events(path: pathlib.Path) -> Iterator[Row]:
    """Yields the scalars of TensorBoard's event files, one row per event."""
    files = sorted(path.glob("*tfevents*")) if path.is_dir() else [path]
    if not files:
        raise ValueError("the folder has no file events.out.tfevents")
    for file in files:
        data = file.read_bytes()
        start = 0
        while start + 12 < len(data):  # length, its checksum, event, its checksum
            (length,) = struct.unpack_from("<Q", data, start)
            end = start + 12 + length
            if end + 4 > len(data):
                if start == 0:
                    raise ValueError(f"{file.name} is no event file")
                break  # The program that wrote it was killed.
            try:
                event = Event.FromString(data[start + 12 : end])
            except DecodeError as error:
                raise ValueError(f"{file.name} is no event file") from error
            start = end + 4
            scalars = {value.tag: scalar(value) for value in event.summary.value}
            scalars = {tag: x for tag, x in scalars.items() if x is not None}
            if scalars:
                yield {"step": event.step, **scalars}


def scalar(value: Any) -> float | None:
    """Returns the number in a TensorBoard value; None for a picture or histogram."""
    if value.HasField("simple_value"):
        return value.simple_value
    tensor = value.tensor
    kind = {1: "<f4", 2: "<f8"}.get(tensor.dtype)  # DT_FLOAT and DT_DOUBLE
    if kind is None or tensor.tensor_shape.dim:
        return None
    packed = np.frombuffer(tensor.tensor_content, kind).tolist()
    return next(iter([*tensor.float_val, *tensor.double_val, *packed]), None)


def find(
    columns: Sequence[str], given: str | None, usual: Sequence[str], path: pathlib.Path
) -> str | None:
    """Returns the column that was asked for, or the first with a usual name."""
    if given is not None:
        if given not in columns:
            raise UsageError(f"{path} has no column {given}, only {listed(columns)}")
        return given
    lower = {name.lower(): name for name in reversed(columns)}
    return next((lower[name] for name in usual if name in lower), None)


def listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def merged(
    rows: Iterable[Row],
    step_name: str | None,
    names: Sequence[str | None],
    path: pathlib.Path,
) -> dict[int, Row]:
    """Returns the rows with a loss or a norm by their steps, each step once."""
    rows = [row for row in rows if any(name in row for name in names)]
    taken: dict[int, Row] = {}
    for index, row in enumerate(rows, 1):
        step = index
        if step_name is not None:
            try:
                step = int(np.int64(float(row[step_name])))
            except (KeyError, ValueError, TypeError, OverflowError) as error:
                raise UsageError(
                    f"{path}: the column {step_name} has {row.get(step_name)!r},"
                    " expected the number of a step"
                ) from error
        if taken and step < next(reversed(taken)):
            if step <= next(iter(taken)):
                raise UsageError(
                    f"{path} begins again at step {step}: it holds several runs;"
                    f" choose one with --only COLUMN=VALUE{choices(rows)}"
                )
            taken = {s: r for s, r in taken.items() if s < step}
        taken[step] = taken.get(step, {}) | row
    return taken


def choices(rows: Sequence[Row]) -> str:
    """Names the first column with several texts, which may be the names of runs."""
    for name in rows[0]:
        found = {x for row in rows if isinstance(x := row.get(name), str)}
        if len(found) > 1:
            return f", such as {name}={sorted(found)[0]}"
    return ""


def values(
    rows: dict[int, Row], name: str | None, path: pathlib.Path
) -> np.ndarray | None:
    """Returns a column; None if no number in it is finite."""
    if name is None:
        return None
    column = [row[name] for row in rows.values()]
    try:  # A null in JSON stands for NaN or infinity.
        numbers = [math.nan if x is None else float(x) for x in column]
    except OverflowError as error:
        raise UsageError(f"{path}: the column {name} has a number above 1e308") from (
            error
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: the column {name} has no numbers") from error
    with np.errstate(over="ignore"):
        series = np.array(numbers, np.float32)
    return series if np.isfinite(series).any() else None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
