"""Figures of the tasks' studies: the score of optimizers, and curves of training."""

from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import matplotlib.lines
import numpy as np

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":", "-.")


def labels_of(results: Sequence[Any]) -> list[str]:
    """Returns the optimizers, those with the lowest worst loss first."""
    worst = {}
    for row in results:
        worst[row.label] = max(row.final_loss, worst.get(row.label, -np.inf))
    return sorted(worst, key=worst.get)


def color_of(number: int) -> str:
    return COLORS[number % len(COLORS)]


def by_scenario(results: Sequence[Any], score: Any) -> matplotlib.figure.Figure:
    """Draws the score at the best rate of each scenario, and the score over the rate.

    The large panel has a line for each optimizer. A small panel of each optimizer has a
    line for each scenario.
    """
    labels = labels_of(results)
    scenarios = list(dict.fromkeys(row.scenario for row in results))
    rates = sorted({rate for row in results for rate in row.curve})
    drawn = matplotlib.figure.Figure(figsize=(13, 5.5), layout="constrained", dpi=120)
    left, right = drawn.subfigures(1, 2, width_ratios=[1, 1.3])
    axis = left.subplots()
    offsets = np.linspace(-0.12, 0.12, len(labels)) if len(labels) > 1 else [0]
    for number, label in enumerate(labels):
        own = [row for row in results if row.label == label]
        places = [scenarios.index(row.scenario) + offsets[number] for row in own]
        means, low, high = (
            np.array([score.sign * getattr(row, name) for row in own])
            for name in ("final_loss", "low", "high")
        )
        axis.errorbar(
            places,
            means,
            yerr=np.abs([means - low, high - means]),
            color=color_of(number),
            marker="o",
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=label,
        )
    axis.set_xticks(range(len(scenarios)), scenarios)
    axis.set_ylabel(score.name)
    better = "lower" if score.sign > 0 else "higher"
    axis.set_title(f"each at its best rate ({better} is better)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)

    axes = add_panels(right, len(labels))
    for number, (label, panel) in enumerate(zip(labels, axes, strict=True)):
        for row in results:
            if row.label == label:
                means = [score.sign * np.mean(x) for x in row.curve.values()]
                panel.plot(
                    list(row.curve),
                    means,
                    LINES[scenarios.index(row.scenario) % len(LINES)],
                    color=color_of(number),
                    marker="o",
                    markersize=3,
                )
        panel.set_title(label, fontsize=9, color=color_of(number))
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30)
        panel.set_xticks([], minor=True)
        panel.set_ylim(*visible(results, score))
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    right.supxlabel("peak learning rate", fontsize=10)
    add_legend(right, scenarios, ["black"] * len(scenarios), LINES)
    return drawn


def columns_for(panels: int) -> int:
    return 2 if panels in (2, 4) else min(3, panels)


def add_panels(drawn, number: int) -> list:
    """Adds small panels with common axes to a figure. Places left over stay empty."""
    columns = columns_for(number)
    axes = drawn.subplots(
        -(-number // columns), columns, sharex=True, sharey=True, squeeze=False
    ).ravel()
    for panel in axes[number:]:
        panel.set_axis_off()
    for panel in axes[max(0, number - columns) : number]:
        panel.tick_params(labelbottom=True)
    return list(axes[:number])


def visible(results: Sequence[Any], score: Any) -> tuple[float, float]:
    """Returns the range to show. What is far worse than the best rates leaves it."""
    best = [x for row in results for x in row.curve[row.best_rate]]
    means = [np.mean(x) for row in results for x in row.curve.values()]
    height = max(max(best) - min(best), 1e-3)
    top = min(max(means), max(best) + 2 * height)
    ends = min(best) - 0.1 * height, top + 0.1 * height
    return tuple(sorted(score.sign * end for end in ends))


def add_legend(drawn, names: Sequence[str], colors: Sequence, lines: Sequence) -> None:
    handles = [
        matplotlib.lines.Line2D([], [], color=color, linestyle=line)
        for color, line in zip(colors, lines, strict=False)
    ]
    drawn.legend(
        handles, names, loc="outside upper center", ncols=len(names), fontsize=9
    )


def curves(
    results: Sequence[Any],
    records: Sequence[dict[str, Any]],
    name: str,
    every: int,
    scale: float,
    texts: tuple[str, str],
    marks: Sequence[float] = (),
) -> matplotlib.figure.Figure:
    """Draws a curve of training at each optimizer's best rate, in one panel for each.

    A line is the mean over the seeds, and the area goes from the lowest to the highest.

    Args:
      results: Statistics, one for each optimizer and scenario.
      records: Their records.
      name: The curve in a record, with None where there is no number.
      every: Steps from one point of the curve to the next one.
      scale: What a step counts on the horizontal axis.
      texts: Labels of the axes.
      marks: Places on the horizontal axis to draw a dotted line at.
    """
    labels = labels_of(results)
    scenarios = list(dict.fromkeys(row.scenario for row in results))
    drawn = matplotlib.figure.Figure(
        figsize=(10, 1 + 2.5 * -(-len(labels) // columns_for(len(labels)))),
        layout="constrained",
        dpi=120,
    )
    for label, panel in zip(labels, add_panels(drawn, len(labels)), strict=True):
        own = [row for row in results if row.label == label]
        for row in own:
            at_best = [
                np.array(record[name], np.float64)[every - 1 :: every]
                for record in records
                if (record["label"], record["scenario"]) == (label, row.scenario)
                and record["learning_rate"] == row.best_rate
            ]
            is_known = np.isfinite(at_best).all(axis=0)
            values = np.array(at_best)[:, is_known]
            x = scale * every * (1 + np.flatnonzero(is_known))
            color = color_of(scenarios.index(row.scenario))
            panel.plot(x, values.mean(axis=0), color=color, linewidth=1.5)
            low, high = values.min(axis=0), values.max(axis=0)
            panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        for mark in marks:
            panel.axvline(mark, color="grey", linestyle=":", linewidth=1)
        rates = " and ".join(dict.fromkeys(f"{row.best_rate:g}" for row in own))
        panel.set_title(f"{label} (rate {rates})", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    drawn.supxlabel(texts[0], fontsize=10)
    drawn.supylabel(texts[1], fontsize=10)
    add_legend(drawn, scenarios, COLORS, ["-"] * len(scenarios))
    return drawn
