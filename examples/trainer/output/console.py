"""What a run shows while it goes and when it ends."""

import math
import sys
import textwrap

import jax
import optax
import rich
import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

import spam_optax
from trainer import hosts, optimizers, training
from trainer.config import BURST_LENGTH, RunConfig
from trainer.output import analysis
from trainer.output.records import Row
from trainer.training import Task, TrainState

WIDE = 120  # of the table where there is no terminal


class StatusColumn(rich.progress.ProgressColumn):
    """The latest numbers of a run, right of its bar."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class Progress:
    """A bar for each optimizer on a terminal; elsewhere a line an evaluation.

    Only host 0 shows anything.
    """

    def __init__(self, config: RunConfig):
        self._config = config
        self._name_width = max(map(len, config.optimizers))
        self._last_step: Row = {}
        self._clipped = 0
        self._bars = None
        self._task = None
        if hosts.is_main() and sys.stdout.isatty():
            width = rich.get_console().width - self._name_width
            fixed = rich.table.Column(no_wrap=True)  # a narrow window cuts the status
            self._bars = rich.progress.Progress(
                rich.progress.TextColumn(f"{{task.description:{self._name_width}}}"),
                rich.progress.BarColumn(bar_width=max(5, width - 76)),
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
        self._clipped = int(optax.tree.get(state.opt_state, "spike_total", 0))
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
            self._clipped += row["spikes_clipped"]
            if self._bars:
                status = self._status()
                self._bars.update(self._task, completed=row["step"], status=status)
        elif hosts.is_main() and not self._bars:
            position = f"step {row['step']:>{len(str(self._config.steps))}}"
            print(
                f"{row['optimizer']:{self._name_width}} {position}/{self._config.steps}"
                f" {self._status()} validation loss {row['eval_loss']:.3f}",
                flush=True,
            )

    def _status(self) -> str:
        row = self._last_step
        share = row["flops_utilization"]
        return (
            f"loss {row['loss']:.3f} clipped {self._clipped:,}"
            f" lr {row['learning_rate']:.1e}"
            f" {analysis.number(row['tokens_per_second'], ',.0f')} tokens/s"
            + ("" if share is None else f" MFU {share:.1%}")
        )


def announce(task: Task) -> None:
    """Says what is going to be trained."""
    config = task.config
    size = sum(leaf.size for leaf in jax.tree.leaves(training.abstract_params(task)))
    devices = task.mesh.devices
    axes = " x ".join(f"{name} {length}" for name, length in task.mesh.shape.items())
    print(
        f"{config.preset} model, {size:,} parameters, on {devices.size}"
        f" {devices.flat[0].platform}{f' ({axes})' if devices.size > 1 else ''};"
        f" {work(config)}\n{faults(config)}",
        flush=True,
    )


def describe(task: Task) -> None:
    """Prints which moments the optimizers keep, in one line for equal ones."""
    params = training.abstract_params(task)
    names: dict[str, list[str]] = {}
    for name in task.config.optimizers:
        transform = optimizers.make(name, task.config).transform
        state = jax.eval_shape(transform.init, params)
        try:
            kept = moments(spam_optax.describe_tensors(state, params))
        except ValueError:
            kept = "moments of other shapes than the parameters"
        names.setdefault(kept, []).append(name)
    for kept, alike in names.items():
        print(f"{', '.join(alike)}: {kept}", flush=True)


def moments(tensors: spam_optax.TensorDescriptions) -> str:
    """The moments of an optimizer; tensors that are treated alike are named by role."""
    groups: dict[tuple, list[spam_optax.TensorDescription]] = {}
    for tensor in tensors:
        second = tensor.second_moments
        is_shared = second is not None and math.prod(second) < tensor.density * (
            math.prod(tensor.shape)
        )
        key = f"{tensor.density:.0%}", second is not None, is_shared
        groups.setdefault(key, []).append(tensor)
    if set(groups) == {("100%", True, False)}:
        return "first and second moments for every parameter"
    texts = []
    for (density, has_second, is_shared), group in groups.items():
        roles = ", ".join(dict.fromkeys(tensor.role for tensor in group))
        entries = sum(math.prod(tensor.shape) for tensor in group)
        kinds = "first and second" if has_second and not is_shared else "first"
        text = f"{kinds} moments for {density} of the {entries:,} parameters of {roles}"
        if is_shared:
            number = sum(math.prod(tensor.second_moments) for tensor in group)
            text += f", which share {number:,} second moments"
        texts.append(text)
    return "; ".join(texts)


def work(config: RunConfig) -> str:
    return (
        f"{config.steps:,} steps of {config.batch_size} x {config.sequence_length}"
        f" tokens for each of {', '.join(config.optimizers)}"
    )


def faults(config: RunConfig) -> str:
    bursts = ", ".join(
        f"{start}-{start + BURST_LENGTH - 1}" for start in config.burst_starts
    )
    return f"Faults in steps {bursts}" if bursts else "No faults"


def table(summary: dict[str, dict], config: RunConfig) -> rich.table.Table:
    """The summary as a table; a dash where there is no finite number."""
    shown = analysis.columns(summary, config)
    result = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    result.add_column("\noptimizer", no_wrap=True)
    for column in shown.values():
        result.add_column(column.heading, justify="right")
    for name, values in summary.items():
        result.add_row(name, *analysis.cells(values, shown))
    return result


def notes(summary: dict[str, dict], config: RunConfig) -> str:
    """What to know when reading the table."""
    meanings = (
        f"{' '.join(column.heading.split())}: {column.meaning}."
        for column in analysis.columns(summary, config).values()
        if column.meaning
    )
    sentences = f"Losses are in {analysis.loss_unit(config)}.", *meanings
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return textwrap.fill(text, 88)


UNCLIPPED = """\
SPAM did not clip the bursts of steps {steps}: they came at most {grace} steps after a
reset, while its moments gather a history. --bursts or --reset-interval moves them."""
EXPLANATION = """\
Why SPAM alone does not stop a burst: threshold {threshold:g} limits a coordinate to
{limit:.1f} x sqrt(v), v is small after a reset and grows with what passes, so noise in
every coordinate still reached the moments at up to {left:.0f} x the usual norm. A lower
--threshold, or clip_by_global_norm before SPAM (clip_spam), closes the gap."""


def show(summary: dict[str, dict], config: RunConfig) -> None:
    """Prints the table and what to know when reading it."""
    width = None if sys.stdout.isatty() else WIDE
    rich.console.Console(width=width).print(table(summary, config))
    print(notes(summary, config))
    left = summary.get("spam", {}).get("worst_burst")
    if left is None or left <= analysis.SPIKE_FACTOR:
        return
    if config.unclipped_bursts:
        steps = ", ".join(map(str, config.unclipped_bursts))
        grace = config.spam_intervals["grace_steps"]
        print(UNCLIPPED.format(steps=steps, grace=grace))
    else:
        limit = config.threshold**0.5
        print(EXPLANATION.format(threshold=config.threshold, limit=limit, left=left))


def warn(message: str) -> None:
    say(f"pretrain.py: {message}")


def say(message: str) -> None:
    """One line for the person at the terminal, not for what reads the output."""
    if hosts.is_main():
        print(message, file=sys.stderr, flush=True)
