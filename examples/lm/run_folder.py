"""The folder of a run: what lies where, and how a run begins or continues."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from lm import corpus, records
from lm.config import KINDS, OPTIMIZERS, RunConfig, UsageError
from lm.model import PRESETS


class RunFolder:
    """Paths inside the folder of one run."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.picture = path / "spike_suppression.png"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    def create(self, config: RunConfig, text: bytes) -> None:
        """Makes the folder and writes config.json; never over another run."""
        if any(p.exists() for p in (self.config, self.metrics, self.checkpoints)):
            raise UsageError(
                f"{self.path} already holds a run: continue it with --resume, or"
                " choose another folder with --output"
            )
        content = {**dataclasses.asdict(config), "data_sha256": digest(text)}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            records.replace(self.config, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise UsageError(
                f"cannot write to the output folder {self.path}: {error.strerror}"
            ) from error

    def read_config(self) -> tuple[RunConfig, str]:
        """The configuration of the run, and the digest of its text."""
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
            text_digest = content.pop("data_sha256")
            content["optimizers"] = tuple(content["optimizers"])
            config = RunConfig(**content)
            check_fields(config)
            return config, text_digest
        except OSError as error:
            raise UsageError(
                f"there is no run to resume in {self.path}: {error.strerror}"
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{self.config} is damaged: {error}") from error


def check_fields(config: RunConfig) -> None:
    """Raises ValueError if a field is not what a flag could have made it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        allowed = {int: int, float: int | float, str: str, tuple: tuple}
        kind = allowed.get(type(field.default), str | int | None)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{field.name} cannot be {value!r}")
    for value, known in (
        ((config.model,), PRESETS),
        (config.optimizers, OPTIMIZERS),
        ((config.spike_kind,), KINDS),
    ):
        for name in value:
            if name not in known:
                raise ValueError(f"unknown name {name!r}")


def begin(folder: RunFolder, given: dict[str, Any]) -> tuple[RunConfig, bytes]:
    """Starts a run with the settings `given`; the rest are defaults."""
    config = RunConfig(**given)
    text = load_text(config)
    check_lengths(config, text)
    folder.create(config, text)
    return config, text


def resume(folder: RunFolder, given: dict[str, Any]) -> tuple[RunConfig, bytes]:
    """Continues the run in `folder`; settings may be repeated, not changed."""
    config, text_digest = folder.read_config()
    for name, value in given.items():
        if value != (stored := getattr(config, name)):
            raise UsageError(
                f"cannot resume {folder.path} with {name} = {shown(value)}: the run"
                f" was started with {shown(stored)}"
            )
    text = load_text(config)
    if digest(text) != text_digest:
        raise UsageError(
            f"cannot resume {folder.path}: its data file has changed since"
        )
    return config, text


def load_text(config: RunConfig) -> bytes:
    """The text to train on."""
    path = corpus.SHAKESPEARE if config.data is None else pathlib.Path(config.data)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read the data file {config.data}: {error.strerror}"
        ) from error
    if not text:
        raise UsageError(f"the data file {config.data} is empty")
    return text


def check_lengths(config: RunConfig, text: bytes) -> None:
    """Checks that both parts of the text hold a sequence."""
    needed = config.sequence_length + 1
    for part, tokens in corpus.split(text)._asdict().items():
        if len(tokens) < needed:
            raise UsageError(
                f"the text is too short: its {part} part has {len(tokens)} bytes, one"
                f" sequence of {config.sequence_length} and its next byte take {needed}"
            )


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else f"{value}"
