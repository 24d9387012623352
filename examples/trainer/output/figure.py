"""The figure of a run: loss, gradient norms and clipped coordinates."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.axes
import matplotlib.figure
import numpy as np

from trainer.config import BURST_LENGTH, RunConfig
from trainer.optimizers import TABLE
from trainer.output import sinks, summary
from trainer.output.sinks import Row, evaluations_of, steps_of
from trainer.output.summary import column

MARKERS = {"o": "circles", "v": "triangles", "s": "squares", "D": "diamonds"}
FAULT = "#F0E442"
BAD_BATCH = "#A9C8EC"
BEFORE = "#999999"
SMOOTHING = 10  # points of a curve
PANELS_IN_A_ROW = 5
MOST_RESETS = 40  # that can be told apart
NARROWEST_FAULT = 1 / 400  # of a panel's width: in a long run three steps are nothing


class Curves(NamedTuple):
    """The rows of one optimizer, and how to draw them."""

    color: str
    style: str
    steps: list[Row]
    evaluations: list[Row]
    halted_at: int | None
    bucket: int  # steps that share a point
    rewinds: list[Row]
    taken_back: list[Row]  # the steps that rewinds took back

    def thin(self, name: str, reduce: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Returns step numbers and values of a column, thinned."""
        values = (
            summary.losses_of(self.steps)
            if name == "loss"
            else column(self.steps, name)
        )
        numbers = column(self.steps, "step")
        return summary.thin(numbers, values, reduce, self.bucket)


def draw(
    path: pathlib.Path, rows: list[Row], summaries: dict[str, dict], config: RunConfig
) -> None:
    """Draws the optimizers of a run that have finished or halted."""
    make_figure(rows, summaries, config).savefig(path)


def make_figure(
    rows: list[Row], summaries: dict[str, dict], config: RunConfig
) -> matplotlib.figure.Figure:
    bucket = summary.bucket_size(config.steps)
    curves = {
        name: Curves(
            TABLE[name].color,
            TABLE[name].line,
            steps_of(rows, name),
            evaluations_of(rows, name),
            values["halted_at"],
            bucket,
            sinks.rewinds_of(rows, name),
            sinks.taken_back(rows, name),
        )
        for name, values in summaries.items()
    }
    panels = make_panels(list(curves))
    draw_losses(panels["loss"], curves, summaries, config)
    for name, curve in curves.items():
        draw_norms(panels[name], name, curve)
    share_norm_axis([panels[name] for name in curves])
    if "spikes" in panels:
        draw_spikes(panels["spikes"], curves, config)
    for panel in panels.values():
        finish(panel, config)
    return panels["loss"].figure


def make_panels(names: list[str]) -> dict[str, matplotlib.axes.Axes]:
    """Makes panels for the losses, each optimizer's norms, and clipped coordinates.

    The last one is there if one of the optimizers is a SPAM.
    """
    across = min(len(names), PANELS_IN_A_ROW)
    rows = [names[start : start + across] for start in range(0, len(names), across)]
    rows[-1] += ["."] * (across - len(rows[-1]))
    layout = [["loss"] * across, *rows]
    heights = [4.1, *[2.7] * len(rows)]
    if any(TABLE[name].resets for name in names):
        layout.append(["spikes"] * across)
        heights.append(2.2)
    whole = matplotlib.figure.Figure(
        figsize=(11, sum(heights)), dpi=130, layout="constrained"
    )
    return whole.subplot_mosaic(layout, height_ratios=heights)


def finish(panel: matplotlib.axes.Axes, config: RunConfig) -> None:
    """Marks the faults and leaves out what carries no information."""
    width = max(BURST_LENGTH, NARROWEST_FAULT * config.steps)
    marks = (config.burst_starts, FAULT), (config.bad_batch_starts, BAD_BATCH)
    for starts, color in marks:
        for start in starts:
            left = start - 0.5
            panel.axvspan(left, left + width, color=color, alpha=0.7, linewidth=0)
    panel.set_xlim(0, config.steps)
    panel.xaxis.get_major_locator().set_params(integer=True)
    if config.steps >= 10_000:
        panel.xaxis.set_major_formatter(thousands)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("step")


def thousands(step: float, position: int) -> str:
    del position
    return f"{step / 1000:g}k" if step else "0"


def draw_losses(
    panel, curves: dict[str, Curves], summaries: dict[str, dict], config: RunConfig
) -> None:
    """Draws training losses, raw and smoothed, and validation losses."""
    low, high = loss_limits(curves, config)
    panel.set_ylim(low, high)
    panel.set_ylabel(f"loss ({summary.loss_unit(config)})")
    smoothing = SMOOTHING * summary.bucket_size(config.steps)
    marks = {
        "Yellow: corrupted gradients.": config.burst_starts,
        "Blue: batches of random tokens.": config.bad_batch_starts,
        "x: skipped by the guard.": any_skipped(curves),
        "Dotted: taken back.": any(curve.rewinds for curve in curves.values()),
    }
    panel.set_title(
        f"Training loss (thick: mean of {smoothing:,} steps). Dots, and at the right:"
        " validation loss.\n"
        + " ".join(text for text, shown in marks.items() if shown),
        loc="left",
    )
    ends = {}
    for name, curve in curves.items():
        color, style = curve.color, curve.style
        numbers, loss = curve.thin("loss", summary.mean)
        smooth = trailing_mean(loss)
        panel.plot(numbers, loss, color=color, alpha=0.2, linewidth=0.8)
        panel.plot(numbers, smooth, color=color, linestyle=style, linewidth=1.8)
        end = last_finite(smooth, (low + high) / 2)
        ends[name] = float(np.clip(end, low, high))
        draw_evaluations(panel, curve)
        draw_interventions(panel, curve, low + 0.03 * (high - low))
        mark_halt(panel, curve, ends[name])
    label_ends(panel, ends, curves, summaries)


def any_skipped(curves: dict[str, Curves]) -> bool:
    return any(row["skipped"] for curve in curves.values() for row in curve.steps)


def draw_interventions(panel, curve: Curves, height: float) -> None:
    """Marks skipped steps below the curves, and draws what rewinds took back."""
    skipped = [row["step"] for row in curve.steps if row["skipped"]]
    panel.plot(skipped, [height] * len(skipped), "x", color=curve.color, markersize=5)
    for row in curve.rewinds:
        panel.axvline(row["step"], color=curve.color, linestyle=":", linewidth=1)
        attempt = [r for r in curve.taken_back if r["rewound"] == row["rewind"]]
        panel.plot(
            column(attempt, "step"),
            trailing_mean(summary.losses_of(attempt)),
            color=curve.color,
            linestyle=":",
        )


def loss_limits(curves: dict[str, Curves], config: RunConfig) -> tuple[float, float]:
    """Limits that show the faults: without the descent of the run's first tenth."""
    parts = [curve.thin("loss", summary.mean) for curve in curves.values()]
    parts += [thin_evaluations(curve) for curve in curves.values()]
    numbers, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    known = np.isfinite(values)
    late = known & (numbers > config.steps // 10)
    values = values[late if np.any(late) else known]
    if not len(values):
        return 0.0, 1.0
    low, high = np.min(values), np.percentile(values, 99.8)
    margin = 0.05 * max(high - low, 0.1)
    return float(low - margin), float(high + margin)


def trailing_mean(values: np.ndarray, window: int = SMOOTHING) -> np.ndarray:
    """Returns the mean of up to `window` values ending at each."""
    return np.array(
        [values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))]
    )


def last_finite(values: np.ndarray, default: float) -> float:
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else default


def thin_evaluations(curve: Curves) -> tuple[np.ndarray, np.ndarray]:
    """Returns step numbers and losses of the evaluations."""
    numbers, losses = (
        column(curve.evaluations, name) for name in ("step", "eval_loss")
    )
    bucket = summary.bucket_size(len(losses))
    return summary.thin(numbers, losses, summary.mean, bucket)


def draw_evaluations(panel, curve: Curves) -> None:
    """Draws a dot for every validation loss inside the panel's limits."""
    numbers, losses = thin_evaluations(curve)
    low, high = panel.get_ylim()
    inside = (losses >= low) & (losses <= high)
    panel.scatter(
        numbers[inside],
        losses[inside],
        s=30,
        color=curve.color,
        edgecolors="white",
        clip_on=False,  # the last lies on the edge
        zorder=3,
    )


def mark_halt(panel, curve: Curves, height: float) -> None:
    """Draws a cross where the optimizer halted, if it did."""
    if curve.halted_at is not None:
        panel.plot(
            curve.halted_at, height, "X", color=curve.color, markersize=9, zorder=4
        )


def label_ends(
    panel, ends: dict[str, float], curves: dict[str, Curves], summaries: dict[str, dict]
) -> None:
    """Names at the ends of the curves, with the lines' styles where colors repeat."""
    low, high = panel.get_ylim()
    repeat = len({curve.color for curve in curves.values()}) < len(curves)
    for name, height in spread(ends, low, high).items():
        color, style = curves[name].color, curves[name].style
        place = (height - low) / (high - low)
        if repeat:
            panel.plot(
                [1.01, 1.04],
                [place, place],
                color=color,
                linestyle=style,
                linewidth=1.8,
                transform=panel.transAxes,
                clip_on=False,
            )
        panel.annotate(
            f"{name}  {final_loss(summaries[name])}",
            (1.05 if repeat else 1.01, place),
            xycoords="axes fraction",
            color=color,
            verticalalignment="center",
            annotation_clip=False,
        )


def final_loss(values: dict) -> str:
    if values["halted_at"] is not None:
        return f"halted at {values['halted_at']:,}"
    loss = values["final_eval_loss"]
    return "not finite" if loss is None else f"{loss:.3f}"


def spread(ends: dict[str, float], low: float, high: float) -> dict[str, float]:
    """Heights for labels near `ends`, far enough apart to be read."""
    gap = 0.07 * (high - low)
    heights, floor = {}, low
    for name in sorted(ends, key=ends.get):
        heights[name] = max(ends[name], floor)
        floor = heights[name] + gap
    excess = max(0.0, floor - gap - high)
    return {name: height - excess for name, height in heights.items()}


def draw_norms(panel, name: str, curve: Curves) -> None:
    """Draws the gradient norm before and after clipping."""
    numbers, before = curve.thin("grad_norm", summary.largest)
    _, after = curve.thin("clipped_grad_norm", summary.largest)
    panel.semilogy(numbers, before, color=BEFORE, linewidth=2.2)
    after = np.where(after > 0, after, np.nan)  # of a skipped step nothing enters
    panel.semilogy(numbers, after, color=curve.color, linewidth=1.0)
    skipped = [row for row in curve.steps if row["skipped"]]
    if skipped:
        where = column(skipped, "step"), column(skipped, "grad_norm")
        panel.plot(*where, "x", color=curve.color, markersize=5)
    mark_halt(panel, curve, last_finite(before, 1.0))
    panel.set_title(name, loc="left", color=curve.color)
    labels = ("before clipping", "#666666"), ("after", curve.color)
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
    """Sets one scale for all panels, with room for text above the curves."""
    limits = [panel.get_ylim() for panel in panels]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for position, panel in enumerate(panels):
        panel.set_ylim(low, high * (high / low) ** 0.25)
        if position % PANELS_IN_A_ROW:
            panel.tick_params(labelleft=False, which="both")
        else:
            panel.set_ylabel("global gradient norm")


def draw_spikes(panel, curves: dict[str, Curves], config: RunConfig) -> None:
    """Coordinates that SPAM clipped, step by step."""
    bucket = summary.bucket_size(config.steps)
    sparse = bucket == 1
    panel.set_ylabel("coordinates" if sparse else f"most in {bucket:,} steps")
    points = {
        name: curve.thin("spikes_clipped", summary.largest)
        for name, curve in curves.items()
        if any(row["spikes_clipped"] for row in curve.steps)
    }
    draw_resets(panel, config, any_skipped({name: curves[name] for name in points}))
    shown = zip(points.items(), MARKERS.items(), strict=False)
    for offset, ((name, (numbers, counts)), (marker, word)) in enumerate(shown):
        color = curves[name].color
        numbers, counts = numbers[counts > 0], counts[counts > 0]
        if sparse:
            panel.vlines(numbers, 0, counts, color=color, linewidth=0.8)
        panel.plot(
            numbers,
            counts,
            marker,
            color=color,
            fillstyle="none",
            markersize=5 if sparse else 2,
        )
        panel.annotate(
            f"{name} ({word})",
            (1.01, 0.75 - 0.2 * offset),
            xycoords="axes fraction",
            color=color,
            annotation_clip=False,
        )
    if not points:
        panel.text(0.5, 0.5, "none", ha="center", transform=panel.transAxes)
    panel.set_yscale("symlog", linthresh=1)
    highest = max((counts.max() for _, counts in points.values()), default=1)
    panel.set_ylim(0, 3 * highest)


def draw_resets(panel, config: RunConfig, has_skips: bool) -> None:
    """Lines where SPAM's momentum resets, and the title that explains them.

    Inside a guard the resets come later, by the number of skipped steps.
    """
    interval = config.spam_intervals["reset_interval"]
    resets = range(interval, config.steps, interval)
    if len(resets) <= MOST_RESETS:
        for reset in resets:
            panel.axvline(reset, color=BEFORE, linestyle=":", linewidth=1.2)
        when = "Dotted: its momentum resets"
    else:
        when = f"Its momentum resets every {interval:,} steps"
    grace = config.spam_intervals["grace_steps"]
    title = (
        f"Coordinates that SPAM clipped. {when};"
        f" nothing is clipped in the {grace} steps after one."
    )
    if has_skips:
        title += (
            "\nInside a guard, skipped steps do not count, and the resets come later."
        )
    panel.set_title(title, loc="left")
