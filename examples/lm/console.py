"""What a run shows while it goes and when it ends."""

import sys

import jax
import optax
import rich
import rich.box
import rich.progress
import rich.table
import rich.text

from lm.analysis import SPIKE_FACTOR
from lm.config import BURST_LENGTH, RunConfig
from lm.records import Row
from lm.training import Task, TrainState


class StatusColumn(rich.progress.ProgressColumn):
    """The latest numbers of a run, right of its bar."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class Progress:
    """A bar for each optimizer on a terminal; elsewhere a line an evaluation."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._last_step: Row = {}
        self._spikes = 0
        self._bars = None
        self._task = None
        if sys.stdout.isatty():
            width = rich.get_console().width
            fixed = rich.table.Column(no_wrap=True)  # a narrow window cuts the status
            self._bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description:9}"),
                rich.progress.BarColumn(bar_width=max(5, width - 85)),
                rich.progress.MofNCompleteColumn(table_column=fixed),
                StatusColumn(),
                rich.progress.TimeRemainingColumn(True, table_column=fixed),
                expand=True,
            )

    def __enter__(self) -> "Progress":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bars:
            self._bars.stop()

    def start(self, optimizer: str, state: TrainState) -> None:
        """Begins to show `optimizer`, which may have been trained in part."""
        self._spikes = int(optax.tree.get(state.opt_state, "spike_total", 0))
        if self._bars:
            self._task = self._bars.add_task(
                optimizer,
                total=self._config.steps,
                completed=int(state.step),
                status="compiling",
            )

    def __call__(self, row: Row) -> None:
        if "loss" in row:
            self._last_step = row
            self._spikes += row["spikes_clipped"]
            if self._bars:
                status = self._status()
                self._bars.update(self._task, completed=row["step"], status=status)
        elif not self._bars:
            position = f"step {row['step']:>{len(str(self._config.steps))}}"
            print(
                f"{row['optimizer']:9} {position}/{self._config.steps}"
                f" {self._status()} validation loss {row['eval_loss']:.3f}",
                flush=True,
            )

    def _status(self) -> str:
        row = self._last_step
        speed = row["tokens_per_second"]
        return (
            f"loss {row['loss']:.3f} spikes {self._spikes:,}"
            f" lr {row['learning_rate']:.1e}"
            f" {'-' if speed is None else format(speed, ',.0f')} tokens/s"
        )


def announce(task: Task) -> None:
    """Says what is going to be trained."""
    config = task.config
    size = sum(leaf.size for leaf in jax.tree.leaves(task.initial_params))
    bursts = ", ".join(
        f"{start}-{start + BURST_LENGTH - 1}" for start in config.burst_starts
    )
    print(
        f"{config.model} model, {size:,} parameters, on {jax.devices()[0].platform};"
        f" {config.steps} steps of {config.batch_size} x {config.sequence_length} bytes"
        f" for each of {', '.join(config.optimizers)}\n"
        + (f"Faults in steps {bursts}" if bursts else "No faults"),
        flush=True,
    )


def table(summary: dict[str, dict]) -> rich.table.Table:
    """The summary as a table; a dash where there is no finite number."""
    result = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    result.add_column("\noptimizer", no_wrap=True)
    columns = {
        "final_eval_loss": ("final\neval loss", ".3f"),
        "worst_loss_jump": ("worst\nloss jump", "+.3f"),
        "worst_burst": ("worst\nburst", ".1f"),
        "spikes_seen": ("spikes\nseen", ","),
        "spikes_clipped": ("coordinates\nclipped", ","),
        "tokens_per_second": ("\ntokens/s", ",.0f"),
    }
    for heading, _ in columns.values():
        result.add_column(heading, justify="right")
    for name, values in summary.items():
        cells = [
            "-" if values[key] is None else format(values[key], style)
            for key, (_, style) in columns.items()
        ]
        result.add_row(name, *cells)
    return result


NOTES = """\
Losses are in nats per byte. Worst loss jump: the largest training loss within 40 steps
after a burst began, less the mean of the 20 steps before it. Worst burst: the largest
corrupted gradient that entered the moments, after all clipping, in units of the running
median of the gradient norm. Spikes seen: steps with 10 times that median or more."""

EXPLANATION = """\
Why SPAM alone does not stop a burst: threshold {threshold:g} limits a coordinate to
{limit:.1f} x sqrt(v), v is small after a reset and grows with what passes, so noise in
every coordinate still reached the moments at up to {left:.0f} x the usual norm. A lower
--threshold, or clip_by_global_norm before SPAM (clip_spam), closes the gap."""


def show(summary: dict[str, dict], config: RunConfig) -> None:
    """Prints the table and what to know when reading it."""
    rich.print(table(summary))
    print(NOTES)
    left = summary.get("spam", {}).get("worst_burst")
    if left is not None and left > SPIKE_FACTOR:
        limit = config.threshold**0.5
        print(EXPLANATION.format(threshold=config.threshold, limit=limit, left=left))
