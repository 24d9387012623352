"""Count the gradient spikes of small language models, after SPAM's investigation.

    python examples/spike_census.py

trains five models with Adam, each on two texts with two batch sizes, and scores every
coordinate of every gradient. On two idle CPU cores it takes about 20 minutes.

    llama          RMSNorm, SwiGLU, rotary positions
    llama-scaled   the same, its embedding multiplied by the square root of the width
    llama-normed   the same, its embedding followed by a LayerNorm
    gpt2           LayerNorm, biases, learned positions, GELU
    hawk           no attention: gated linear recurrences, as in Griffin

A coordinate spikes in a step where its gradient spike score |g| / mean |g| exceeds 50.
The mean is over all steps of the run, so it exists only at the end. Every run is
therefore made twice, bit for bit the same. Gradients are never stored, and the memory
does not grow with the steps. The spikes by SPAM's own score, g**2 / v > 5000, are
counted as well. A score cannot exceed the number of steps, so short runs have smaller
scores.

The results show how often and how far gradients spike, in which tensors and in which
steps, whether steps with spikes have higher losses (with a test against chance), and
how the scale of the embedding changes this. The program writes to the folder --output:

    census.md       the tables
    summary.json    their numbers
    overview.png    loss and number of spikes over the steps, for all runs
    heat_maps/      one figure per run: tensor by step
    runs/           one record per run, with the counts of every tensor in every step

A run whose record exists is not repeated. So after Ctrl-C the same command continues,
and a command with more models, texts or batch sizes adds to the folder. Tables and
figures show the runs of the last command.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Sequence

import jax

from studies import engine
from studies.spike_census import counting, figures, statistics, tables
from studies.spike_census.study import (
    HEAD_WIDTH,
    MODELS,
    TEXTS,
    Record,
    Setting,
    SpikeCensus,
)
from trainer import cli, files
from trainer.errors import UsageError

BATCH_SIZES = (4, 16)
EXAMPLES = """\
examples:
  everything, about 20 minutes        spike_census.py
  two minutes: one model, one text    spike_census.py --models llama --texts shakespeare
                                        --batch-sizes 4 --steps 300 --output runs/quick
  only the embeddings                 spike_census.py --models llama llama-scaled
                                        llama-normed
  your own text, and a BPE of it      spike_census.py --texts book.txt
                                        --tokenizer bpe:1024 --output runs/book
  a rate at which the loss jumps      spike_census.py --learning-rate 0.02
                                        --output runs/high_rate
"""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("spike_census.py", __doc__, EXAMPLES)
    add_grid_flags(parser.add_argument_group("which runs: every combination of"))
    add_setting_flags(parser.add_argument_group("settings of all runs"))
    parser.add_argument(
        "--output",
        type=cli.folder,
        default=pathlib.Path("runs/spike_census"),
        metavar="FOLDER",
        help="folder to write to, and to continue in (default: %(default)s)",
    )
    return parser


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
        help="sequences per step (default: 4 16)",
    )


def add_setting_flags(group) -> None:
    def add(name: str, text: str, **kwargs) -> None:
        default = getattr(Setting(), name)
        flag = "--" + name.replace("_", "-")
        text = f"{text} (default: {default})"
        metavar = name.split("_")[-1].upper()
        group.add_argument(flag, default=default, help=text, metavar=metavar, **kwargs)

    whole = cli.whole
    fewest = int(counting.GSS_THRESHOLD) + 1
    add(
        "steps",
        f"steps of each run, at least {fewest}, since no score can exceed their number",
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
        "width of the residual stream, a multiple of the width of a head, which is"
        f" {HEAD_WIDTH}",
        type=whole(HEAD_WIDTH),
    )
    add("seed", "seed of parameters and batches", type=whole(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: see `engine.exit_code`."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    return engine.exit_code(parser, lambda: take_census(options))


def take_census(options: argparse.Namespace) -> list[engine.Failure]:
    """Trains the missing runs and writes tables and figures of all of them."""
    study, runs, folder = SpikeCensus(), grid(options), options.output
    failures = engine.run_all(study, runs, folder / "runs")
    found = engine.read_all(study, runs, folder / "runs")
    report([record for record in found if record is not None], folder)
    return failures


def grid(options: argparse.Namespace) -> list[Setting]:
    """Returns the runs; raises UsageError if two would have the same name."""
    if options.width % HEAD_WIDTH:
        raise UsageError(
            f"--width must be a multiple of {HEAD_WIDTH}, not {options.width}"
        )
    common = {
        name: getattr(options, name)
        for name in ("steps", "learning_rate", "tokenizer", "sequence_length")
        + ("layers", "width", "seed")
    }
    combinations = itertools.product(options.texts, options.batch_sizes, options.models)
    settings = [
        Setting(model=model, text=text, batch_size=batch_size, **common)
        for text, batch_size, model in dict.fromkeys(combinations)
    ]
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise UsageError("two of the --texts have the same file name")
    return settings


def report(made: Sequence[Record], folder: pathlib.Path) -> None:
    """Writes tables, numbers and figures, and prints the tables."""
    if not made:
        return
    summaries = {x.setting.name: statistics.summarize(x) for x in made}
    content = {"jax": jax.__version__, "runs": summaries}
    files.replace(folder / "summary.json", json.dumps(content, indent=1) + "\n")
    found = tables.tables(made, list(summaries.values()))
    files.replace(folder / "census.md", tables.to_markdown(found))
    (folder / "heat_maps").mkdir(exist_ok=True)
    for record in made:
        path = folder / "heat_maps" / f"{record.setting.name}.png"
        figures.heat_map(record).savefig(path)
    figures.overview(made).savefig(folder / "overview.png")
    tables.show(found)
    print(f"Tables, figures and records are in {folder}")


if __name__ == "__main__":
    cli.exit_with(main)
