"""The pictures of a census: a heat map a run, and all runs side by side."""

import math
import re
from collections.abc import Sequence

import matplotlib.colors
import matplotlib.figure
import numpy as np

from studies.spike_census.census_analysis import GSS_THRESHOLD, Record
from trainer.output import summary

COLUMNS = 1000  # of a heat map at most: more than it has pixels
LOSS = "#0072B2"
SPIKES = "#D55E00"
WARMUP = "#999999"
SMOOTHING = 20  # steps
FIRST = "embed/embedding", "positions"  # rows of a heat map; then layer by layer
SCORES = GSS_THRESHOLD / 5, GSS_THRESHOLD, GSS_THRESHOLD * 2, GSS_THRESHOLD * 10


def heat_map(record: Record) -> matplotlib.figure.Figure:
    """The largest gradient spike score of every tensor and step, under the losses."""
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
    bar.set_ticks(SCORES, labels=[f"{score:g}" for score in SCORES])
    bar.minorticks_off()
    bar.ax.axhline(GSS_THRESHOLD, color="white", linewidth=1.5)
    bar.set_label(f"largest score of the tensor; above {GSS_THRESHOLD:g} is a spike")
    return figure


def draw_scores(panel, record: Record):
    """One row a tensor, in the order of depth; light: nothing was near a spike."""
    names = list(record.tensors)
    order = sorted(range(len(names)), key=lambda i: depth(names[i]))
    table = record.counts["gss_max"].T[order]
    size = summary.bucket_size(table.shape[1], COLUMNS)
    starts = np.arange(0, table.shape[1], size)
    shown = np.maximum.reduceat(table, starts, axis=1)
    colors = matplotlib.colors.LogNorm(SCORES[0], SCORES[-1])
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
    """What tensors are sorted by: what the tokens go through first comes first."""
    if tensor in FIRST:
        return 0, FIRST.index(tensor)
    layer = re.match(r"blocks\.(\d+)/", tensor)
    return (1, int(layer[1])) if layer else (2, 0)


def draw_loss(panel, record: Record) -> None:
    """Every step's, and thick a running mean; not the descent of the first steps."""
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
    """Coordinates that spiked, in every step; on an axis that shows 1 and 100,000."""
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
    """Marks where the learning rate is highest and leaves out what says nothing."""
    panel.axvline(record.warmup, color=WARMUP, linestyle=":", linewidth=1)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.get_major_locator().set_params(integer=True)


def title(record: Record) -> str:
    setting = record.setting
    halted = f", halted at step {record.halted_at:,}" if record.halted_at else ""
    return (
        f"{setting.model}, {setting.text} ({setting.tokenizer}),"
        f" {setting.batch_size} sequences a step{halted}; dotted: end of warm-up"
    )


def overview(records: Sequence[Record]) -> matplotlib.figure.Figure:
    """Loss and coordinates that spike, over the steps; a column for each model."""
    across = len({record.setting.model for record in records})
    down = len(records) // across
    figure = matplotlib.figure.Figure(
        figsize=(2.7 * across + 0.6, 2.4 * down + 0.4), dpi=110, layout="constrained"
    )
    grid = figure.add_gridspec(2 * down, across, height_ratios=[1.2, 0.8] * down)
    for number, record in enumerate(records):
        row, column = divmod(number, across)
        loss = figure.add_subplot(grid[2 * row, column])
        count = figure.add_subplot(grid[2 * row + 1, column], sharex=loss)
        draw_loss(loss, record)
        draw_counts(count, record)
        setting = record.setting
        loss.set_title(
            f"{setting.model}\n{setting.text}, {setting.batch_size} sequences a step",
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
