"""Command-line flags: what to train, and on what; mistakes in one line."""

import argparse
import dataclasses
import math
import pathlib
from typing import Any, NoReturn

from trainer.config import (
    COMPUTE_DTYPES,
    EMBEDDINGS,
    INITIALIZATIONS,
    KINDS,
    NORMS,
    OPTIMIZERS,
    REMAT,
    RunConfig,
)
from trainer.hosts import Cluster
from trainer.model import PRESETS
from trainer.sharding import Parallelism


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


def folder(text: str) -> pathlib.Path:
    """Parses the name of a folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a folder, not ''")
    return pathlib.Path(text)


class RunFlags:
    """Adds flags for fields of `RunConfig` to a group of the help.

    A flag that is not given leaves no attribute behind, so that the defaults of a
    preset can fill in, and `--resume` can tell what the user asked for.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str, text: str = ""):
        self._group = parser.add_argument_group(title, text or None)
        self._defaults = {f.name: f.default for f in dataclasses.fields(RunConfig)}

    def add(self, name: str, text: str, flag: str | None = None, **kwargs) -> None:
        default = self._defaults[name]
        if "action" not in kwargs:
            kwargs.setdefault("metavar", name.split("_")[-1].upper())
            if default is not None:
                shown = " ".join(default) if isinstance(default, tuple) else default
                text = f"{text} (default: {shown})"
        self._group.add_argument(
            flag or "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=text,
            **kwargs,
        )

    def alias(self, flag: str, name: str, value: Any, text: str) -> None:
        """A flag that sets a field to one value."""
        self._group.add_argument(
            flag,
            dest=name,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=text,
        )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of `RunConfig`."""
    add_task_flags(RunFlags(parser, "what to train"))
    add_model_flags(RunFlags(parser, "model"))
    add_data_flags(RunFlags(parser, "data"))
    add_optimizer_flags(RunFlags(parser, "optimizer"))
    text = "bursts of three corrupted gradients"
    add_fault_flags(RunFlags(parser, "faults", text))


def add_task_flags(flags: RunFlags) -> None:
    flags.add(
        "optimizers",
        "one or more optimizers, trained one after the other: " + ", ".join(OPTIMIZERS),
        flag="--optimizer",
        nargs="+",
        choices=OPTIMIZERS,
        metavar="NAME",
    )
    flags.add(
        "preset",
        "model and, for 9m to 1b, the settings it was published with: nano (0.03M"
        " parameters), tiny (0.36M), and LLaMA shapes of 9m, 60m, 130m, 350m and 1b"
        " with 512 sequences of 256 tokens a step, bfloat16, full rematerialization,"
        " the optimizer spam and no faults",
        choices=PRESETS,
        type=str.lower,
    )
    flags.add("steps", "optimizer steps for each", type=whole(1))
    flags.add(
        "seed",
        "seed of the first parameters, the order of the batches, the masks of"
        " sparse_spam and the faults",
        type=whole(0),
    )
    flags.add("eval_every", "steps between evaluations", type=whole(1))
    flags.add(
        "eval_sequences",
        "validation sequences to evaluate on, at most",
        type=whole(1),
    )
    flags.add("checkpoint_every", "steps between checkpoints", type=whole(1))
    flags.add("keep_checkpoints", "how many to keep, the newest ones", type=whole(1))


def add_model_flags(flags: RunFlags) -> None:
    flags.add(
        "embedding",
        "plain, scaled (by the root of the width) or normed (by a LayerNorm): the"
        " large shortcut of Spike No More",
        choices=EMBEDDINGS,
    )
    flags.add(
        "initialization",
        "standard (normal, 0.5 over the root of the width), stable (Spike No More; goes"
        " with --embedding scaled or normed) or wesar (every matrix alike, times a"
        " trainable scale that makes it what stable would)",
        choices=INITIALIZATIONS,
        metavar="NAME",
    )
    flags.add(
        "norm",
        "pre (before each sub-layer), scaled (LayerNorm Scaling: that, divided by the"
        " root of the layer's number; not with --initialization stable or wesar) or"
        " mixed (Mix-LN: after the sum in the first quarter of the layers, and at least"
        " in one; before each sub-layer in the others)",
        choices=NORMS,
    )
    flags.add(
        "gated_attention",
        "multiply what the heads put out with a sigmoid gate, of a matrix of its own",
        action=argparse.BooleanOptionalAction,
    )
    flags.add(
        "untied_head",
        "a head of its own rather than the embedding, transposed (9m to 1b: their"
        " default)",
        action=argparse.BooleanOptionalAction,
    )
    flags.add(
        "z_loss",
        "weight of the squared log-partition function in what is minimized; PaLM: 1e-4",
        type=real(),
    )
    flags.add(
        "compute_dtype",
        "dtype of activations: float32 or bfloat16; parameters, gradients and moments"
        " are float32",
        choices=COMPUTE_DTYPES,
    )
    flags.add(
        "remat",
        "what the backward pass computes again rather than keeps: none, dots (all but"
        " matrix products) or full (every layer)",
        choices=REMAT,
    )


def add_data_flags(flags: RunFlags) -> None:
    flags.add(
        "data",
        "a text file, a glob, a folder of *.txt, whose last tenth is the validation"
        " set; or hf:NAME or hf:NAME:CONFIG, a Hugging Face data set, streamed, such as"
        " hf:allenai/c4:en (default: seven plays and the sonnets of Shakespeare, which"
        " come with the example)",
        metavar="SOURCE",
    )
    flags.add(
        "tokenizer",
        "bytes; bpe:8192, trained on the data and kept beside it; a tokenizer.json, or"
        " its folder; or the name of a pretrained one, such as t5-base",
        metavar="NAME",
    )
    flags.add(
        "separator",
        "token between documents (default: the tokenizer's end of text, or else a"
        " line end)",
        metavar="TOKEN",
    )
    flags.add("batch_size", "sequences a step, on all devices", type=whole(1))
    flags.add(
        "accumulate",
        "parts that a batch is computed in, one after the other, to save memory",
        type=whole(1),
        metavar="PARTS",
    )
    flags.add("sequence_length", "tokens in a sequence", type=whole(1))


def add_optimizer_flags(flags: RunFlags) -> None:
    flags.add(
        "learning_rate",
        "peak learning rate, after a linear warm-up and before a cosine decay to a"
        " tenth of it",
        type=real(exclude_low=True),
    )
    flags.add(
        "warmup_steps",
        "steps of that warm-up (default: a tenth of the steps)",
        type=whole(0),
    )
    flags.add(
        "weight_decay",
        "decoupled weight decay (default: 0.1 for adamw and lion, else 0)",
        type=real(),
    )
    flags.add(
        "clip_norm",
        "limit of the gradient's global norm, for the optimizers called clip",
        type=real(exclude_low=True),
    )
    flags.add(
        "threshold",
        "SPAM: a coordinate is a spike where g**2 exceeds this many times its running"
        " mean",
        type=real(exclude_low=True),
    )
    flags.add(
        "reset_interval",
        "SPAM: steps between momentum resets (default: a quarter of the steps)",
        type=whole(2),
    )
    flags.add(
        "density",
        "sparse_spam: fraction of each matrix of attention and feed-forward layers"
        " that has momentum",
        type=real(0, 1, exclude_low=True),
    )
    flags.add(
        "row_blocks",
        "sparse_spam: blocks of rows it draws in, a multiple of the devices that share"
        " the rows of a matrix",
        type=whole(1),
    )


def add_fault_flags(flags: RunFlags) -> None:
    flags.add("bursts", "number of bursts in the run", type=whole(0))
    flags.alias(
        "--no-spikes",
        "bursts",
        0,
        "leave the gradients alone: the same as --bursts 0",
    )
    flags.add(
        "spike_rate",
        "fraction of the gradient's coordinates that a burst hits, 0 to 1",
        type=real(0, 1),
    )
    flags.add(
        "spike_factor",
        "size of a fault: of the noise in units of the tensor's RMS, or the factor",
        type=real(),
    )
    flags.add(
        "spike_kind",
        "what happens to a coordinate: noise (normal, is added), scale (by the factor),"
        " nan or inf (replace it)",
        choices=KINDS,
    )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags for what does not change the numbers, and may change on resuming."""
    group = parser.add_argument_group(
        "devices", "how a step is split; may change on --resume"
    )
    group.add_argument(
        "--data-parallel",
        type=whole(1),
        metavar="N",
        help="parts of the batch (default: as many as devices are left)",
    )
    group.add_argument(
        "--fsdp",
        type=whole(1),
        default=1,
        metavar="N",
        help="parts of the batch whose devices share parameters and optimizer state"
        " (default: 1)",
    )
    group.add_argument(
        "--tensor",
        type=whole(1),
        default=1,
        metavar="N",
        help="parts of every layer's heads and feed-forward width (default: 1)",
    )
    group = parser.add_argument_group(
        "hosts", "start the same command on every one; --output must be the same"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by asking Cloud TPU, Slurm or Open MPI",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="or say where process 0 is,"
    )
    group.add_argument(
        "--num-processes", type=whole(1), metavar="N", help="how many there are"
    )
    group.add_argument(
        "--process-id", type=whole(0), metavar="I", help="and which this is"
    )


def run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `RunConfig` that were given as flags."""
    names = [field.name for field in dataclasses.fields(RunConfig)]
    given = {name: value for name, value in vars(options).items() if name in names}
    if "optimizers" in given:
        given["optimizers"] = tuple(dict.fromkeys(given["optimizers"]))
    return given


def parallelism(options: argparse.Namespace) -> Parallelism:
    return Parallelism(options.data_parallel, options.fsdp, options.tensor)


def cluster(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Cluster:
    """How this process finds the others; all of an address or nothing of it."""
    address = options.coordinator, options.num_processes, options.process_id
    if any(part is not None for part in address):
        if any(part is None for part in address):
            parser.error("--coordinator, --num-processes, --process-id go together")
        if options.distributed:
            parser.error("--distributed finds the --coordinator by itself")
        if options.process_id >= options.num_processes:
            parser.error(
                f"--process-id must be below --num-processes {options.num_processes},"
                f" not {options.process_id}"
            )
    return Cluster(options.distributed, *address)
