"""Compare optimizers, each at its own best learning rate, on many small runs.

    python examples/compare.py

trains a small LLaMA-style transformer with every optimizer, learning rate and seed of
the chosen experiments, without faults and with faults:

    clean        no faults
    noise        three bursts of three steps whose gradients get noise of 1000 times
                 their RMS
    coordinates  in the same steps, one coordinate in 1000 is multiplied by 1000
    nan          in the same steps, one coordinate in 1000 is not a number
    batches      in the same steps, the batch is random tokens
    shift        no faults, but the second half of the run reads another text

Some experiments are adaptive. They begin with one seed, add learning rates until the
best one is enclosed, and run the other seeds only at the best rate and the rates next
to it. With --learning-rate, every rate has all seeds.

A run is one compiled program and takes seconds. Several runs are trained side by side.
Each run leaves a record. A run whose record exists is not repeated, unless the text of
--data has changed. So after Ctrl-C the same command continues, and experiments can be
added later. The program writes to the folder --output:

    runs/*.json        settings, losses and gradient norms of every run
    comparison.md      a table for every experiment: final loss at the best learning
                       rate, its spread over the seeds, learning-rate sensitivity,
                       spikes, recovery, divergences, optimizer memory, step time
    summary.json       the same numbers; "inf" is infinite, null was not measured
    <experiment>.png   final loss over learning rate
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from studies import engine, sweep
from studies.comparison import experiments, report
from studies.comparison.experiments import EXPERIMENTS
from studies.comparison.study import SCENARIOS, Comparison
from studies.task import Run
from trainer import cli
from trainer.errors import UsageError
from trainer.model import PRESETS

QUESTIONS = "experiments:\n" + "\n".join(
    f"  {name:15}{experiment.question}" for name, experiment in EXPERIMENTS.items()
)
EXAMPLES = """
examples:
  the main comparison                   compare.py
  everything                            compare.py --experiment all
  two optimizers, a finer sweep         compare.py --optimizer adam spam
                                          --learning-rate 1e-3 1.4e-3 2e-3 2.8e-3
  a larger text                         compare.py --data book.txt
"""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("compare.py", __doc__, QUESTIONS + "\n" + EXAMPLES)
    base = experiments.BASE
    labels = sorted({x for e in EXPERIMENTS.values() for x in e.labels})
    add = parser.add_argument
    add(
        "--experiment",
        nargs="+",
        default=["main"],
        choices=[*EXPERIMENTS, "all"],
        metavar="NAME",
        help="one or more of the experiments below, or all (default: main)",
    )
    add(
        "--output",
        type=cli.folder,
        default=pathlib.Path("runs/compare"),
        metavar="FOLDER",
        help="folder to write to, and to continue in (default: %(default)s)",
    )
    add(
        "--optimizer",
        nargs="+",
        choices=labels,
        metavar="NAME",
        help="only these rows of the tables: " + ", ".join(map(repr, labels)),
    )
    add(
        "--scenario",
        nargs="+",
        choices=SCENARIOS,
        metavar="NAME",
        help=f"only these: {', '.join(SCENARIOS)}",
    )
    add(
        "--learning-rate",
        nargs="+",
        type=cli.real(exclude_low=True),
        metavar="RATE",
        help="peak learning rates, instead of those of the experiments",
    )
    add(
        "--seeds",
        type=cli.whole(1, 100),
        default=len(experiments.SEEDS),
        metavar="N",
        help="number of seeds: 0, 1, and so on (default: %(default)s)",
    )
    add(
        "--steps",
        type=cli.whole(40),
        default=base.steps,
        metavar="STEPS",
        help="steps of each run (default: %(default)s)",
    )
    add(
        "--preset",
        choices=PRESETS,
        default=base.model.preset,
        help="model (default: %(default)s)",
    )
    add("--data", metavar="DATA", help="a text file (default: the embedded text)")
    add(
        "--workers",
        type=cli.whole(1, 512),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of runs side by side, on one core each (default: %(default)s, the"
        " cores of this machine); use 1 on a GPU or TPU",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: see `engine.exit_code`."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    return engine.exit_code(parser, lambda: compare(options))


def compare(options: argparse.Namespace) -> list[engine.Failure]:
    """Trains the missing runs and writes tables and figures of all of them."""
    names = list(EXPERIMENTS) if "all" in options.experiment else options.experiment
    grids = {name: grid(name, options) for name in dict.fromkeys(names)}
    if not any(grids.values()):
        raise UsageError("the chosen experiments have no such optimizer or scenario")
    study, folder = Comparison(), options.output
    seeds = {
        name: range(options.seeds)[: EXPERIMENTS[name].seeds]
        for name in grids
        if is_adaptive(name, options)
    }
    failures = sweep.run_all(study, grids, seeds, folder / "runs", options.workers)
    questions = {name: EXPERIMENTS[name].question for name in grids}
    report.write(study, grids, questions, folder)
    print(f"Tables are in {folder / 'comparison.md'}")
    return failures


def is_adaptive(name: str, options: argparse.Namespace) -> bool:
    """Returns whether the results of an experiment decide which runs it has."""
    return EXPERIMENTS[name].adaptive and not options.learning_rate


def grid(name: str, options: argparse.Namespace) -> list[Run]:
    """Returns the runs of an experiment, or those with which a sweep begins."""
    settings = {"steps": options.steps, "preset": options.preset, "data": options.data}
    return experiments.runs_of(
        name,
        experiments.BASE.with_settings(**settings),
        range(1 if is_adaptive(name, options) else options.seeds),
        labels=options.optimizer,
        scenarios=options.scenario,
        rates=options.learning_rate,
    )


if __name__ == "__main__":
    cli.exit_with(main)
