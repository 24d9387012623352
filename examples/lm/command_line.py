"""Command-line flags that describe a `RunConfig`, and one-line errors."""

import argparse
import dataclasses
import math
from typing import Any, NoReturn

from lm.config import KINDS, OPTIMIZERS, RunConfig
from lm.model import PRESETS


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def whole(low: int, high: int = 2**31 - 1):
    """Parses a whole number from `low` to `high`, by default what fits an int32."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            bound = f">= {low}" if value < low else f"<= {high}"
            raise argparse.ArgumentTypeError(
                f"must be a whole number {bound}, not {text!r}"
            )
        return value

    return parse


def real(low: float = 0.0, high: float = math.inf, *, exclude_low: bool = False):
    """Parses a finite number in [low, high], or in (low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        above = value > low if exclude_low else value >= low
        if not (above and value <= high and math.isfinite(value)):
            bound = f"{'>' if exclude_low else '>='} {low:g}"
            if high < math.inf:
                bound += f" and <= {high:g}"
            raise argparse.ArgumentTypeError(
                f"must be a finite number {bound}, not {text!r}"
            )
        return value

    return parse


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of `RunConfig`.

    A flag that is not given leaves no attribute behind, so that `--resume` can tell
    what the user asked for from what is a default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}

    def add(group, flag, name, text, **kwargs):
        default = defaults[name]
        kwargs.setdefault("metavar", name.split("_")[-1].upper())
        if default is not None:
            shown = " ".join(default) if isinstance(default, tuple) else f"{default}"
            text = f"{text} (default: {shown})"
        group.add_argument(
            flag, dest=name, default=argparse.SUPPRESS, help=text, **kwargs
        )

    group = parser.add_argument_group("what to train")
    add(
        group,
        "--optimizer",
        "optimizers",
        "one or more optimizers, trained one after the other",
        nargs="+",
        choices=OPTIMIZERS,
        metavar="NAME",
    )
    add(
        group,
        "--model",
        "model",
        "model size: nano (0.03M parameters), tiny (0.36M), small (4.8M) or base (25M)",
        choices=PRESETS,
    )
    add(group, "--steps", "steps", "optimizer steps for each", type=whole(1))
    add(
        group,
        "--learning-rate",
        "learning_rate",
        "peak learning rate, after a warm-up over a tenth of the steps and before a"
        " cosine decay to a tenth of it",
        type=real(exclude_low=True),
    )
    add(
        group,
        "--batch-size",
        "batch_size",
        "sequences in a batch",
        type=whole(1),
    )
    add(
        group,
        "--sequence-length",
        "sequence_length",
        "bytes in a sequence",
        type=whole(1),
    )
    add(
        group,
        "--data",
        "data",
        "a text file; its last tenth is the validation set (default: seven plays and"
        " the sonnets of Shakespeare, which come with the example)",
        metavar="FILE",
    )
    add(
        group,
        "--seed",
        "seed",
        "seed of the first parameters, the order of the batches and the faults",
        type=whole(0),
    )
    add(group, "--eval-every", "eval_every", "steps between evaluations", type=whole(1))
    add(
        group,
        "--eval-sequences",
        "eval_sequences",
        "validation sequences to evaluate on, at most",
        type=whole(1),
    )
    add(
        group,
        "--checkpoint-every",
        "checkpoint_every",
        "steps between checkpoints",
        type=whole(1),
    )

    group = parser.add_argument_group("faults", "bursts of three corrupted gradients")
    add(group, "--bursts", "bursts", "number of bursts in the run", type=whole(0))
    group.add_argument(
        "--no-spikes",
        dest="bursts",
        action="store_const",
        const=0,
        default=argparse.SUPPRESS,
        help="leave the gradients alone: the same as --bursts 0",
    )
    add(
        group,
        "--spike-rate",
        "spike_rate",
        "fraction of the gradient's coordinates that a burst hits, 0 to 1",
        type=real(0, 1),
    )
    add(
        group,
        "--spike-factor",
        "spike_factor",
        "size of a fault: of the noise in units of the tensor's RMS, or the factor",
        type=real(),
    )
    add(
        group,
        "--spike-kind",
        "spike_kind",
        "what happens to a coordinate: noise (normal, is added), scale (by the factor),"
        " nan or inf (replace it)",
        choices=KINDS,
    )

    group = parser.add_argument_group("SPAM")
    add(
        group,
        "--threshold",
        "threshold",
        "a coordinate is a spike where g**2 exceeds this many times its running mean",
        type=real(exclude_low=True),
    )
    add(
        group,
        "--reset-interval",
        "reset_interval",
        "steps between momentum resets (default: a quarter of the steps)",
        type=whole(2),
    )


def run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `RunConfig` that were given as flags."""
    names = [field.name for field in dataclasses.fields(RunConfig)]
    given = {name: value for name, value in vars(options).items() if name in names}
    if "optimizers" in given:
        given["optimizers"] = tuple(dict.fromkeys(given["optimizers"]))
    return given
