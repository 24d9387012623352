"""The program of a task: its command line, its runs, and what it writes."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from studies import engine, sweep, task
from studies.comparison import report, variants
from trainer import cli, optimizers
from trainer.config import RunConfig

LEAST_STEPS = 12  # in which three bursts of faults have room
# Optimizers that take the trainer's model alone, whose matrices are stacked by layer.
OF_DECODERS = {"adam_mini", "galore", "muon", *variants.RANKED}


class Example(NamedTuple):
    """What a task's program trains when no flag is given, and its help."""

    title: str  # in small letters: the name of the program and of its files
    description: str | None
    examples: str  # at the end of the help
    question: str  # the heading of the table
    study: type[task.TaskStudy]
    options: type  # the dataclass of the task's settings, made by `task.setting`
    base: RunConfig
    optimizers: Sequence[str]
    rates: Sequence[float]
    scenarios: dict[str, Any]  # the flag of the scenarios: see `scenario_flag`
    numbers: dict[str, str]  # more flags: settings of `base` that are whole numbers
    seeds: int = 1
    is_decoder: bool = False  # whether the task trains the trainer's model

    @property
    def name(self) -> str:
        return self.title.lower()


def scenario_flag(names: Sequence[str], text: str) -> dict[str, Any]:
    """Returns the flag --scenario, whose default is all of its choices."""
    return {
        "flag": "--scenario",
        "choices": names,
        "default": list(names),
        "metavar": "NAME",
        "help": f"{text} (default: {' '.join(names)})",
    }


def make_parser(example: Example) -> argparse.ArgumentParser:
    parser = cli.make_parser(
        f"{example.name}.py", example.description, example.examples
    )
    left_out = set() if example.is_decoder else OF_DECODERS
    known = sorted({*optimizers.TABLE, *variants.VARIANTS} - left_out)
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--output",
        type=cli.folder,
        default=pathlib.Path(f"runs/{example.name}"),
        metavar="FOLDER",
        help="folder to write to, and to continue in (default: %(default)s)",
    )
    group.add_argument(
        "--optimizer",
        nargs="+",
        choices=known,
        default=list(example.optimizers),
        metavar="NAME",
        help=f"optimizers (default: {', '.join(map(repr, example.optimizers))});"
        f" all: {', '.join(map(repr, known))}",
    )
    group.add_argument(
        "--learning-rate",
        nargs="+",
        type=cli.real(exclude_low=True),
        default=list(example.rates),
        metavar="RATE",
        help="peak learning rates (default:"
        f" {' '.join(f'{x:g}' for x in example.rates)})",
    )
    flag = dict(example.scenarios)
    group.add_argument(flag.pop("flag"), dest="scenario", nargs="+", **flag)
    group.add_argument(
        "--seeds",
        type=cli.whole(1, 100),
        default=example.seeds,
        metavar="N",
        help="number of seeds: 0, 1, and so on (default: %(default)s)",
    )
    group.add_argument(
        "--adaptive",
        action="store_true",
        help="begin with one seed, add learning rates until the best one is enclosed,"
        " and run the other seeds only at the best rate and the rates next to it",
    )
    for name, text in example.numbers.items():
        parse = cli.whole(LEAST_STEPS if name == "steps" else 1)
        add_value(group, name, getattr(example.base, name), text, parse, "N")
    group.add_argument(
        "--workers",
        type=cli.whole(1, 512),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of runs side by side, on one core each (default: %(default)s, the"
        " cores of this machine); use 1 on a GPU or TPU",
    )
    group = parser.add_argument_group("task")
    for field in dataclasses.fields(example.options):
        given = field.metadata
        text, parse, metavar = given["help"], given["type"], given["metavar"]
        add_value(group, field.name, field.default, text, parse, metavar)
    return parser


def add_value(group, name: str, default: Any, text: str, parse, metavar: str) -> None:
    """Adds a flag that takes one value. A default of None is told by the text."""
    flag = f"--{name.replace('_', '-')}"
    text += "" if default is None else " (default: %(default)s)"
    group.add_argument(flag, type=parse, default=default, metavar=metavar, help=text)


def main(example: Example, arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: see `engine.exit_code`."""
    parser = make_parser(example)
    options = parser.parse_args(arguments)
    return engine.exit_code(parser, lambda: train(example, options))


def train(example: Example, options: argparse.Namespace) -> list[engine.Failure]:
    """Trains the missing runs, and writes a table and a figure of all of them."""
    fields = dataclasses.fields(example.options)
    own = example.options(**{x.name: getattr(options, x.name) for x in fields})
    study = example.study(own)
    numbers = {name: getattr(options, name) for name in example.numbers}
    runs = task.grid(
        dataclasses.replace(example.base, **numbers),
        dict.fromkeys(options.optimizer),
        dict.fromkeys(options.scenario),
        dict.fromkeys(options.learning_rate),
        range(1 if options.adaptive else options.seeds),
    )
    study.task(runs[0])  # reports a mistake before anything is trained
    name = example.name
    seeds = {name: range(options.seeds)} if options.adaptive else {}
    folder = options.output / "runs"
    failures = sweep.run_all(study, {name: runs}, seeds, folder, options.workers)
    report.write(
        study,
        {name: runs},
        {name: example.question},
        options.output,
        example.title,
        study.score,
        study.draw,
    )
    print(f"The table is {options.output / name}.md, the picture {name}.png beside it")
    return failures
