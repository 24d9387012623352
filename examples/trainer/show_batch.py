"""Prints the text of the batch of one step of a run, without training."""

import argparse

from trainer import data
from trainer.errors import UsageError
from trainer.output import sinks
from trainer.run_folder import RunFolder


def add_flag(group: argparse._ArgumentGroup, whole) -> None:
    group.add_argument(
        "--show-batch",
        type=whole(1),
        metavar="STEP",
        help="print the text that the run in --output trained on in a step, and stop;"
        " of a stream that N hosts read, the part of host I with --num-processes N"
        " --process-id I",
    )


def run(folder: RunFolder, step: int, names: tuple[str, ...], host: data.Host) -> int:
    """Prints the batch of `step`, for each optimizer of `names` if it differs.

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
    loaded = data.load(config, host)
    if loaded.digest != begun.data_digest:
        raise UsageError(f"the data or tokenizer of {folder.path} has changed since")
    for number, rows in steps.items():
        print(f"Batch {number}")
        for row in rows:
            print(f"  {describe(row)}")
        if number in config.bad_batch_numbers:
            vocabulary = loaded.tokenizer.vocabulary
            batch = data.random_batch(config, vocabulary, number, host)
        else:
            batch = loaded.batch(number)
        sequences = batch.reshape(-1, batch.shape[-1])
        for position, tokens in enumerate(sequences, 1):
            print(f"--- sequence {position} of {len(sequences)}")
            print(printable(loaded.tokenizer.decode(tokens)))
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
