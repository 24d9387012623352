"""Prints the text of the batch of one step of a run, without training."""

import argparse

import numpy as np

from trainer import data
from trainer.errors import UsageError
from trainer.output import sinks
from trainer.run_folder import RunFolder


def add_flag(group: argparse._ArgumentGroup, whole) -> None:
    group.add_argument(
        "--show-batch",
        type=whole(1),
        metavar="STEP",
        help="print the text that the run in --output trained on in a step, and stop",
    )


def run(
    folder: RunFolder, step: int, names: tuple[str, ...], skip_bad_data: int
) -> int:
    """Prints the batch of `step`, for each optimizer of `names` if it differs.

    The batch of a streamed data set is put together from the parts of all hosts.

    Raises:
      UsageError: If the run has no such step, or its data has changed.
    """
    begun = folder.read()
    config = begun.config
    steps = {}
    for row in sinks.read(folder.metrics):
        of_optimizer = row["optimizer"] in (names or config.optimizers)
        if row["step"] == step and "loss" in row and of_optimizer:
            steps.setdefault(row["batch"], []).append(row)
    if not steps:
        raise UsageError(f"{folder.metrics} has no step {step} of this run")
    count = begun.hosts if data.is_streamed(config) else 1
    parts = [
        data.load(config, data.Host(i, count), skip_bad_data=skip_bad_data)
        for i in range(count)
    ]
    tokenizer = parts[0].tokenizer
    if any(part.digest != begun.data_digest for part in parts):
        raise UsageError(f"the data or tokenizer of {folder.path} has changed since")
    for number, rows in steps.items():
        print(f"Batch {number}")
        for row in rows:
            print(f"  {describe(row)}")
        if number in config.bad_batch_numbers:
            vocabulary = tokenizer.vocabulary
            batch = data.random_batch(config, vocabulary, number, data.ONE_HOST)
        else:
            batch = np.concatenate([part.batch(number) for part in parts], axis=1)
        sequences = batch.reshape(-1, batch.shape[-1])
        for position, tokens in enumerate(sequences, 1):
            print(f"--- sequence {position} of {len(sequences)}")
            print(printable(tokenizer.decode(tokens)))
    return 0


def describe(row: sinks.Row) -> str:
    """Returns what became of a step, in one line."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    notes = [f"loss {loss}"]
    if row["fault"]:
        notes.append(f"corrupted {row['fault']}")
    if row["skipped"]:
        notes.append(f"skipped ({row['skipped']})")
    if "rewound" in row:
        notes.append(f"taken back by rewind {row['rewound']}")
    return f"step {row['step']} of {row['optimizer']}: {', '.join(notes)}"


def printable(text: str) -> str:
    """Replaces the characters that could change the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
