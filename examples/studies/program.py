"""The command line that the programs of all tasks share."""

import argparse
import os
import pathlib
from collections.abc import Sequence

from studies import engine, task
from studies.comparison import report, variants
from trainer import cli, optimizers
from trainer.config import RunConfig


def add_flags(
    parser: argparse.ArgumentParser,
    base: RunConfig,
    labels: Sequence[str],
    rates: Sequence[float],
    folder: str,
) -> None:
    """Adds the flags of optimizers, learning rates, seeds and processes."""
    known = sorted({*optimizers.TABLE, *variants.VARIANTS})
    add = parser.add_argument
    add(
        "--output",
        type=cli.folder,
        default=pathlib.Path(folder),
        metavar="FOLDER",
        help="folder to write to, and to continue in (default: %(default)s)",
    )
    add(
        "--optimizer",
        nargs="+",
        choices=known,
        default=list(labels),
        metavar="NAME",
        help=f"optimizers (default: {' '.join(labels)}); one of "
        + ", ".join(map(repr, known)),
    )
    add(
        "--learning-rate",
        nargs="+",
        type=cli.real(exclude_low=True),
        default=list(rates),
        metavar="RATE",
        help=f"peak learning rates (default: {' '.join(f'{x:g}' for x in rates)})",
    )
    add(
        "--seeds",
        type=cli.whole(1, 100),
        default=1,
        metavar="N",
        help="number of seeds: 0, 1, and so on (default: %(default)s)",
    )
    add(
        "--steps",
        type=cli.whole(4),
        default=base.steps,
        metavar="STEPS",
        help="optimizer steps of each run (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=cli.whole(1),
        default=base.batch_size,
        metavar="N",
        help="examples in each step (default: %(default)s)",
    )
    add(
        "--workers",
        type=cli.whole(1, 512),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of runs side by side, on one core each (default: %(default)s, the"
        " cores of this machine); use 1 on a GPU or TPU",
    )


def run(
    study: task.TaskStudy,
    options: argparse.Namespace,
    base: RunConfig,
    scenarios: Sequence[str],
    title: str,
    question: str,
) -> list[engine.Failure]:
    """Trains the missing runs, and writes a table and a figure of all of them."""
    runs = task.grid(
        base,
        dict.fromkeys(options.optimizer),
        dict.fromkeys(scenarios),
        dict.fromkeys(options.learning_rate),
        range(options.seeds),
    )
    failures = engine.run_all(study, runs, options.output / "runs", options.workers)
    name = title.lower()
    report.write(study, {name: runs}, {name: question}, options.output, title)
    print(f"The table is {options.output / name}.md, the picture {name}.png beside it")
    return failures
