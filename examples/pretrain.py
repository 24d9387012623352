"""Train a small language model under injected gradient spikes, with four optimizers.

    python examples/pretrain.py

takes about two minutes on two CPU cores. It trains a LLaMA-style transformer on bytes
of Shakespeare four times, from the same parameters, on the same batches, with the same
faults: four times in the run, for three steps in a row, every tensor's gradient gets
normal noise of 1000 x its own RMS. The optimizers are

    adam        Adam
    adam_clip   optax.chain(optax.clip_by_global_norm(1.0), adam)
    spam        spam_optax.spam
    clip_spam   optax.chain(optax.clip_by_global_norm(1.0), spam)

It is a demonstration: one seed, one learning rate for all. What it shows: under Adam
the faults enter the moments and the loss stops falling. They hit every coordinate at
once, so the global norm sees them, and clipping it stops them; SPAM added to that
changes little. SPAM alone lies between: its threshold of 5000 limits a coordinate to
70.7 x sqrt(v), v is not bias corrected, small after a reset, and grows with what
passes, so a burst still reaches the moments at 10 to 150 x the usual gradient norm.
--threshold 100 lets less through.

The run's folder, runs/<date and time> unless --output says otherwise, holds

    metrics.jsonl           a line for every step and evaluation, written at once
    summary.json            the table at the end
    spike_suppression.png   loss, gradient norms and clipped coordinates
    tensorboard/            the same numbers: tensorboard --logdir runs
    config.json             the settings
    checkpoints/            for --resume; the last one has the trained parameters
"""

import argparse
import contextlib
import datetime
import json
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from lm import (
    analysis,
    command_line,
    console,
    corpus,
    optimizers,
    picture,
    records,
    run_folder,
    training,
)
from lm.checkpoints import Checkpoints
from lm.config import RunConfig, UsageError
from lm.run_folder import RunFolder

EXAMPLES = """\
examples:
  everything, about two minutes      pretrain.py
  one optimizer, a bigger model      pretrain.py --optimizer spam --model small
  a lower threshold                  pretrain.py --optimizer spam --threshold 100
  faults in one coordinate of 1000   pretrain.py --spike-rate 0.001
  no faults                          pretrain.py --no-spikes
  your own text, a named folder      pretrain.py --data book.txt --output runs/book
  after Ctrl-C                       pretrain.py --resume --output runs/book
"""


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error message, and what it read."""
    parser = command_line.Parser(
        prog="pretrain.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command_line.add_run_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FOLDER",
        help="folder of the run (default: runs/<date and time>)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output, bit for bit, with the settings it has",
    )
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    parser, options = parse(arguments)
    given = command_line.run_settings(options)
    if options.resume and options.output is None:
        parser.error("--resume needs --output, the folder of the run to continue")
    folder = RunFolder(options.output or default_output())
    open_run = run_folder.resume if options.resume else run_folder.begin
    try:
        config, text = open_run(folder, given)
        with interrupt_flag() as interrupted:
            train_all(config, text, folder, interrupted)
            complete = report(config, folder)
    except UsageError as error:
        parser.error(str(error))
    if complete:
        return 0
    output = shlex.quote(str(folder.path))
    print(
        f"Interrupted. Continue with: {parser.prog} --resume --output {output}",
        file=sys.stderr,
    )
    return 130


def default_output() -> pathlib.Path:
    return pathlib.Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed.

    The first press lets the step end and the state be saved; the second one ends the
    program at once.
    """
    pressed = False

    def handler(signum, frame):
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def make_task(config: RunConfig, text: bytes) -> training.Task:
    """What the optimizers have in common."""
    tokens = corpus.split(text)
    shape = config.sequence_length, config.batch_size
    graphdef, params = training.initialize(config)
    return training.Task(
        config=config,
        graphdef=graphdef,
        initial_params=params,
        faults=training.make_faults(config),
        batches=corpus.batches(tokens.train, *shape, config.seed),
        validation=corpus.evaluation_batches(
            tokens.validation, *shape, config.eval_sequences
        ),
    )


def train_all(
    config: RunConfig,
    text: bytes,
    folder: RunFolder,
    interrupted: Callable[[], bool],
) -> None:
    """Trains each optimizer from where its newest checkpoint left it."""
    task = make_task(config, text)
    checkpoints = Checkpoints(folder.checkpoints)
    finished = {name: checkpoints.latest_step(name) for name in config.optimizers}
    records.keep(
        folder.metrics, lambda row: row["step"] <= finished.get(row["optimizer"], 0)
    )
    for name, steps in finished.items():
        records.check_complete(folder.metrics, name, steps, config.evaluations(steps))
    console.announce(task)
    with (
        records.Metrics(folder.metrics) as metrics,
        console.Progress(config) as progress,
    ):
        for name in config.optimizers:
            if finished[name] == config.steps or interrupted():
                continue
            optimizer = optimizers.make(name, config)
            state = training.initial_state(task, optimizer)
            if finished[name]:
                state = checkpoints.restore(name, state)
            progress.start(name, state)

            def save(state: training.TrainState, name: str = name) -> None:
                metrics.sync()
                checkpoints.save(name, state)

            with records.TensorBoard(
                folder.tensorboard / name, finished[name] + 1
            ) as tensorboard:
                training.train(
                    state,
                    task,
                    optimizer,
                    record=records.tee(metrics, tensorboard, progress),
                    save=save,
                    interrupted=interrupted,
                )


def report(config: RunConfig, folder: RunFolder) -> bool:
    """Writes and shows what the finished optimizers did; True if that is all."""
    rows = records.read(folder.metrics)
    summary = analysis.summarize(rows, config)
    records.replace(folder.summary, json.dumps(summary, indent=2) + "\n")
    if summary:
        picture.draw(folder.picture, rows, summary, config)
        console.show(summary, config)
        print(f"Metrics, summary and picture are in {folder.path}")
    return len(summary) == len(config.optimizers)


if __name__ == "__main__":
    sys.exit(main())
