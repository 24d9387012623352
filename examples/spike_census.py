"""Count the gradient spikes of small language models: SPAM's investigation, in small.

    python examples/spike_census.py

trains five models with Adam, each on two texts with two batch sizes, and looks at
every coordinate of every gradient. On two idle CPU cores it takes about 20 minutes.

    llama          RMSNorm, SwiGLU, rotary positions
    llama-scaled   the same, its embedding multiplied by the square root of the width
    llama-normed   the same, its embedding followed by a LayerNorm
    gpt2           LayerNorm, biases, learned positions, GELU
    hawk           no attention: gated linear recurrences, as in Griffin

A coordinate spikes in a step where its gradient spike score |g| / mean |g| exceeds 50,
with the mean over all steps of the run. That mean is known only afterwards, so every
run is made twice, bit for bit the same; gradients are never stored, and the memory does
not grow with the steps. The score SPAM uses while training, g**2 / v > 5000, is counted
beside it. A score cannot exceed the number of steps, so short runs have smaller ones.

What it answers: how often and how far gradients spike, in which tensors, in which
steps, whether steps with spikes go with loss bumps (with a test against chance), and
what the scale of the embedding changes. The folder --output holds

    census.md       the tables
    summary.json    their numbers
    overview.png    loss and number of spikes over the steps, all runs
    heat_maps/      a picture a run: tensor by step
    runs/           a file a run, with the counts of every tensor in every step

A run whose file is there is not run again: after Ctrl-C the same command goes on, and
one with more models, texts or batch sizes adds to the folder. Tables and pictures are
of the runs that the command names.
"""

import argparse
import itertools
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from studies.spike_census import census, census_analysis, census_pictures, census_report
from studies.spike_census.census import HEAD_WIDTH, MODELS, TEXTS, Setting
from studies.spike_census.census_analysis import Record
from trainer import cli, files
from trainer.errors import UsageError
from trainer.output import console

DEFAULT = Setting()
BATCH_SIZES = (4, 16)
EXAMPLES = """\
examples:
  everything, about 20 minutes        spike_census.py
  two minutes: one model, one text    spike_census.py --models llama --texts shakespeare
                                        --batch-sizes 4 --steps 300 --output runs/quick
  only what the embedding changes     spike_census.py --models llama llama-scaled
                                        llama-normed
  your own text, and a BPE of it      spike_census.py --texts book.txt
                                        --tokenizer bpe:1024 --output runs/book
  a rate at which losses do bump      spike_census.py --learning-rate 0.02
                                        --output runs/high_rate
"""


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error message, and what it read."""
    parser = cli.Parser(
        prog="spike_census.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_grid_flags(parser.add_argument_group("which runs: every combination of"))
    add_setting_flags(parser.add_argument_group("what all runs have in common"))
    parser.add_argument(
        "--output",
        type=cli.folder,
        default=pathlib.Path("runs/spike_census"),
        metavar="FOLDER",
        help="folder to write to, and to continue in (default: runs/spike_census)",
    )
    return parser, parser.parse_args(arguments)


def add_grid_flags(group) -> None:
    group.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        metavar="NAME",
        help=f"models, from {', '.join(MODELS)} (default: all)",
    )
    group.add_argument(
        "--texts",
        nargs="+",
        default=list(TEXTS),
        metavar="TEXT",
        help="texts: shakespeare, prose (16.7 MB of public-domain prose and verse), or"
        " the path of a text file, which may be packed as .xz (default: both)",
    )
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        type=cli.whole(1),
        default=list(BATCH_SIZES),
        metavar="N",
        help="sequences a step (default: 4 16)",
    )


def add_setting_flags(group) -> None:
    def add(name: str, text: str, **kwargs) -> None:
        default = getattr(DEFAULT, name)
        flag = "--" + name.replace("_", "-")
        text = f"{text} (default: {default})"
        metavar = name.split("_")[-1].upper()
        group.add_argument(flag, default=default, help=text, metavar=metavar, **kwargs)

    whole = cli.whole
    fewest = int(census.GSS_THRESHOLD) + 1
    add(
        "steps",
        f"steps of each run, at least {fewest}: no score can exceed their number",
        type=whole(fewest),
    )
    rate = cli.real(exclude_low=True)
    add(
        "learning_rate",
        "peak rate, after a warm-up of a tenth of the steps and before a cosine to a"
        " tenth of it",
        type=rate,
    )
    add("tokenizer", "bytes, or bpe:SIZE, a BPE trained on the text")
    add("sequence_length", "tokens of a sequence", type=whole(2))
    add("layers", "residual blocks", type=whole(1))
    add(
        "width",
        f"of the residual stream, a multiple of {HEAD_WIDTH}, the width of a head",
        type=whole(HEAD_WIDTH),
    )
    add("seed", "of parameters and batches", type=whole(0))


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Every run that was asked for; raises UsageError if two would share a file."""
    if options.width % HEAD_WIDTH:
        raise UsageError(
            f"--width must be a multiple of {HEAD_WIDTH}, not {options.width}"
        )
    common = {
        name: getattr(options, name)
        for name in ("steps", "learning_rate", "tokenizer", "sequence_length")
        + ("layers", "width", "seed")
    }
    grid = itertools.product(options.texts, options.batch_sizes, options.models)
    settings = list(
        dict.fromkeys(
            Setting(model=model, text=text, batch_size=batch_size, **common)
            for text, batch_size, model in grid
        )
    )
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise UsageError("two of the --texts have the same file name")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 130 after Ctrl-C."""
    parser, options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        settings = settings_of(options)
        folder = options.output
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
            made = list(run_all(settings, folder))
            report(made, folder)
        except OSError as error:
            where = error.filename or folder
            raise UsageError(f"cannot write {where}: {error.strerror}") from error
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        there = sum(run_file(folder, setting).exists() for setting in settings)
        again = shlex.join(["python", "examples/spike_census.py", *map(str, given)])
        console.log(
            f"Interrupted. {there} of {len(settings)} runs are finished, in {folder}."
            f" Continue with: {again}"
        )
        return 130
    return 0


def run_file(folder: pathlib.Path, setting: Setting) -> pathlib.Path:
    return folder / "runs" / f"{setting.name}.json"


def run_all(settings: Sequence[Setting], folder: pathlib.Path) -> Iterator[Record]:
    """The record of every run, read if it is there, else made and written."""
    names = dict.fromkeys((setting.text, setting.tokenizer) for setting in settings)
    texts = {name: census.load_text(*name) for name in names}
    tasks = [(setting, texts[setting.text, setting.tokenizer]) for setting in settings]
    for setting, text in tasks:  # so that a mistake shows before the work
        census.check_length(setting, text)
        read(run_file(folder, setting), setting, text)
    with Progress(len(settings)) as progress:
        for setting, text in tasks:
            path = run_file(folder, setting)
            record = read(path, setting, text)
            if record is None:
                record = run(setting, text, progress)
                files.replace(path, json.dumps(record.to_json()) + "\n")
            progress.finish(record)
            yield record


def read(path: pathlib.Path, setting: Setting, text: census.Text) -> Record | None:
    """What `path` holds, or None if there is no such file.

    Raises UsageError if it is damaged or of another run.
    """
    if not path.exists():
        return None
    try:
        record = Record.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is damaged: remove it to run it again ({error})"
        ) from error
    if (record.setting, record.digest) != (setting, text.digest):
        raise UsageError(
            f"{path} is of a run with {difference(record.setting, setting)}: choose"
            " another --output"
        )
    return record


def difference(found: Setting, wanted: Setting) -> str:
    """In words."""
    for name in vars(found):
        old, new = getattr(found, name), getattr(wanted, name)
        if old != new:
            return f"{name.replace('_', ' ')} {old}, not {new}"
    return "another text"


def run(setting: Setting, text: census.Text, progress: "Progress") -> Record:
    """Trains once to know the mean gradient, and again to compare with it."""
    task = census.make_task(setting, text)
    progress.start(setting)
    counted = census.count_spikes(task, progress.step)
    counts = {
        name: census_analysis.rounded(table) if name.endswith("max") else table
        for name, table in counted.counts.items()
    }
    return Record(
        setting,
        text.digest,
        census.tensor_sizes(task.params),
        counted.halted_at,
        counted.losses.astype(np.float64),
        counts,
    )


class Progress:
    """On a terminal a bar for all runs and one for this; elsewhere a line a run."""

    def __init__(self, runs: int):
        self._runs = runs
        self._finished = 0
        self._began = time.monotonic()
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            disable=not sys.stdout.isatty(),
        )
        self._all = self._bars.add_task("runs", total=runs)
        self._this = None

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bars.stop()

    def start(self, setting: Setting) -> None:
        self._began = time.monotonic()
        self._this = self._bars.add_task(setting.name, total=2 * setting.steps)

    def step(self) -> None:
        self._bars.advance(self._this)

    def finish(self, record: Record) -> None:
        self._finished += 1
        if self._this is None:
            took = "was there"
        else:
            took = f"{time.monotonic() - self._began:.0f} s"
            self._bars.remove_task(self._this)
            self._this = None
        self._bars.advance(self._all)
        self._bars.console.print(
            f"{self._finished}/{self._runs} {record.setting.name}:"
            f" {record.spikes().sum():,} spikes, last loss {record.loss[-1]:.3f}"
            f" ({took})",
            highlight=False,
            soft_wrap=True,
        )


def report(made: Sequence[Record], folder: pathlib.Path) -> None:
    """Writes tables and pictures, and shows the tables."""
    summaries = [census_analysis.summarize(record) for record in made]
    tables = census_report.tables(made, summaries)
    summary = json.dumps(summary_of(made, summaries), indent=1)
    files.replace(folder / "summary.json", summary + "\n")
    sections = (table.to_markdown() for table in tables)
    page = "\n".join(["# Census of gradient spikes\n", *sections])
    files.replace(folder / "census.md", page)
    (folder / "heat_maps").mkdir(exist_ok=True)
    for record in made:
        picture = folder / "heat_maps" / f"{record.setting.name}.png"
        census_pictures.heat_map(record).savefig(picture)
    census_pictures.overview(made).savefig(folder / "overview.png")
    width = None if sys.stdout.isatty() else 170
    shown = rich.console.Console(width=width)
    for table in tables:
        shown.print(table.to_rich())
        shown.print(table.note + "\n", highlight=False)
    print(f"Tables, pictures and the counts of every run are in {folder}")


def summary_of(made: Sequence[Record], summaries: Sequence[dict]) -> dict[str, Any]:
    return {
        "jax": jax.__version__,
        "runs": {
            record.setting.name: summary
            for record, summary in zip(made, summaries, strict=True)
        },
    }


if __name__ == "__main__":
    sys.exit(main())
