"""The example trainer inside the process of a test."""

import pretrain
from trainer import loop, optimizers, sharding, train_step
from trainer.config import RunConfig

SMALL_FLAGS = [
    "--preset=nano",
    "--steps=60",
    "--batch-size=4",
    "--sequence-length=16",
    "--eval-every=20",
    "--eval-sequences=16",
    "--checkpoint-every=8",
    "--spike-kind=scale",
    "--data-parallel=1",
]
PAIR = ["--optimizer", "adam", "spam"]


def make_task(config: RunConfig) -> train_step.Task:
    """Prepares a run on one device."""
    return pretrain.prepare(config, sharding.Parallelism(data=1))[0]


def train_rows(task: train_step.Task, *names: str, steps: int | None = None) -> list:
    """Trains each optimizer from the beginning; returns the rows it records."""
    rows = []
    for name in names:
        optimizer = optimizers.make(name, task.config)
        loop.train(
            train_step.initial_state(task, optimizer),
            task,
            optimizer,
            iter(task.train),
            record=rows.append,
            save=lambda state, place: None,
            stop=lambda step: step == (steps or task.config.steps),
        )
    return rows


def refused(capsys, *flags: str, announced: bool = False) -> str:
    """Returns the one line with which the program refuses `flags`.

    The line comes before the announcement of the run, unless `announced`.
    """
    capsys.readouterr()
    try:
        pretrain.main(list(flags))
    except SystemExit as exit_:
        assert exit_.code == 2
    else:
        raise AssertionError("the flags were accepted")
    captured = capsys.readouterr()
    assert bool(captured.out) == announced
    assert captured.err.startswith("pretrain.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("pretrain.py: error: ").rstrip("\n")
