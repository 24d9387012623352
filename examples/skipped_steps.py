"""Show which steps of a recorded run a guard would have skipped.

    python examples/skipped_steps.py LOG

applies the rule of spam_optax.skip_spikes to the losses and the gradient norms in LOG,
and prints the skipped steps with the reasons. LOG is one of

    FILE.jsonl           a JSON object per step, such as metrics.jsonl of pretrain.py
    FILE.csv             the names of the columns, then a line per step
    trainer_state.json   of Hugging Face's Trainer
    FOLDER or FILE       TensorBoard's files events.out.tfevents of one run
    FILE.npz             arrays of NumPy, one value per step

The columns are found by their usual names. If a step is recorded twice, because a run
went back to a checkpoint, its last record counts. If the run had no guard, a spike was
not skipped, and the values after it may be higher than with a guard.
"""

import argparse
import pathlib
from collections import Counter
from collections.abc import Sequence

import matplotlib.figure
import numpy as np

import run_logs
from run_logs import Log
from spam_optax import SkipReason, functional
from studies import engine
from trainer import cli
from trainer.errors import UsageError
from trainer.metrics import reason_text

CURVE, SKIPPED = "#777777", "#D55E00"
EXAMPLES = """\
examples:
  one optimizer of a run of pretrain.py   skipped_steps.py runs/first/metrics.jsonl
                                            --only optimizer=adam
  other names of columns                  skipped_steps.py log.csv --loss nll
  with a picture                          skipped_steps.py log.csv --picture log.png
"""


def skip_reasons(log: Log) -> np.ndarray:
    """Returns a SkipReason for every step; it is 0 for a step that a guard takes."""
    return np.asarray(functional.spike_steps(log.losses, log.norms))


def describe(log: Log, reasons: np.ndarray) -> str:
    """Returns the number of skipped steps, and how many there are for each reason."""
    skipped = np.count_nonzero(reasons)
    judged = {"loss": log.losses, "gradient norm": log.norms}
    columns = " and ".join(name for name, x in judged.items() if x is not None)
    share = skipped / len(reasons)
    text = f"{skipped:,} of {len(reasons):,} steps ({share:.3%}) skipped by {columns}"
    counts = Counter(map(reason_text, reasons[reasons > 0].tolist()))
    parts = [f"{reason}: {count:,}" for reason, count in counts.most_common()]
    return "; ".join([text, *parts])


def draw(figure: matplotlib.figure.Figure, log: Log, reasons: np.ndarray) -> None:
    """Draws the losses and norms of a run, and marks the steps that are skipped.

    A circle marks a spike, and a cross a value that is not finite.
    """
    series = {
        "loss": (log.losses, SkipReason.LOSS_SPIKE, SkipReason.LOSS_NONFINITE),
        "gradient norm": (log.norms, SkipReason.NORM_SPIKE, SkipReason.NORM_NONFINITE),
    }
    series = {name: x for name, x in series.items() if x[0] is not None}
    figure.set_size_inches(9, 1 + 2.2 * len(series))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(series), sharex=True, squeeze=False)[:, 0]
    for panel, (name, (y, *kinds)) in zip(panels, series.items(), strict=True):
        spike, nonfinite = ((reasons & kind) > 0 for kind in kinds)
        panel.plot(log.steps, y, color=CURVE, linewidth=0.8)
        panel.set_yscale("linear" if name == "loss" else "log")
        panel.plot(log.steps[spike], y[spike], "o", color=SKIPPED, label="spike")
        crosses = panel.plot(
            log.steps[nonfinite],
            np.full(np.count_nonzero(nonfinite), 0.05),
            "X",
            color=SKIPPED,
            label="not finite",
        )
        crosses[0].set_transform(panel.get_xaxis_transform())
        panel.set_ylabel(name)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(title="skipped", loc="upper right", frameon=False)
    panels[0].set_title(describe(log, reasons), loc="left", fontsize="medium")
    panels[-1].set_xlabel("step")


def column_value(text: str) -> tuple[str, str]:
    """Parses COLUMN=VALUE."""
    column, equals, value = text.partition("=")
    if not column or not equals:
        raise argparse.ArgumentTypeError(f"must be COLUMN=VALUE, not {text!r}")
    return column, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: see `engine.exit_code`."""
    parser = cli.make_parser("skipped_steps.py", __doc__, EXAMPLES)
    parser.add_argument("log", type=pathlib.Path, metavar="LOG")
    parser.add_argument("--loss", metavar="COLUMN", help="column of the losses")
    parser.add_argument("--norm", metavar="COLUMN", help="column of the gradient norms")
    parser.add_argument(
        "--only",
        type=column_value,
        metavar="COLUMN=VALUE",
        help="read only the rows with this value, of a log of several runs",
    )
    parser.add_argument(
        "--picture", type=pathlib.Path, metavar="FILE", help="draw loss and norm"
    )
    options = parser.parse_args(arguments)
    return engine.exit_code(parser, lambda: show(options))


def show(options: argparse.Namespace) -> list[engine.Failure]:
    """Prints the skipped steps of a run, and draws it."""
    log = run_logs.read(options.log, options.loss, options.norm, options.only)
    reasons = skip_reasons(log)
    print(describe(log, reasons))
    for note in log.notes:
        print(f"note: {note}")
    for i in np.flatnonzero(reasons):
        print(f"step {log.steps[i]}: {reason_text(int(reasons[i]))}")
    if options.picture is not None:
        figure = matplotlib.figure.Figure()
        draw(figure, log, reasons)
        try:
            figure.savefig(options.picture)
        except ValueError as error:
            raise UsageError(f"{options.picture}: {error}") from error
    return []


if __name__ == "__main__":
    cli.exit_with(main)
