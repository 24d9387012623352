"""Figures of the comparison."""

import itertools
from collections.abc import Iterable, Sequence

import matplotlib.figure
import numpy as np

from studies.comparison import statistics
from studies.comparison.statistics import Result
from studies.comparison.study import FAULTLESS
from studies.engine import Record

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":", "-.")
SMOOTH = 10  # steps
GREY = "#C8C8C8"  # of the other rows in a panel
MOST_KINDS = 2  # of lines per optimizer, up to which all optimizers are in each panel
REFERENCE = "adam"  # otherwise
MANY_RATES = 3  # of which not all have a label
COLUMNS = (4, 5, 3)  # of small panels: the first number that leaves fewest gaps
LOSS_LABEL = "final evaluation loss, nats"
RATE_LABEL = "peak learning rate"


def draw(
    results: Sequence[Result], records: Sequence[Record] = ()
) -> matplotlib.figure.Figure:
    """Draws the results of an experiment in the form that suits it."""
    del records  # the figures of the tasks need them
    if has_depths(results):
        return figure_of_depth(results)
    return figure_of_costs(results) if is_about_faults(results) else figure(results)


def has_depths(results: Sequence[Result]) -> bool:
    """Returns whether an experiment compares models of several depths."""
    return len({result.layers for result in results}) > 2


def is_about_faults(results: Sequence[Result]) -> bool:
    """Returns whether an experiment has several kinds of faults to compare."""
    scenarios = {result.scenario for result in results}
    return "clean" in scenarios and len(scenarios - {"clean", *FAULTLESS}) > 1


# -------------------------------------------------------------- loss over learning rate


def figure(results: Sequence[Result]) -> matplotlib.figure.Figure:
    """Draws final loss over learning rate, one small panel for each optimizer.

    A panel has a line for each scenario and model, in color. The lines of the other
    optimizers are grey. If that would be too many, there are only Adam's, dotted. If
    there are more models than optimizers, a panel shows a model.
    """
    labels = {result.label for result in results}
    if len(labels) < len({result.model for result in results}):
        common = common_beginning([x.model for x in results])
        results = [
            x._replace(
                label=x.model.removeprefix(common),
                model=x.label if len(labels) > 1 else "",
            )
            for x in results
        ]
    panels = by_label(results)
    kinds = sorted({x.panel for x in results})
    texts = names_of(kinds)
    drawn = matplotlib.figure.Figure(
        figsize=(10, 2.1 * rows_for(len(panels)) + 0.9), layout="constrained", dpi=150
    )
    axes = add_panels(drawn, len(panels))
    has_reference = len(kinds) > MOST_KINDS and REFERENCE in panels
    for axis, (label, own) in zip(axes, panels.items(), strict=True):
        for row in panels[REFERENCE] if has_reference else results:
            color = color_of(kinds.index(row.panel)) if has_reference else GREY
            style = ":" if has_reference else "-"
            axis.plot(*mean_curve(row), style, color=color, linewidth=0.8, zorder=1)
        for row in own:
            number = kinds.index(row.panel)
            draw_curve(axis, row, color_of(number), texts[number])
        axis.set_title(label, fontsize=9)
        axis.set_ylim(*limits(results))
    mark_rates(axes, results)
    add_legend(drawn, axes)
    return drawn


def color_of(number: int) -> str:
    return COLORS[number % len(COLORS)]


def figure_of_depth(results: Sequence[Result]) -> matplotlib.figure.Figure:
    """Draws what depth does to the loss at every learning rate.

    A small panel for each model has one line per depth. Two panels below show the
    largest usable rate and the lowest loss over the depth.
    """
    panels = by_label([x._replace(label=x.model) for x in results])
    depths = sorted({x.layers for x in results})
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, len(depths)))
    rows = rows_for(len(panels))
    drawn = matplotlib.figure.Figure(
        figsize=(10, 2.1 * rows + 4.3), layout="constrained", dpi=150
    )
    above, below = drawn.subfigures(2, height_ratios=[2.1 * rows + 0.9, 3.4])
    axes = add_panels(above, len(panels))
    for axis, (model, own) in zip(axes, panels.items(), strict=True):
        for row in sorted(own, key=lambda x: x.layers):
            shade = shades[depths.index(row.layers)]
            draw_curve(axis, row, shade, f"{row.layers} layers")
        axis.set_title(model, fontsize=9)
        axis.set_ylim(*limits(results))
    mark_rates(axes, results)
    add_legend(above, axes)
    for axis, quantity in zip(
        below.subplots(1, 2), ("largest rate", "loss"), strict=True
    ):
        for number, (model, own) in enumerate(panels.items()):
            own = sorted(own, key=lambda x: x.layers)
            values = [
                x.largest_rate if quantity == "largest rate" else x.final_loss
                for x in own
            ]
            # A line shows through the dashes of one that is equal to it.
            dashes = ("-", "--")[number % 2] if number < len(COLORS) else ":"
            axis.plot(
                [x.layers for x in own],
                values,
                color=COLORS[number % len(COLORS)],
                linestyle=dashes,
                marker="o",
                markersize=4,
                label=model,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(depths, depths)
        axis.set_xlabel("layers")
        axis.grid(alpha=0.3)
        if quantity == "loss":
            axis.set_ylabel(f"{LOSS_LABEL}, at the best rate", fontsize=8)
        else:
            axis.set_yscale("log", base=2)
            rates = sorted({rate for x in results for rate in x.curve})
            axis.set_yticks(rates, [f"{rate:g}" for rate in rates])
            axis.set_ylabel(
                f"largest rate with a loss at most\n{statistics.USABLE_MARGIN:g} nats"
                " above the lowest",
                fontsize=8,
            )
    handles, names = axis.get_legend_handles_labels()
    below.legend(handles, names, loc="outside right upper", fontsize=8)
    return drawn


def figure_of_losses(records: Sequence[Record]) -> matplotlib.figure.Figure:
    """Draws the training losses of deep models, one line for each run.

    One panel shows the best learning rate of the model that ends worst, and the other
    one four times this rate.
    """
    worst = max(statistics.results(records), key=lambda x: x.final_loss)
    models = sorted({statistics.model_of(x) for x in records} - {worst.model})
    of_worst, *others = COLORS[1], COLORS[0], *COLORS[2:]
    styles = {worst.model: {"color": of_worst}} | {
        model: {"color": color, "linestyle": line}
        for model, (line, color) in zip(
            models, itertools.product(LINES, others), strict=False
        )
    }
    drawn = matplotlib.figure.Figure(figsize=(10, 3.6), layout="constrained", dpi=150)
    axes = drawn.subplots(1, 2, sharey=True)
    for axis, factor in zip(axes, (1, statistics.HIGH_RATE_FACTOR), strict=True):
        rate = factor * worst.best_rate
        for record in records:
            if not np.isclose(record["learning_rate"], rate):
                continue
            model = statistics.model_of(record)
            losses = statistics.losses_of(record)
            smooth = np.convolve(losses, np.ones(SMOOTH) / SMOOTH, "valid")
            steps = np.arange(len(smooth)) + (SMOOTH + 1) / 2
            axis.plot(steps, smooth, **styles[model], linewidth=1.2, label=model)
        axis.set_title(f"learning rate {rate:g}", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"training loss, nats, mean of {SMOOTH} steps", fontsize=9)
    first = min(statistics.losses_of(x)[0] for x in records)
    axes[0].set_ylim(top=first)
    add_legend(drawn, axes)
    return drawn


def by_label(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Groups the results by their label; the lowest loss of a group decides order."""
    groups = {}
    for row in sorted(results, key=lambda x: x.final_loss):
        groups.setdefault(row.label, []).append(row)
    return groups


def common_beginning(models: Sequence[str]) -> str:
    """Returns the settings with which all models but the plain one begin."""
    plain = min(models, key=len)
    begins = all(x == plain or x.startswith(f"{plain}, ") for x in models)
    return f"{plain}, " if begins else ""


def names_of(kinds: Sequence[tuple]) -> list[str]:
    """Names scenarios and models by what differs between them."""
    common = common_beginning([kind[-1] for kind in kinds])
    kinds = [(*kind[:-1], kind[-1].removeprefix(common)) for kind in kinds]
    columns = list(zip(*kinds, strict=True))
    varying = [n for n, column in enumerate(columns) if len(set(column)) > 1] or [0]
    units = {1: " layers", 2: " wide"}
    return [
        "; ".join(f"{kind[n]}{units.get(n, '')}" for n in varying) for kind in kinds
    ]


def columns_for(panels: int) -> int:
    """Returns the number of columns of small panels."""
    return min(panels, min(COLUMNS, key=lambda columns: -panels % columns))


def add_panels(drawn, number: int) -> list:
    """Adds small panels with common axes to a figure. Places left over stay empty."""
    columns = columns_for(number)
    axes = drawn.subplots(
        -(-number // columns), columns, sharex=True, sharey=True, squeeze=False
    ).ravel()
    for axis in axes[number:]:
        axis.set_axis_off()
    for axis in axes[max(0, number - columns) : number]:
        axis.tick_params(labelbottom=True)
    drawn.supxlabel(RATE_LABEL, fontsize=9)
    drawn.supylabel(LOSS_LABEL, fontsize=9)
    return list(axes[:number])


def rows_for(panels: int) -> int:
    return -(-panels // columns_for(panels))


def mark_rates(axes: Sequence, results: Sequence[Result]) -> None:
    """Labels learning rates of the panels, which share their axes.

    If there are many rates, it is every second one.
    """
    rates = sorted({rate for row in results for rate in row.curve})
    rates = rates if len(rates) < MANY_RATES else rates[::2]
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(rates, [f"{x:g}" for x in rates], fontsize=8, rotation=30)
        axis.set_xticks([], minor=True)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(alpha=0.3)


def limits(results: Sequence[Result]) -> tuple[float, float]:
    """Returns the range of losses to show. A diverged run leaves the panel."""
    best = min(row.final_loss for row in results)
    worst = max(max(row.curve[row.best_rate]) for row in results)
    highest = max(np.mean(losses) for row in results for losses in row.curve.values())
    margin = 0.05 * max(highest - best, 0.1)
    top = min(highest, worst + max(0.5, 0.5 * (worst - best)))
    return best - margin, top + margin


def mean_curve(row: Result) -> tuple[list[float], list[float]]:
    """Returns the learning rates, and the mean over the seeds at each."""
    return list(row.curve), [float(np.mean(losses)) for losses in row.curve.values()]


def draw_curve(axis, row: Result, color, label: str) -> None:
    """Draws the mean over the seeds, and the area between lowest and highest."""
    rates, means = mean_curve(row)
    axis.plot(rates, means, color=color, marker="o", markersize=3, label=label)
    low, high = ([f(x) for x in row.curve.values()] for f in (np.min, np.max))
    axis.fill_between(rates, low, high, color=color, alpha=0.2, linewidth=0)


def add_legend(drawn, axes: Sequence) -> None:
    """Adds one legend for the lines of all panels, if there are several kinds."""
    handles = {}
    for axis in axes:
        lines, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    if len(handles) > 1:
        drawn.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=legend_columns(list(handles), drawn.bbox.width / drawn.dpi),
            fontsize=8,
        )


def legend_columns(names: Sequence[str], inches: float, size: float = 8) -> int:
    """Returns how many columns of a legend fit side by side."""
    widest = size * (5 + 0.55 * max(map(len, names)))  # points, with the line
    return max(1, min(len(names), int(72 * inches / widest)))


# ------------------------------------------------------------------- the cost of faults


def figure_of_costs(results: Sequence[Result]) -> matplotlib.figure.Figure:
    """Draws how much each kind of fault raises the final loss of each optimizer."""
    clean = {x.label: x.final_loss for x in results if x.scenario == "clean"}
    rows = [x for x in results if x.scenario not in FAULTLESS and x.label in clean]
    kinds = sorted({x.scenario for x in rows})
    labels = sorted(clean, key=lambda label: worst_cost(label, rows, clean))
    going = [x.final_loss - clean[x.label] for x in rows if x.diverged < x.runs]
    edge = 1.15 * max([*going, 0.01])
    drawn = matplotlib.figure.Figure(
        figsize=(9, 1.4 + 0.32 * len(labels)), layout="constrained", dpi=150
    )
    axis = drawn.subplots()
    for number, kind in enumerate(kinds):
        shift = (number - (len(kinds) - 1) / 2) * 0.16
        for has_diverged, marker in ((False, "o"), (True, ">")):
            of_kind = [
                x
                for x in rows
                if x.scenario == kind and (x.diverged == x.runs) == has_diverged
            ]
            axis.plot(
                [
                    edge if has_diverged else x.final_loss - clean[x.label]
                    for x in of_kind
                ],
                [labels.index(x.label) + shift for x in of_kind],
                marker,
                color=COLORS[number],
                markersize=6,
                clip_on=False,
                label=kind if not has_diverged else None,
            )
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlim(min([*going, 0]) - 0.01, edge)
    axis.set_xlabel("final loss with the faults minus that without, nats; > diverged")
    axis.grid(alpha=0.3)
    drawn.legend(loc="outside right upper", fontsize=8)
    return drawn


def worst_cost(
    label: str, rows: Sequence[Result], clean: dict[str, float]
) -> tuple[bool, float]:
    """Returns whether an optimizer ever diverged, and what the worst faults cost it."""
    own = [x for x in rows if x.label == label]
    ended = [x.final_loss for x in own if x.diverged < x.runs]
    return len(ended) < len(own), max(ended, default=clean[label]) - clean[label]
