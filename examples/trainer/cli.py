"""Flags of the command line, which reports a mistake in one line."""

import argparse
import dataclasses
import io
import math
import os
import pathlib
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from trainer import optimizers
from trainer.config import RunConfig
from trainer.hosts import Cluster
from trainer.model import PRESETS, ModelConfig
from trainer.settings import OneOf, Real, Switch, Whole, declared
from trainer.sharding import Parallelism


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse_args(
        self, arguments: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        for argument in arguments:
            try:
                argument.encode()
            except UnicodeEncodeError:  # no checkpoint or report could be written
                self.error(f"{argument!r} must be UTF-8")
        return super().parse_args(arguments, namespace)


def exit_with(main: Callable[[], int]) -> None:
    """Runs a program's `main` and exits with its code.

    If the reader of the output has gone, as after `| head`, the program ends quietly
    with the code 141, as after SIGPIPE. Names that the encoding of the output lacks are
    escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = main()
        except SystemExit as stop:  # from argparse
            code = stop.code
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        # Python would complain about the rest of the output, which nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _reader_has_gone() -> bool:
    """Returns whether the standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def make_parser(name: str, description: str | None, examples: str) -> Parser:
    """Makes the parser of one of the example programs."""
    return Parser(
        prog=name,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parses(accepted: Any):
    """Makes a parser of the values that `accepted` describes, as `Whole(1)` does."""

    def parse(text: str) -> Any:
        try:
            return accepted.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def whole(low: int, high: int = 2**31 - 1):
    """Makes a parser of whole numbers from `low` to `high`."""
    return parses(Whole(low, high))


def real(low: float = 0.0, high: float = math.inf, *, exclude_low: bool = False):
    """Makes a parser of finite numbers in [low, high], or in (low, high]."""
    return parses(Real(low, high, exclude_low))


def folder_or_bucket(text: str) -> str:
    """Parses the name of a folder or of a bucket."""
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a folder, not ''")
    return text


def folder(text: str) -> pathlib.Path:
    """Parses the name of a folder, which need not exist."""
    if os.path.isfile(folder_or_bucket(text)):
        raise argparse.ArgumentTypeError(f"must be a folder, and {text!r} is a file")
    return pathlib.Path(text)


class SettingFlags:
    """Adds flags for settings of `RunConfig` to a group of the help.

    A flag that is not given leaves no attribute behind. So a preset can fill in its own
    defaults, and `--resume` can compare those that the user gave.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str, text: str = ""):
        self._group = parser.add_argument_group(title, text or None)
        self._fields = {**declared(RunConfig), **declared(ModelConfig)}

    def add(self, name: str, text: str, flag: str | None = None, **kwargs) -> None:
        """Adds a flag; its parser, choices and default are those of the setting."""
        if name in self._fields:
            accepted = self._fields[name].metadata["accepted"]
            default = self._fields[name].default
            if default is dataclasses.MISSING:
                default = "that of the preset"
            if isinstance(accepted, Switch):
                kwargs["action"] = argparse.BooleanOptionalAction
            elif isinstance(accepted, OneOf):
                kwargs.setdefault("choices", accepted.names)
            elif hasattr(accepted, "parse"):
                kwargs["type"] = parses(accepted)
        else:
            default = RunConfig().settings()[name]
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
        """Adds a flag that sets a setting to one value."""
        self._group.add_argument(
            flag,
            dest=name,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=text,
        )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each setting of `RunConfig`."""
    add_task_flags(SettingFlags(parser, "what to train"))
    add_model_flags(SettingFlags(parser, "model"))
    add_data_flags(SettingFlags(parser, "data"))
    add_optimizer_flags(SettingFlags(parser, "optimizer"))
    text = "bursts of three corrupted gradients, or of three batches of random tokens"
    add_fault_flags(SettingFlags(parser, "faults", text))


def add_task_flags(flags: SettingFlags) -> None:
    flags.add(
        "optimizers",
        "one or more optimizers, trained one after the other: "
        + ", ".join(optimizers.TABLE),
        flag="--optimizer",
        nargs="+",
        choices=optimizers.TABLE,
        metavar="NAME",
    )
    flags.add(
        "preset",
        "model and, for 9m to 1b, the settings it was published with: nano (0.03M"
        " parameters), tiny (0.36M), and LLaMA shapes of 9m, 60m, 130m, 350m and 1b"
        " with 512 sequences of 256 tokens per step, bfloat16, full rematerialization,"
        " the optimizer spam and no faults",
        choices=PRESETS,
        type=str.lower,
    )
    flags.add("steps", "optimizer steps for each optimizer")
    flags.add(
        "seed",
        "seed of the first parameters, the order of the batches, the masks of"
        " sparse_spam and the faults",
    )
    flags.add("eval_every", "steps between evaluations")
    flags.add("eval_sequences", "largest number of validation sequences to evaluate on")
    flags.add("checkpoint_every", "steps between checkpoints")
    flags.add("keep_checkpoints", "number of checkpoints to keep, the newest ones")


def add_model_flags(flags: SettingFlags) -> None:
    flags.add("layers", "number of layers, each attention and a feed-forward layer")
    flags.add("width", "width of the residual stream, a multiple of twice the heads")
    flags.add("heads", "attention heads")
    flags.add("ffn_width", "inner width of the feed-forward layers")
    flags.add(
        "embedding",
        "plain, scaled (by the square root of the width) or normed (by a LayerNorm);"
        " the last two are the large shortcut of Spike No More",
    )
    flags.add(
        "initialization",
        "standard (normal, 0.5 over the square root of the width), stable (Spike No"
        " More; use it with --embedding scaled or normed) or wesar (all matrices are"
        " drawn with the same deviation, and a trainable factor scales each to that of"
        " stable)",
        metavar="NAME",
    )
    flags.add(
        "norm",
        "pre (before each sub-layer), scaled (LayerNorm Scaling: pre, divided by the"
        " square root of the layer's number; not with --initialization stable or wesar)"
        " or mixed (Mix-LN: after the sum in the first quarter of the layers, at least"
        " in one, and before each sub-layer in the others)",
    )
    flags.add(
        "gated_attention",
        "multiply the outputs of the heads by a sigmoid gate, which has its own matrix",
    )
    flags.add("qk_norm", "normalize the queries and keys of each head by an RMSNorm")
    flags.add(
        "attention_softcap",
        "limit on the size of attention's logits: cap * tanh(x / cap); Gemma 2: 50",
        metavar="CAP",
    )
    flags.add(
        "logit_softcap",
        "the same for the logits of the next token; Gemma 2: 30",
        metavar="CAP",
    )
    flags.add(
        "qk_clip",
        "scale the queries and keys of heads whose largest attention logit exceeds"
        " this, after each step; Kimi K2: 100",
        metavar="THRESHOLD",
    )
    flags.add(
        "untied_head",
        "give the head its own matrix instead of the transposed embedding (the default"
        " of 9m to 1b)",
    )
    flags.add(
        "z_loss",
        "weight of the squared log-partition function in the objective; PaLM: 1e-4",
    )
    flags.add(
        "compute_dtype",
        "dtype of activations: float32 or bfloat16; parameters, gradients and moments"
        " are float32",
    )
    flags.add(
        "quantize",
        "round the weights and activations of the linear layers in the blocks: none,"
        " int8, int4, fp4 (E2M1) or fp4_e1m2; a simulation, which saves nothing",
        metavar="FORMAT",
    )
    flags.add(
        "quantize_group",
        "inputs of a layer that share a scale, at least 4; a layer whose number of"
        " inputs is not a multiple has one scale for all of them",
        metavar="N",
    )
    flags.add(
        "remat",
        "activations that the backward pass computes again instead of keeping them:"
        " none, dots (all but matrix products) or full (every layer)",
    )


def add_data_flags(flags: SettingFlags) -> None:
    flags.add(
        "data",
        "a text file, a glob, or a folder of *.txt, whose last tenth is the validation"
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
        "token between documents (default: the tokenizer's end-of-text token, or else a"
        " line end)",
        metavar="TOKEN",
    )
    flags.add("batch_size", "sequences per step, on all devices")
    flags.add(
        "accumulate",
        "number of parts in which a batch is computed, one after the other, to save"
        " memory",
        metavar="PARTS",
    )
    flags.add("sequence_length", "tokens per sequence")


def add_optimizer_flags(flags: SettingFlags) -> None:
    flags.add(
        "learning_rate",
        "peak learning rate, after a linear warm-up and before a cosine decay to a"
        " tenth of it",
    )
    flags.add("warmup_steps", "steps of that warm-up (default: a tenth of the steps)")
    flags.add(
        "weight_decay",
        "decoupled weight decay (default: 0.1 for adamw and lion, else 0)",
    )
    flags.add(
        "clip_norm",
        "limit on the gradient's global norm, for the optimizers called clip",
    )
    flags.add(
        "threshold",
        "SPAM: a coordinate is a spike if g**2 exceeds this many times its running"
        " mean",
    )
    flags.add(
        "reset_interval",
        "SPAM: steps between momentum resets (default: a quarter of the steps)",
    )
    flags.add(
        "guard",
        "skip the steps whose loss or gradient norm is a spike or not finite: put"
        " skip_spikes around the optimizer (the default of 9m to 1b)",
    )
    flags.add(
        "rewind",
        "go back to the last good checkpoint, and leave out the batches since, when the"
        " loss stays far above its recent median or a step is not finite; at most N"
        " times for each optimizer",
        metavar="N",
    )
    flags.add(
        "rewind_after",
        "steps in a row with a loss above its band after which --rewind goes back; the"
        " band is that of skip_spikes",
        metavar="STEPS",
    )
    flags.add(
        "density",
        "sparse_spam: fraction of each matrix of attention and feed-forward layers"
        " that has momentum",
    )
    flags.add(
        "row_blocks",
        "sparse_spam: number of blocks of rows in which it draws its masks, a multiple"
        " of the devices that share the rows of a matrix",
    )


def add_fault_flags(flags: SettingFlags) -> None:
    flags.add("bursts", "number of bursts in the run")
    flags.alias(
        "--no-spikes",
        "bursts",
        0,
        "corrupt nothing: the same as --bursts 0",
    )
    flags.add(
        "bad_batches",
        "number of times that three batches are random tokens (default: half of"
        " --bursts)",
    )
    flags.add(
        "spike_rate", "fraction of the gradient's coordinates that a burst hits, 0 to 1"
    )
    flags.add(
        "spike_factor",
        "size of a fault: for noise in units of the tensor's RMS, for scale the factor",
    )
    flags.add(
        "spike_kind",
        "how a coordinate is corrupted: noise (normal noise is added), scale (it is"
        " multiplied by the factor), nan or inf (it is replaced)",
    )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags that do not change the numbers, and may change on resuming."""
    count = whole(1)
    group = parser.add_argument_group(
        "devices", "how the devices share a step; may change on --resume"
    )
    group.add_argument(
        "--data-parallel",
        type=count,
        metavar="N",
        help="parts of the batch on devices that each have all parameters (default: all"
        " devices that the next two flags leave)",
    )
    group.add_argument(
        "--fsdp",
        type=count,
        default=1,
        metavar="N",
        help="parts of the batch on devices that share parameters and optimizer state"
        " (default: 1)",
    )
    group.add_argument(
        "--tensor",
        type=count,
        default=1,
        metavar="N",
        help="parts of every layer's heads and feed-forward width (default: 1)",
    )
    group = parser.add_argument_group(
        "hosts", "start the same command on every host; --output must be the same"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other hosts through Cloud TPU, Slurm or Open MPI",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, instead of --distributed",
    )
    group.add_argument(
        "--num-processes", type=count, metavar="N", help="number of processes"
    )
    group.add_argument(
        "--process-id",
        type=whole(0),
        metavar="I",
        help="number of this process, from 0",
    )


def run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of `RunConfig` that were given as flags."""
    names = RunConfig().settings()
    given = {name: value for name, value in vars(options).items() if name in names}
    if "optimizers" in given:
        given["optimizers"] = tuple(dict.fromkeys(given["optimizers"]))
    return given


def parallelism(options: argparse.Namespace) -> Parallelism:
    return Parallelism(options.data_parallel, options.fsdp, options.tensor)


def cluster(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Cluster:
    """Returns how this process finds the others; an address must be complete."""
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
