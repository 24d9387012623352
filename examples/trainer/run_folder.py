"""The folder of a run: what lies where, and how a run begins or continues."""

import argparse
import dataclasses
import fcntl
import json
import os
import pathlib
from typing import Any, NamedTuple, NoReturn

from trainer import command_line
from trainer.config import RunConfig, UsageError, complete
from trainer.output import records


class Run(NamedTuple):
    """What config.json holds."""

    config: RunConfig
    checkpoints: str | None  # a folder or a bucket; None: beside config.json
    data_digest: str | None = None  # of text and tokenizer; None: not yet known

    def to_json(self) -> str:
        """As config.json has it: the settings, and the rest beside them."""
        rest = {"checkpoints": self.checkpoints, "data_digest": self.data_digest}
        return json.dumps({**dataclasses.asdict(self.config), **rest}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Run":
        content = json.loads(text)
        rest = content.pop("checkpoints"), content.pop("data_digest")
        content["optimizers"] = tuple(content["optimizers"])
        config = RunConfig(**content)
        check_fields(config)
        return cls(config, *rest)


class RunFolder:
    """Paths inside the folder of one run."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.tensors = path / "tensors.json"
        self.summary = path / "summary.json"
        self.picture = path / "spike_suppression.png"
        self.report = path / "report.html"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self._lock: int | None = None

    def create(self, run: Run) -> None:
        """Makes the folder and writes config.json; never over another run."""
        try:
            if any(p.exists() for p in (self.config, self.metrics, self.checkpoints)):
                raise UsageError(
                    f"{self.path} already holds a run: continue it with --resume, or"
                    " choose another folder with --output"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            records.replace(self.config, run.to_json())
        except OSError as error:
            raise UsageError(
                f"cannot write to the output folder {self.path}: {error.strerror}"
            ) from error

    def read(self) -> Run:
        """The run that was begun here."""
        try:
            run = Run.from_json(self.config.read_text(encoding="utf-8"))
            if not isinstance(run.data_digest, str):
                raise ValueError(f"data_digest cannot be {run.data_digest!r}")
            return run
        except OSError as error:
            raise UsageError(
                f"there is no run to resume in {self.path}: {error.strerror}"
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{self.config} is damaged: {error}") from error

    def write_tensor_names(self, names: tuple[str, ...]) -> None:
        """What the lists in the rows of metrics.jsonl are of."""
        records.replace(self.tensors, json.dumps(names) + "\n")

    def lock(self) -> None:
        """Keeps other programs from continuing this run, until `close`."""
        self._lock = os.open(self.config, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another program is running in {self.path}: wait for it, or choose"
                " another folder with --output"
            ) from error
        except OSError:
            pass  # some network file systems know no locks

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class FlagReader(argparse.ArgumentParser):
    """Raises ValueError for a mistake, rather than ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def check_fields(config: RunConfig) -> None:
    """Raises ValueError if a field is not what a flag could have made it."""
    reader = FlagReader(allow_abbrev=False)
    command_line.add_run_flags(reader)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and field.default is None:
            continue
        made = vars(reader.parse_args(flags_of(field.name, value)))[field.name]
        made = tuple(made) if isinstance(value, tuple) else made
        if value != made or isinstance(value, bool) != isinstance(made, bool):
            raise ValueError(f"{field.name} cannot be {value!r}")


def flags_of(name: str, value: Any) -> list[str]:
    """What to write on the command line for a field's value."""
    if name == "optimizers":
        return ["--optimizer", *map(str, value)]
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={value}"]


def begin(folder: RunFolder, given: dict[str, Any], checkpoints: str | None) -> Run:
    """A run with the settings `given`; the rest are defaults. Nothing is written."""
    del folder
    return Run(complete(given), checkpoints)


def resume(folder: RunFolder, given: dict[str, Any], checkpoints: str | None) -> Run:
    """The run in `folder`; settings may be repeated, not changed."""
    run = folder.read()
    folder.lock()
    for name, value in given.items():
        if value != (stored := getattr(run.config, name)):
            raise UsageError(
                f"cannot resume {folder.path} with {name} = {shown(value)}: the run"
                f" was started with {shown(stored)}"
            )
    return run._replace(checkpoints=checkpoints or run.checkpoints)


def enter(folder: RunFolder, run: Run, data_digest: str) -> Run:
    """Creates the folder of a new run; checks that an old one has its data still."""
    if run.data_digest is None:
        run = run._replace(data_digest=data_digest)
        folder.create(run)
        folder.lock()
    elif run.data_digest != data_digest:
        raise UsageError(
            f"cannot resume {folder.path}: its data or tokenizer has changed since"
        )
    return run


def shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else f"{value}"
