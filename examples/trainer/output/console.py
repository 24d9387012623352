"""The output on the terminal while a run goes on, and at its end."""

import math
import sys
import textwrap

import jax
import rich
import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

import spam_optax
from trainer import hosts, metrics, optimizers
from trainer.config import BURST_LENGTH, RunConfig
from trainer.output import summary
from trainer.output.sinks import Row
from trainer.train_step import Task, TrainState

TABLE_WIDTH = 120  # where there is no terminal


class StatusColumn(rich.progress.ProgressColumn):
    """Shows the latest numbers of a run, to the right of its bar."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class Progress:
    """Shows a bar per optimizer on a terminal, elsewhere a line per evaluation.

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
        """Begins to show `optimizer`, which may already be trained in part."""
        self._clipped = metrics.clipped_so_far(state.opt_state)
        if self._bars:
            for task in self._bars.tasks:
                if task.description == optimizer:  # It goes back to a checkpoint.
                    self._bars.remove_task(task.id)
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
            f" {summary.number(row['tokens_per_second'], ',.0f')} tokens/s"
            + ("" if share is None else f" MFU {share:.1%}")
        )


def print_run(task: Task) -> None:
    """Prints what is going to be trained, and on which devices."""
    config = task.config
    size = sum(leaf.size for leaf in jax.tree.leaves(task.shapes))
    devices = task.mesh.devices
    axes = " x ".join(f"{name} {length}" for name, length in task.mesh.shape.items())
    print(
        f"{config.model.preset} model, {size:,} parameters, on {devices.size}"
        f" {devices.flat[0].platform}{f' ({axes})' if devices.size > 1 else ''};"
        f" {work(config)}\n{faults(config)}",
        flush=True,
    )


def print_moments(task: Task) -> None:
    """Prints which moments the optimizers keep; equal ones share a line."""
    params = task.shapes
    names: dict[str, list[str]] = {}
    for name in task.config.optimizers:
        transform = optimizers.make(name, task.config).transform
        state = jax.eval_shape(transform.init, params)
        try:
            kept = moments(spam_optax.describe_tensors(state, params))
        except ValueError:
            kept = "no moments of the parameters' shapes"
        names.setdefault(kept, []).append(name)
    for kept, alike in names.items():
        print(f"{', '.join(alike)}: {kept}", flush=True)


def moments(tensors: spam_optax.TensorDescriptions) -> str:
    """Describes the moments of an optimizer; names tensors of one kind by role."""
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
    kinds = {
        "corrupted gradients in steps": config.burst_starts,
        "random tokens in batches": config.bad_batch_starts,
    }
    texts = [f"{kind} {ranges(starts)}" for kind, starts in kinds.items() if starts]
    return f"Faults: {'; '.join(texts)}" if texts else "No faults"


def ranges(starts: tuple[int, ...]) -> str:
    """Lists the steps of bursts."""
    return ", ".join(f"{start}-{start + BURST_LENGTH - 1}" for start in starts)


def table(summaries: dict[str, dict], config: RunConfig) -> rich.table.Table:
    """Returns the summary as a table, with a dash where no number is finite."""
    shown = summary.columns(summaries, config)
    result = rich.table.Table(box=rich.box.SIMPLE_HEAD, collapse_padding=True)
    result.add_column("\noptimizer", no_wrap=True)
    for column in shown.values():
        result.add_column(column.heading, justify="right")
    for name, values in summaries.items():
        result.add_row(name, *summary.cells(values, shown))
    return result


def notes(summaries: dict[str, dict], config: RunConfig) -> str:
    """Explains the columns of the table."""
    meanings = (
        f"{' '.join(column.heading.split())}: {column.meaning}."
        for column in summary.columns(summaries, config).values()
        if column.meaning
    )
    sentences = f"Losses are in {summary.loss_unit(config)}.", *meanings
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return textwrap.fill(text, 88)


UNCLIPPED = """\
SPAM did not clip the bursts of steps {steps}. They came less than {grace} steps after a
reset, when its moments have too little history. Move them with --bursts or
--reset-interval."""
EXPLANATION = """\
Why SPAM alone does not stop a burst: the threshold of {threshold:g} limits a coordinate
to {limit:.1f} x sqrt(v). v is small after a reset, and it grows with every fault that
passes. So noise in every coordinate still reached the moments at up to {left:.0f} x the
usual norm. Use a lower --threshold, or clip_by_global_norm before SPAM (clip_spam)."""


def print_summaries(summaries: dict[str, dict], config: RunConfig) -> None:
    """Prints the table and the explanation of its columns."""
    width = None if sys.stdout.isatty() else TABLE_WIDTH
    rich.console.Console(width=width).print(table(summaries, config))
    print(notes(summaries, config))
    left = summaries.get("spam", {}).get("worst_burst")
    if left is None or left <= summary.SPIKE_FACTOR:
        return
    if config.unclipped_bursts:
        steps = ", ".join(map(str, config.unclipped_bursts))
        grace = config.spam_intervals["grace_steps"]
        print(UNCLIPPED.format(steps=steps, grace=grace))
    else:
        limit = config.threshold**0.5
        print(EXPLANATION.format(threshold=config.threshold, limit=limit, left=left))


def warn(message: str) -> None:
    log(f"pretrain.py: {message}")


def log(message: str) -> None:
    """Prints one line to the standard error stream, on host 0 alone."""
    if hosts.is_main():
        print(message, file=sys.stderr, flush=True)
