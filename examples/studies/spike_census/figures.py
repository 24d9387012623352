"""Figures of a census: a heat map of each run, and all runs side by side."""

import math
import re
from collections.abc import Sequence

import matplotlib.colors
import matplotlib.figure
import numpy as np

from studies.spike_census.counting import GSS_THRESHOLD
from studies.spike_census.study import EMBEDDING, Record
from trainer.output import summary

MAX_COLUMNS = 1000  # of a heat map: more than it has pixels
LOSS = "#0072B2"
SPIKES = "#D55E00"
WARMUP = "#999999"
SMOOTHING = 20  # steps
FIRST_ROWS = EMBEDDING, "positions"  # of a heat map; the layers follow
SCORE_TICKS = GSS_THRESHOLD / 5, GSS_THRESHOLD, GSS_THRESHOLD * 2, GSS_THRESHOLD * 10


def heat_map(record: Record) -> matplotlib.figure.Figure:
    """Draws the losses, and below them the largest score of each tensor and step."""
    names, steps = list(record.tensors), len(record.loss)
    height = 0.135 * len(names)
    figure = matplotlib.figure.Figure(
        figsize=(11, 2.9 + height), dpi=110, layout="constrained"
    )
    loss, count, scores = figure.subplots(
        3, 1, sharex=True, height_ratios=[1.2, 0.9, height]
    )
    figure.suptitle(title(record), x=0.01, horizontalalignment="left")
    draw_loss(loss, record)
    draw_counts(count, record)
    loss.set_ylabel(f"loss (thick:\nmean of {SMOOTHING})")
    count.set_ylabel("coordinates\nthat spike")
    image = draw_scores(scores, record)
    scores.set_xlabel("step")
    scores.set_xlim(0.5, steps + 0.5)
    bar = figure.colorbar(image, ax=scores, pad=0.01, aspect=30, extend="both")
    bar.set_ticks(SCORE_TICKS, labels=[f"{score:g}" for score in SCORE_TICKS])
    bar.minorticks_off()
    bar.ax.axhline(GSS_THRESHOLD, color="white", linewidth=1.5)
    bar.set_label(f"largest score of the tensor; above {GSS_THRESHOLD:g} is a spike")
    return figure


def draw_scores(panel, record: Record):
    """Draws one row per tensor, in order of depth; dark cells have high scores."""
    names = list(record.tensors)
    order = sorted(range(len(names)), key=lambda i: depth(names[i]))
    table = record.counts["gss_max"].T[order]
    size = summary.bucket_size(table.shape[1], MAX_COLUMNS)
    starts = np.arange(0, table.shape[1], size)
    shown = np.maximum.reduceat(table, starts, axis=1)
    colors = matplotlib.colors.LogNorm(SCORE_TICKS[0], SCORE_TICKS[-1])
    image = panel.imshow(
        shown,
        aspect="auto",
        cmap="magma_r",
        norm=colors,
        interpolation="nearest",
        extent=(0.5, starts[-1] + size + 0.5, len(table) - 0.5, -0.5),
    )
    labels = [names[i].removesuffix("/kernel") for i in order]
    panel.set_yticks(range(len(labels)), labels, fontsize=7)
    panel.tick_params(axis="y", length=0)
    return image


def depth(tensor: str) -> tuple[int, int]:
    """Returns a sorting key: tensors that the tokens pass first come first."""
    if tensor in FIRST_ROWS:
        return 0, FIRST_ROWS.index(tensor)
    layer = re.match(r"blocks\.(\d+)/", tensor)
    return (1, int(layer[1])) if layer else (2, 0)


def draw_loss(panel, record: Record) -> None:
    """Draws each step's loss, and a thick running mean.

    The axis leaves out the descent of the first steps.
    """
    steps = np.arange(1, len(record.loss) + 1)
    panel.plot(steps, record.loss, color=LOSS, alpha=0.35, linewidth=0.7)
    window = min(SMOOTHING, len(steps))
    smooth = np.convolve(record.loss, np.ones(window) / window, "valid")
    middle = window // 2
    panel.plot(steps[middle:][: len(smooth)], smooth, color=LOSS, linewidth=1.4)
    late = record.loss[record.warmup :]
    if len(late):
        low, high = late.min(), late.max()
        margin = 0.08 * max(high - low, 0.1)
        panel.set_ylim(low - margin, high + margin)
    tidy(panel, record)


def draw_counts(panel, record: Record) -> None:
    """Draws the number of spikes of each step, on a logarithmic axis."""
    spikes = record.spikes()
    steps = np.arange(1, len(spikes) + 1)
    at = spikes > 0
    panel.vlines(steps[at], 0, spikes[at], color=SPIKES, linewidth=0.8)
    panel.set_yscale("symlog", linthresh=1)
    top = 10 ** math.ceil(math.log10(max(10, spikes.max()) + 1))
    panel.set_ylim(0, top)
    powers = range(0, round(math.log10(top)) + 1, 2)
    ticks = [10**power for power in powers]
    panel.set_yticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
    if not at.any():
        panel.text(0.5, 0.5, "none", ha="center", transform=panel.transAxes)
    tidy(panel, record)


def tidy(panel, record: Record) -> None:
    """Marks the step with the highest learning rate, and removes two of the spines."""
    panel.axvline(record.warmup, color=WARMUP, linestyle=":", linewidth=1)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.get_major_locator().set_params(integer=True)


def title(record: Record) -> str:
    setting = record.setting
    halted = f", halted at step {record.halted_at:,}" if record.halted_at else ""
    return (
        f"{setting.model}, {setting.text} ({setting.tokenizer}),"
        f" {setting.batch_size} sequences per step{halted}; dotted: end of warm-up"
    )


def text_and_batch(record: Record) -> tuple[str, int]:
    return record.setting.text, record.setting.batch_size


def overview(records: Sequence[Record]) -> matplotlib.figure.Figure:
    """Draws loss and number of spikes over the steps, one column per model."""
    columns = list(dict.fromkeys(record.setting.model for record in records))
    rows = list(dict.fromkeys(map(text_and_batch, records)))
    across, down = len(columns), len(rows)
    figure = matplotlib.figure.Figure(
        figsize=(2.7 * across + 0.6, 2.4 * down + 0.4), dpi=110, layout="constrained"
    )
    grid = figure.add_gridspec(2 * down, across, height_ratios=[1.2, 0.8] * down)
    for record in records:
        column = columns.index(record.setting.model)
        row = rows.index(text_and_batch(record))
        loss = figure.add_subplot(grid[2 * row, column])
        count = figure.add_subplot(grid[2 * row + 1, column], sharex=loss)
        draw_loss(loss, record)
        draw_counts(count, record)
        setting = record.setting
        loss.set_title(
            f"{setting.model}\n{setting.text}, {setting.batch_size} sequences per step",
            loc="left",
            fontsize=8,
        )
        loss.tick_params(labelbottom=False)
        for panel in (loss, count):
            panel.tick_params(labelsize=7)
        if not column:
            loss.set_ylabel("loss", fontsize=8)
            count.set_ylabel("spiking", fontsize=8)
        if row == down - 1:
            count.set_xlabel("step", fontsize=8)
    return figure
