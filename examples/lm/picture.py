"""The picture of a run: loss, gradient norms and clipped coordinates."""

import pathlib

import matplotlib.axes
import matplotlib.figure
import numpy as np

from lm.analysis import column
from lm.config import BURST_LENGTH, RunConfig
from lm.records import Row, steps_of

# Okabe and Ito's palette: told apart with any colour vision, and in grey by the styles.
STYLES = {
    "adam": ("#D55E00", "-"),
    "adam_clip": ("#0072B2", "--"),
    "spam": ("#009E73", "-"),
    "clip_spam": ("#000000", "--"),
}
FAULT = "#F0E442"
BEFORE = "#999999"
SMOOTHING = 10  # steps


def draw(
    path: pathlib.Path, rows: list[Row], summary: dict[str, dict], config: RunConfig
) -> None:
    """Draws the finished optimizers of a run."""
    steps = {name: steps_of(rows, name) for name in summary}
    figure = matplotlib.figure.Figure(figsize=(11, 9), dpi=130, layout="constrained")
    names = list(steps)
    panels = figure.subplot_mosaic(
        [["loss"] * len(names), names, ["spikes"] * len(names)],
        height_ratios=(3, 2, 1.6),
    )
    draw_losses(panels["loss"], steps, summary)
    norm_panels = [panels[name] for name in names]
    for name, panel in zip(names, norm_panels, strict=True):
        draw_norms(panel, name, steps[name])
    share_norm_axis(norm_panels)
    draw_spikes(panels["spikes"], steps, config)
    for panel in panels.values():
        finish(panel, config)
    figure.savefig(path)


def finish(panel: matplotlib.axes.Axes, config: RunConfig) -> None:
    """Marks the faults and leaves out what carries no information."""
    for start in config.burst_starts:
        end = start + BURST_LENGTH
        panel.axvspan(start - 0.5, end - 0.5, color=FAULT, alpha=0.7, linewidth=0)
    panel.set_xlim(0, config.steps)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("step")


def draw_losses(panel, steps: dict[str, list[Row]], summary: dict[str, dict]) -> None:
    """Training losses, raw and smoothed, labelled at their ends."""
    losses = {name: column(rows, "loss") for name, rows in steps.items()}
    ends = {}
    for name, loss in losses.items():
        color, style = STYLES[name]
        numbers = np.arange(1, len(loss) + 1)
        smooth = trailing_mean(loss)
        panel.plot(numbers, loss, color=color, alpha=0.2, linewidth=0.8)
        panel.plot(numbers, smooth, color=color, linestyle=style, linewidth=1.8)
        ends[name] = smooth[-1]
    low, high = loss_limits(losses)
    panel.set_ylim(low, high)
    panel.set_ylabel("training loss (nats per byte)")
    panel.set_title(
        f"Training loss (thick: mean of {SMOOTHING} steps). Yellow: faults."
        " At the right: validation loss at the end.",
        loc="left",
    )
    for name, height in spread(ends, low, high).items():
        loss = summary[name]["final_eval_loss"]
        panel.annotate(
            f"{name}  {'not finite' if loss is None else format(loss, '.3f')}",
            (1.01, (height - low) / (high - low)),
            xycoords="axes fraction",
            color=STYLES[name][0],
            verticalalignment="center",
            annotation_clip=False,
        )


def loss_limits(losses: dict[str, np.ndarray]) -> tuple[float, float]:
    """Limits that show the faults: without the descent of the first steps."""
    values = np.concatenate([loss[len(loss) // 10 :] for loss in losses.values()])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = np.min(values), np.percentile(values, 99.8)
    margin = 0.05 * max(high - low, 0.1)
    return float(low - margin), float(high + margin)


def spread(ends: dict[str, float], low: float, high: float) -> dict[str, float]:
    """Heights for labels near `ends`, far enough apart to be read."""
    gap = 0.07 * (high - low)
    middle = (low + high) / 2
    wanted = {
        name: float(np.clip(end, low, high)) if np.isfinite(end) else middle
        for name, end in ends.items()
    }
    heights, floor = {}, low
    for name in sorted(wanted, key=wanted.get):
        heights[name] = max(wanted[name], floor)
        floor = heights[name] + gap
    excess = max(0.0, floor - gap - high)
    return {name: height - excess for name, height in heights.items()}


def trailing_mean(values: np.ndarray, window: int = SMOOTHING) -> np.ndarray:
    """Mean of up to `window` values ending at each."""
    return np.array(
        [values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))]
    )


def draw_norms(panel, name: str, rows: list[Row]) -> None:
    """Gradient norm before and after clipping."""
    numbers = [row["step"] for row in rows]
    color, _ = STYLES[name]
    before, after = column(rows, "grad_norm"), column(rows, "clipped_grad_norm")
    panel.semilogy(numbers, before, color=BEFORE, linewidth=2.2)
    panel.semilogy(numbers, after, color=color, linewidth=1.0)
    panel.set_title(name, loc="left", color=color)
    labels = ("before clipping", "#666666"), ("after", color)
    for line, (label, label_color) in enumerate(labels):
        panel.text(
            0.99,
            0.98 - 0.1 * line,
            label,
            color=label_color,
            horizontalalignment="right",
            verticalalignment="top",
            transform=panel.transAxes,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def share_norm_axis(panels: list[matplotlib.axes.Axes]) -> None:
    """One scale for all, with room for the words above the curves."""
    limits = [panel.get_ylim() for panel in panels]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for panel in panels:
        panel.set_ylim(low, high * (high / low) ** 0.25)
    for panel in panels[1:]:
        panel.set_yticklabels([])
    panels[0].set_ylabel("global gradient norm")


def draw_spikes(panel, steps: dict[str, list[Row]], config: RunConfig) -> None:
    """Coordinates that SPAM clipped, step by step."""
    panel.set_ylabel("coordinates")
    grace = config.spam_intervals["grace_steps"]
    panel.set_title(
        "Coordinates that SPAM clipped. Dotted: its momentum resets;"
        f" nothing is clipped in the {grace} steps after one.",
        loc="left",
    )
    interval = config.spam_intervals["reset_interval"]
    for reset in range(interval, config.steps, interval):
        panel.axvline(reset, color=BEFORE, linestyle=":", linewidth=1.2)
    shown = {
        name: column(rows, "spikes_clipped")
        for name, rows in steps.items()
        if any(row["spikes_clipped"] for row in rows)
    }
    highest = max((counts.max() for counts in shown.values()), default=1)
    for offset, (name, counts) in enumerate(shown.items()):
        numbers = np.flatnonzero(counts) + 1
        color, _ = STYLES[name]
        marker = "ov"[offset % 2]
        panel.vlines(numbers, 0, counts[numbers - 1], color=color, linewidth=0.8)
        panel.plot(
            numbers, counts[numbers - 1], marker, color=color, fillstyle="none", ms=5
        )
        panel.annotate(
            f"{name} ({'circles' if marker == 'o' else 'triangles'})",
            (1.01, 0.75 - 0.2 * offset),
            xycoords="axes fraction",
            color=color,
            annotation_clip=False,
        )
    if not shown:
        panel.text(0.5, 0.5, "none", ha="center", transform=panel.transAxes)
    panel.set_yscale("symlog", linthresh=1)
    panel.set_ylim(0, 3 * highest)
