"""The folder of a run: its files, and how a run begins or is resumed."""

import fcntl
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax

from trainer import files
from trainer.config import RunConfig
from trainer.errors import UsageError


class Run(NamedTuple):
    """The content of config.json."""

    config: RunConfig
    checkpoints: str | None  # a folder or a bucket; None: beside config.json
    hosts: int  # that began it; a streamed data set continues on as many
    data_digest: str | None = None  # of text and tokenizer; None before they are read

    def to_json(self) -> dict[str, Any]:
        """Returns the settings and the other fields as one JSON object."""
        rest = self._asdict()
        return {**rest.pop("config").settings(), **rest}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Run":
        """Makes a run of what `to_json` returned.

        Raises:
          UsageError, KeyError: If it is not complete or has a wrong value.
        """
        if not isinstance(content, dict):
            raise UsageError(f"must be a JSON object, not {content!r}")
        given = dict(content)
        rest = {name: given.pop(name) for name in cls._fields[1:]}
        for name in ("checkpoints", "data_digest"):
            if not isinstance(rest[name], str | None):
                raise UsageError(f"{name} must be a text, not {rest[name]!r}")
        if not isinstance(rest["hosts"], int) or rest["hosts"] < 1:
            raise UsageError(f"hosts must be a number, not {rest['hosts']!r}")
        if unknown := sorted(given.keys() - RunConfig().settings().keys()):
            raise UsageError(f"there is no setting {unknown[0]!r}")
        if isinstance(given["optimizers"], list):  # JSON has no tuples
            given["optimizers"] = tuple(given["optimizers"])
        return cls(RunConfig.from_settings(**given), **rest)


class RunFolder:
    """Paths inside the folder of one run, and the lock on it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.tensors = path / "tensors.json"
        self.summary = path / "summary.json"
        self.figure = path / "spike_suppression.png"
        self.report = path / "report.md"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self._lock: int | None = None

    def open(self, run: Run, data_digest: str) -> None:
        """Creates the folder of a new run; checks that the data of an old one is there.

        Raises:
          UsageError: If the folder cannot be written, another run is in it, or the data
            of the run has changed.
        """
        if run.data_digest is None:
            self.create(run._replace(data_digest=data_digest))
            self.lock()
        elif run.data_digest != data_digest:
            raise UsageError(
                f"cannot resume {self.path}: its data or tokenizer has changed since"
            )

    def create(self, run: Run) -> None:
        """Makes the folder and writes config.json, but never over another run."""
        try:
            if any(p.exists() for p in (self.config, self.metrics, self.checkpoints)):
                raise UsageError(
                    f"{self.path} already holds a run: continue it with --resume, or"
                    " choose another folder with --output"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            files.replace(self.config, json.dumps(run.to_json(), indent=2) + "\n")
        except OSError as error:
            raise UsageError(
                f"cannot write to the output folder {self.path}: {error.strerror}"
            ) from error

    def read(self) -> Run:
        """Returns the run that was begun in this folder."""
        try:
            run = Run.from_json(json.loads(self.config.read_text(encoding="utf-8")))
            if run.data_digest is None:
                raise UsageError("data_digest must be a text, not None")
            return run
        except OSError as error:
            raise UsageError(
                f"there is no run to resume in {self.path}: {error.strerror}"
            ) from error
        except KeyError as error:
            raise UsageError(
                f"{self.config} is damaged, or of another version of this program: it"
                f" has no {error}"
            ) from error
        # JSON and UTF-8 raise ValueError, and deeply nested JSON RecursionError.
        except (UsageError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.config} is damaged: {error}") from error

    def write_tensor_names(self, names: tuple[str, ...]) -> None:
        """Writes the names that belong to the lists in metrics.jsonl."""
        files.replace(self.tensors, json.dumps(names) + "\n")

    def lock(self) -> None:
        """Keeps other programs from continuing this run until `close` is called."""
        self._lock = os.open(self.config, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another program is running in {self.path}: wait for it, or choose"
                " another folder with --output"
            ) from error
        except OSError:
            pass  # some network file systems have no locks

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def new_run(given: dict[str, Any], checkpoints: str | None) -> Run:
    """Makes a run of the settings `given`; the other settings are defaults."""
    return Run(RunConfig.from_settings(**given), checkpoints, jax.process_count())


def load_run(folder: RunFolder, given: dict[str, Any], checkpoints: str | None) -> Run:
    """Reads the run in `folder` and locks it.

    Raises:
      UsageError: If a setting in `given` differs from that of the run.
    """
    run = folder.read()
    folder.lock()
    stored = run.config.settings()
    for name, value in given.items():
        if value != stored[name]:
            raise UsageError(
                f"cannot resume {folder.path} with {name} = {shown(value)}: the run"
                f" was started with {shown(stored[name])}"
            )
    return run._replace(checkpoints=checkpoints or run.checkpoints)


def shown(value: Any) -> str:
    """Formats the value of a setting for a message or a table."""
    return " ".join(value) if isinstance(value, tuple) else f"{value}"
