"""Runs a study: a grid of training runs, each of which leaves one record.

A record is a JSON file with the settings of its run and the results. A run whose record
exists is not repeated. So a study that was interrupted or killed continues where it
stopped, and a larger grid only adds the runs that are new.

To make a new study, write a subclass of `Study`. A run is any value that can be hashed
and pickled:

    class Rates(engine.Study):
        '''How fast does gradient descent on x ** 2 go, at each learning rate?'''

        def settings(self, run):  # what varies
            return {"learning_rate": run}

        def program(self, run):  # all runs share one compiled program
            return "descent"

        def compile(self, run):  # how a run is compiled and stepped
            step = jax.jit(lambda x, rate: x - rate * 2 * x)

            def train(run, progress):
                x, losses = 1.0, []
                for number in range(100):
                    x = step(x, run)
                    losses.append(float(x**2))
                    progress((number + 1) / 100)
                return {"losses": losses}  # what is recorded

            return train

The program then makes the missing records and reports all of them:

    failures = engine.run_all(Rates(), grid, folder, workers=2)
    records = engine.read_all(Rates(), grid, folder)

`comparison` and `spike_census` are two studies, and `compare.py` and `spike_census.py`
are their programs.
"""

import abc
import argparse
import concurrent.futures
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import rich.progress

from trainer import files
from trainer.errors import UsageError

Record = dict[str, Any]
Progress = Callable[[float], None]  # takes the finished fraction of a run
Train = Callable[[Any, Progress], Record]  # takes a run

POLL_SECONDS = 0.5  # between two looks at the records of the other processes


class Study(abc.ABC):
    """Describes the runs of a study. It is copied to the processes that train."""

    @abc.abstractmethod
    def settings(self, run: Any) -> dict[str, Any]:
        """Returns all settings that decide the numbers of a run, as JSON values."""

    @abc.abstractmethod
    def compile(self, run: Any) -> Train:
        """Compiles the program of a run.

        Returns a function that trains a run with the same `program`, and that returns
        its results as JSON values. A run that cannot be finished raises an exception.
        """

    def program(self, run: Any) -> Hashable:
        """Returns a key: runs with equal keys share what `compile` returned."""
        return run

    def name(self, run: Any) -> str:
        """Returns the name of the record's file, different for different settings."""
        return digest(self.settings(run))

    def data_digest(self, run: Any) -> str:
        """Returns a text that changes when the data of a run do."""
        del run
        return ""

    def decode(self, record: Record) -> Any:
        """Converts a record that was read.

        Raises AttributeError, KeyError, TypeError or ValueError if it is damaged.
        """
        return record


class Failure(NamedTuple):
    """A run that ended with an exception."""

    name: str
    message: str


def digest(settings: dict[str, Any]) -> str:
    """Returns twelve hexadecimal digits that depend on all settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_json(values: Any, digits: int | None = None) -> Any:
    """Converts an array to lists of numbers, with None for each non-finite number.

    Args:
      values: An array of any shape.
      digits: Significant digits of each number. None keeps all.
    """

    def number(x):
        if not math.isfinite(x):
            return None
        return x if digits is None else float(f"{x:.{digits}g}")

    def convert(x):
        return [convert(y) for y in x] if isinstance(x, list) else number(x)

    return convert(np.asarray(values).tolist())


# ------------------------------------------------------------------------ the records


def record_path(study: Study, run: Any, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{study.name(run)}.json"


def time_written(path: pathlib.Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def error_path(study: Study, run: Any, folder: pathlib.Path) -> pathlib.Path:
    """Returns where the traceback of a failed run is kept until the run succeeds."""
    return folder / f"{study.name(run)}.error.txt"


def read(study: Study, run: Any, folder: pathlib.Path) -> Any:
    """Returns the decoded record of a run, or None if there is none.

    A record of other settings or other data does not count. Settings that were added or
    removed since it was written are not compared.

    Raises:
      UsageError: If the file is damaged.
    """
    path, data = record_path(study, run, folder), study.data_digest(run)
    settings = study.settings(run)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        recorded = record["settings"].items()
        if any(settings.get(name, value) != value for name, value in recorded):
            return None
        return study.decode(record) if record.get("digest", data) == data else None
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged: remove it to run it again ({error})"
        ) from error


def read_all(study: Study, runs: Sequence[Any], folder: pathlib.Path) -> list[Any]:
    """Returns what `read` returns for each run."""
    return [read(study, run, folder) for run in runs]


# --------------------------------------------------------------------------- the runs


def run_all(
    study: Study, runs: Sequence[Any], folder: pathlib.Path, workers: int = 1
) -> list[Failure]:
    """Makes the records that are missing, and shows the progress.

    A run that raises an exception does not end the others. Its traceback is written
    beside the records, and the next call tries it again.

    Args:
      study: The study.
      runs: The grid of runs. A run that occurs twice is made once.
      folder: The folder of the records.
      workers: The number of processes that train, each on one core. With 1 this process
        trains.

    Returns:
      The runs that failed.

    Raises:
      UsageError: If a run raises it. A mistake of the user ends the study at once.
      KeyboardInterrupt: After Ctrl-C or SIGTERM. The processes have ended then.
      BrokenProcessPool: If one of the processes was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = list(dict.fromkeys(runs))
    missing = [run for run in runs if read(study, run, folder) is None]
    make = run_here if workers == 1 else run_in_processes
    # SIGTERM ends the program as Ctrl-C does. Otherwise the processes would go on.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ProgressBar(len(runs), len(runs) - len(missing)) as bar:
            return make(study, missing, folder, workers, bar)
    finally:
        signal.signal(signal.SIGTERM, before)


def run_here(study, runs, folder, workers, bar) -> list[Failure]:
    """Trains in this process, one run after the other."""
    del workers
    failures = []
    for group in by_program(study, runs).values():
        for run, failure in run_group(study, group, folder, bar.advance):
            bar.finish(study.name(run) + (" failed" if failure else ""))
            failures += [failure] if failure else []
    return failures


def run_in_processes(study, runs, folder, workers, bar) -> list[Failure]:
    """Trains in several processes, one program in each at a time."""
    groups = shared_out(list(by_program(study, runs).values()), workers)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(groups)) or 1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin_worker,
    )
    paths = {study.name(run): record_path(study, run, folder) for run in runs}
    before = {name: time_written(path) for name, path in paths.items()}
    waiting = {pool.submit(failures_of, study, group, folder) for group in groups}
    failures = []
    try:
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, POLL_SECONDS)
            for name in list(before):
                if time_written(paths[name]) != before[name]:
                    del before[name]
                    bar.finish(name)
            for future in done:
                failures += future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # at once: a group is many runs
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failures


def by_program(study: Study, runs: Sequence[Any]) -> dict[Hashable, list[Any]]:
    groups = {}
    for run in runs:
        groups.setdefault(study.program(run), []).append(run)
    return groups


def shared_out(groups: list[list[Any]], workers: int) -> list[list[Any]]:
    """Splits groups where there are fewer than workers.

    Each part compiles its program again, so they stay whole otherwise.
    """
    if len(groups) >= workers:
        return groups
    size = math.ceil(sum(map(len, groups)) / workers) or 1
    return [
        group[start : start + size]
        for group in groups
        for start in range(0, len(group), size)
    ]


def begin_worker() -> None:
    """Prepares a process that trains, which only the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_main_process, daemon=True).start()
    # Two small programs side by side are faster than one that uses two cores.
    os.environ["NPROC"] = "1"


def end_with_main_process() -> None:
    """Ends this process when the main one is killed. It would go on otherwise."""
    multiprocessing.parent_process().join()
    os._exit(1)


def failures_of(study: Study, runs: Sequence[Any], folder) -> list[Failure]:
    """Trains the runs of one program in a process of its own."""
    made = run_group(study, runs, folder, lambda fraction: None)
    return [failure for _, failure in made if failure]


def run_group(
    study: Study, runs: Sequence[Any], folder: pathlib.Path, progress: Progress
) -> Iterator[tuple[Any, Failure | None]]:
    """Compiles one program and makes the records of its runs."""
    train = None
    for run in runs:
        error_file = error_path(study, run, folder)
        try:
            train = train or study.compile(run)
            record = {
                "settings": study.settings(run),
                "digest": study.data_digest(run),
                **train(run, progress),
            }
            text = json.dumps(record, allow_nan=False)
        except UsageError:
            raise
        except Exception as error:
            files.replace(error_file, traceback.format_exc())
            message = f"{type(error).__name__}: {error} (see {error_file})"
            yield run, Failure(study.name(run), message)
        else:
            files.replace(record_path(study, run, folder), text + "\n")
            error_file.unlink(missing_ok=True)
            yield run, None


class ProgressBar:
    """Shows a bar on a terminal, and elsewhere one line per finished run."""

    def __init__(self, runs: int, finished: int):
        self._runs, self._finished = runs, finished
        self._is_terminal = sys.stdout.isatty()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            disable=not self._is_terminal,
        )
        self._task = self._bar.add_task("runs", total=runs, completed=finished)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def advance(self, fraction: float) -> None:
        """Shows the finished fraction of the current run."""
        self._bar.update(self._task, completed=self._finished + fraction)

    def finish(self, name: str) -> None:
        """Shows that a run has ended."""
        self._finished += 1
        self.advance(0)
        if not self._is_terminal:
            print(f"{self._finished} of {self._runs}: {name}", flush=True)


# ------------------------------------------------------------------------ the program


def exit_code(parser: argparse.ArgumentParser, work: Callable[[], list[Failure]]):
    """Calls `work`, prints its errors in one line each, and returns the exit code.

    The code is 0 after success, 1 if a run failed or a file cannot be used, 2 after a
    mistake of the user, and 130 after Ctrl-C.
    """
    try:
        failures = work()
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        parser.exit(1, f"{parser.prog}: error: {where}{error.strerror}\n")
    except BrokenProcessPool:
        parser.exit(
            1,
            f"{parser.prog}: error: a worker was killed, perhaps for lack of memory:"
            " repeat the command with fewer --workers to continue\n",
        )
    except KeyboardInterrupt:
        print(
            "Interrupted: finished runs are kept, repeat the command to continue",
            file=sys.stderr,
        )
        return 130
    for failure in failures:
        message = " ".join(failure.message.split())
        print(f"{parser.prog}: error: {failure.name}: {message}", file=sys.stderr)
    return 1 if failures else 0
