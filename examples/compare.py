"""Compare optimizers, each at its own best learning rate, on many small runs.

    python examples/compare.py

trains a small LLaMA-style transformer with every optimizer, learning rate and seed of
the chosen experiments, clean and under faults:

    clean        nothing is injected
    noise        three bursts of three steps whose gradient gets noise of 1000 x its RMS
    coordinates  in the same steps, one coordinate in 1000 is multiplied by 1000
    batches      in the same steps, the batch is random tokens

A run is one compiled program and takes seconds; two or more go on side by side. Each
leaves a JSON file behind, and a run whose file is there is not run again, unless the
text of --data has changed: stop with Ctrl-C and repeat the command to go on, or add
experiments later. At the end it writes

    runs/*.json        settings, losses and gradient norms of every run
    comparison.md      a table for every experiment: final loss at the best learning
                       rate, its spread over the seeds, learning-rate sensitivity,
                       spikes, recovery, divergences, optimizer memory, step time
    summary.json       the same numbers; "inf" is infinite, null that there is none
    <experiment>.png   final loss over learning rate
"""

import argparse
import concurrent.futures
import concurrent.futures.process
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

import rich.progress

from studies.comparison import comparison, experiments
from studies.comparison.experiments import EXPERIMENTS, SCENARIOS, Spec
from trainer import cli, files
from trainer.data import text_files
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
POLL = 0.5  # seconds between looks at what is done


def parse(arguments: Sequence[str] | None):
    parser = cli.Parser(
        prog="compare.py",
        description=__doc__,
        epilog=QUESTIONS + "\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    base = experiments.BASE
    labels = sorted({x for e in EXPERIMENTS.values() for x in e.labels})
    add = parser.add_argument
    add(
        "--experiment",
        nargs="+",
        default=["main"],
        choices=[*EXPERIMENTS, "all"],
        metavar="NAME",
        help="one or more of those below, or all (default: main)",
    )
    add(
        "--output",
        type=cli.folder,
        default=pathlib.Path("runs/compare"),
        metavar="FOLDER",
        help="where runs are kept and looked for (default: %(default)s)",
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
        help="peak learning rates, instead of the experiments' own",
    )
    add(
        "--seeds",
        type=cli.whole(1, 100),
        default=len(experiments.SEEDS),
        metavar="N",
        help="runs of each kind, with the seeds 0, 1, ... (default: %(default)s)",
    )
    add(
        "--steps",
        type=cli.whole(40),
        default=base.steps,
        metavar="STEPS",
        help="of every run (default: %(default)s)",
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
        help="runs at a time, a core each (default: %(default)s, the cores here); on a"
        " GPU or TPU say 1",
    )
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 0 when done, 2, or 130 after Ctrl-C."""
    parser, options = parse(arguments)
    names = list(EXPERIMENTS) if "all" in options.experiment else options.experiment
    try:
        grids = {name: grid(name, options) for name in dict.fromkeys(names)}
        if not any(grids.values()):
            raise UsageError(
                "the chosen experiments have no such optimizer or scenario"
            )
        digest = text_files.text_digest(options.data)
        runs = options.output / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        done = train_all(grids, runs, digest, options.workers)
        report(grids, options.output, digest)
    except UsageError as error:
        parser.error(str(error))
    except OSError as error:
        where = error.filename or options.output
        parser.exit(1, f"{parser.prog}: error: {where}: {error.strerror}\n")
    except KeyboardInterrupt:  # before the runs, or while the tables are written
        done = False
    except concurrent.futures.process.BrokenProcessPool:
        parser.exit(
            1,
            f"{parser.prog}: error: a worker was killed, perhaps for lack of memory:"
            " repeat the command with fewer --workers to go on\n",
        )
    if not done:
        print("Interrupted: repeat the command to go on", file=sys.stderr)
        return 130
    print(f"Tables are in {options.output / 'comparison.md'}")
    return 0


def grid(name: str, options: argparse.Namespace) -> list[Spec]:
    settings = {"steps": options.steps, "preset": options.preset, "data": options.data}
    return experiments.specs(
        name,
        experiments.BASE.with_settings(**settings),
        range(options.seeds),
        labels=options.optimizer,
        scenarios=options.scenario,
        rates=options.learning_rate,
    )


def train_all(
    grids: dict[str, list[Spec]], folder: pathlib.Path, digest: str, workers: int
) -> bool:
    """Trains what is missing; False if it was interrupted."""
    wanted = {spec.file_name(): spec for specs in grids.values() for spec in specs}
    missing = [spec for spec in wanted.values() if spec.read(folder, digest) is None]
    by_program = {}
    for spec in missing:
        by_program.setdefault(spec.program(), []).append(spec)
    # A program is compiled once; only where there are few are they shared out.
    tasks = list(by_program.values())
    if len(tasks) < workers:
        size = math.ceil(len(missing) / workers) or 1
        tasks = [
            task[start : start + size]
            for task in tasks
            for start in range(0, len(task), size)
        ]
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)) or 1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin_worker,
    )
    futures = [pool.submit(train, task, folder) for task in tasks]
    # As Ctrl-C does; or the workers would go on alone.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        show_progress(futures, folder, missing, len(wanted))
    except KeyboardInterrupt:
        end_workers()
        return False
    except Exception:
        end_workers()  # now: a task is many runs
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        pool.shutdown(wait=False, cancel_futures=True)
    return True


def end_workers() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


def show_progress(
    futures: Sequence[concurrent.futures.Future],
    folder: pathlib.Path,
    missing: Sequence[Spec],
    total: int,
) -> None:
    """Shows how many runs are there, until all are; raises what one of them raises."""
    columns = (
        *rich.progress.Progress.get_default_columns()[:-1],
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    paths = [folder / spec.file_name() for spec in missing]
    began = time.time()
    with rich.progress.Progress(*columns) as progress:
        bar = progress.add_task("runs", total=total, completed=total - len(missing))
        waiting = set(futures)
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, POLL)
            new = sum(p.exists() and p.stat().st_mtime >= began for p in paths)
            progress.update(bar, completed=total - len(missing) + new)
            for future in done:
                future.result()


def begin_worker() -> None:
    """Settings of a process that trains: Ctrl-C is for the one that waits for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Two small programs side by side are faster than one on two cores.
    os.environ["NPROC"] = "1"


def train(specs: Sequence[Spec], folder: pathlib.Path) -> None:
    """Trains runs of one program; in a process of its own."""
    from studies.comparison import single_run  # here, for it starts JAX

    program = single_run.Program(specs[0])
    for spec in specs:
        text = json.dumps(program(spec), allow_nan=False)
        files.replace(folder / spec.file_name(), text + "\n")


def report(grids: dict[str, list[Spec]], folder: pathlib.Path, digest: str) -> None:
    """Writes tables, numbers and pictures of the runs that are there."""
    tables, summary = [], {}
    for name, specs in grids.items():
        runs, unfinished = comparison.read(folder / "runs", specs, digest)
        found = comparison.lines(runs)
        experiment = EXPERIMENTS[name]
        tables.append(comparison.markdown(name, experiment, found, unfinished))
        if not found:
            continue
        summary[name] = [comparison.to_json(line) for line in found]
        comparison.picture(found).savefig(folder / f"{name}.png")
    text = "\n".join(["# Comparison\n", *tables, comparison.NOTES])
    files.replace(folder / "comparison.md", text)
    text = json.dumps(summary, indent=1, allow_nan=False)
    files.replace(folder / "summary.json", text + "\n")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
