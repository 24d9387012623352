"""Tables and figures of the comparison."""

import itertools
import json
import pathlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import matplotlib.figure
import numpy as np

from studies import engine
from studies.comparison import statistics
from studies.comparison.experiments import EXPERIMENTS
from studies.comparison.statistics import Result
from studies.comparison.study import FAULTLESS, Comparison, Run
from trainer import files
from trainer.output import summary

COLUMNS = {  # heading and explanation
    "label": ("optimizer", "the trainer's optimizer, or a variant of it."),
    "best_rate": (
        "best rate",
        "the peak learning rate with the lowest final loss. A * marks the lowest or the"
        " highest rate of the sweep, beyond which a rate may be better.",
    ),
    "final_loss": (
        "final loss",
        "the evaluation loss in nats at the best rate, mean over the seeds.",
    ),
    "spread": (
        "over seeds",
        "the lowest and the highest final loss of the seeds, and their number.",
    ),
    "far_loss": (
        f"at {statistics.HIGH_RATE_FACTOR} x rate",
        f"the final loss at {statistics.HIGH_RATE_FACTOR} times the best rate.",
    ),
    "sensitivity": (
        "LR sensitivity",
        "the mean final loss over all rates of the sweep, minus the best one (Wortsman"
        " et al., 2023). A final loss counts as the loss before training at most.",
    ),
    "spike_score": (
        "spike score %",
        "the percentage of steps whose training loss is 10 standard deviations from the"
        f" mean of the {statistics.SPIKE_WINDOW} steps before it, or of half the run if"
        " that is shorter (AdaGC). Corrupted batches do not count.",
    ),
    "spikes_from": (
        "spikes from",
        "the lowest rate at which any run has a gradient spike. That is a gradient norm"
        f" of {summary.SPIKE_FACTOR:g} times the median of the"
        f" {summary.MEDIAN_WINDOW} steps before it, in a step without a fault.",
    ),
    "worst_jump": (
        "worst jump",
        "the largest rise of the training loss in the 40 steps after a burst, mean over"
        " the seeds. It is inf if a loss was not finite. Corrupted batches do not"
        " count.",
    ),
    "recovery": (
        "steps to recover",
        "the steps from the end of the worst burst until the mean loss of"
        f" {statistics.RECOVERY_WINDOW} steps is no higher than before it, median over"
        " the seeds. It is inf if that does not happen before the next burst, or before"
        " the end of the run.",
    ),
    "skipped": (
        "steps skipped",
        "the steps that a guard skipped at the best rate, those with a fault and the"
        " others, mean over the seeds.",
    ),
    "diverged": (
        "diverged",
        "the number of runs, at any rate, that ended no better than they began.",
    ),
    "bytes_per_parameter": (
        "state bytes/param",
        "the bytes of the optimizer's state per parameter.",
    ),
    "time": (
        "step time",
        "the step time of the fastest run, relative to that of adam. Other work on the"
        " machine disturbs it.",
    ),
}
COLORS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
STYLES = ("-", "--", ":")
MARKERS = "osv"


def write(study: Comparison, grids: dict[str, list[Run]], folder: pathlib.Path) -> None:
    """Writes the tables, numbers and figures of the finished runs of experiments.

    Args:
      study: The study that made the records.
      grids: The runs of each experiment.
      folder: The folder to write to. The records are in its folder `runs`.
    """
    tables, numbers = [], {}
    for name, runs in grids.items():
        finished, unfinished = complete(study, runs, folder / "runs")
        found = statistics.results(finished)
        tables.append(markdown(name, found, unfinished))
        if found:
            numbers[name] = [result.to_json() for result in found]
            draw = figure_of_costs if is_about_faults(found) else figure
            draw(found).savefig(folder / f"{name}.png")
    text = "\n".join(["# Comparison\n", *tables, explanations()])
    files.replace(folder / "comparison.md", text)
    text = json.dumps(numbers, indent=1, allow_nan=False)
    files.replace(folder / "summary.json", text + "\n")


def complete(
    study: Comparison, runs: Sequence[Run], folder: pathlib.Path
) -> tuple[list[engine.Record], list[str]]:
    """Returns the records of complete rows, and the progress of the other rows.

    A row without some of its rates or seeds could not be compared with the others.
    """
    groups = {}
    for run in runs:
        key = run.scenario, statistics.model_of(study.settings(run)), run.label
        groups.setdefault(key, []).append(run)
    found, unfinished = [], []
    for (scenario, model, label), group in groups.items():
        there = [x for x in engine.read_all(study, group, folder) if x is not None]
        if len(there) == len(group):
            found += there
        else:
            of = f"{len(there)} of {len(group)}"
            unfinished.append(f"{label} ({scenario}; {model}): {of}")
    return found, unfinished


# ------------------------------------------------------------------------- the tables


def markdown(name: str, results: Sequence[Result], unfinished: Sequence[str]) -> str:
    """Returns an experiment's question, and a table for each scenario and model."""
    parts = [f"## {name}: {EXPERIMENTS[name].question}\n"]
    seconds = {}  # of the fastest run of any scenario: the program is the same
    for result in results:
        known = seconds.get(result.label, np.inf)
        seconds[result.label] = min(known, result.seconds_per_step or np.inf)
    for (scenario, model), group in grouped(results):
        rows = [cells(result, seconds) for result in group]
        shown = [key for key in COLUMNS if any(row[key] != "-" for row in rows)]
        table = [[COLUMNS[key][0] for key in shown]]
        table += [[row[key] for key in shown] for row in rows]
        parts += [f"### {scenario}; initialization {model}\n", *table_lines(table), ""]
    parts += spikes_by_rate(results)
    if unfinished:
        parts.append(f"Unfinished runs: {'; '.join(unfinished)}.\n")
    return "\n".join(parts) + "\n"


def cells(result: Result, seconds: dict[str, float]) -> dict[str, str]:
    """Returns the row of a table; `seconds` has the step time of each optimizer."""
    number = summary.number
    time = seconds[result.label] / seconds.get("adam", np.inf)
    return {
        "label": result.label,
        "best_rate": f"{result.best_rate:g}{'*' if result.is_at_edge else ''}",
        "final_loss": f"{result.final_loss:.3f}",
        "spread": f"{result.low:.3f} to {result.high:.3f} ({result.seeds})",
        "far_loss": number(result.far_loss, ".3f"),
        "sensitivity": number(result.sensitivity, ".3f"),
        "spike_score": f"{result.spike_score:.2f}",
        "spikes_from": number(result.spikes_from, "g"),
        "skipped": " + ".join(f"{x:.1f}" for x in result.skipped or ()) or "-",
        "worst_jump": number(result.worst_jump, "+.3f"),
        "recovery": number(result.recovery, ".0f"),
        "diverged": f"{result.diverged} of {result.runs}",
        "bytes_per_parameter": f"{result.bytes_per_parameter:.2f}",
        "time": number(time if 0 < time < np.inf else None, ".2f"),
    }


def explanations() -> str:
    """Returns what each column of the tables shows, in Markdown."""
    lines = [
        textwrap.fill(f"- **{heading}**: {text}", 88, subsequent_indent="  ")
        for heading, text in COLUMNS.values()
    ]
    return "\n".join(["## What the columns show\n", *lines, ""])


def spikes_by_rate(results: Sequence[Result]) -> list[str]:
    """Returns the lines of a table of gradient spikes; none if there are no spikes."""
    spiking = [result for result in results if result.spikes_from is not None]
    if not spiking:
        return []
    rates = sorted({rate for result in spiking for rate in result.gradient_spikes})
    table = [["optimizer", "scenario", "initialization", *(f"{r:g}" for r in rates)]]
    for result in spiking:
        counts = (result.gradient_spikes.get(rate) for rate in rates)
        row = [result.label, result.scenario, result.model]
        table.append([*row, *(summary.number(count, ".1f") for count in counts)])
    title = "### Gradient spikes per run at each rate, mean over the seeds\n"
    return [title, *table_lines(table), ""]


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table's lines in Markdown; the first row has the headings."""
    heading, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return [heading, "|---" * len(rows[0]) + "|", *lines]


def grouped(
    results: Iterable[Result],
) -> Iterator[tuple[tuple[str, str], Iterator[Result]]]:
    return itertools.groupby(results, lambda result: (result.scenario, result.model))


# ------------------------------------------------------------------------ the figures


def is_about_faults(results: Sequence[Result]) -> bool:
    """Returns whether an experiment has several kinds of faults to compare."""
    scenarios = {result.scenario for result in results}
    return "clean" in scenarios and len(scenarios - {"clean", *FAULTLESS}) > 1


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


def figure(results: Sequence[Result]) -> matplotlib.figure.Figure:
    """Draws final loss over learning rate, one panel for each scenario and model.

    If there is one optimizer only, its models share a panel.
    """
    if len({result.label for result in results}) == 1:
        common = common_beginning([x.model for x in results])
        results = [
            x._replace(label=x.model.removeprefix(common), model=x.label)
            for x in results
        ]
    panels = [(key, list(group)) for key, group in grouped(results)]
    labels = list(dict.fromkeys(result.label for result in results))
    drawn = matplotlib.figure.Figure(
        figsize=(5 * len(panels) + 2.6, 4.6), layout="constrained", dpi=150
    )
    axes = drawn.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((scenario, model), rows) in zip(axes, panels, strict=True):
        for row in rows:
            draw_curve(axis, row, labels.index(row.label))
        axis.set_xscale("log", base=2)
        rates = sorted({rate for row in rows for rate in row.curve})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        axis.set_xlabel("peak learning rate")
        axis.set_title(f"{scenario}; {model}", fontsize=10)
        axis.grid(alpha=0.3)
        best = min(row.final_loss for row in rows)
        worst = max(max(row.curve[row.best_rate]) for row in rows)
        highest = max(np.mean(losses) for row in rows for losses in row.curve.values())
        margin = 0.05 * max(highest - best, 0.1)
        top = min(highest, worst + max(0.5, 0.5 * (worst - best)))
        axis.set_ylim(best - margin, top + margin)
    axes[0].set_ylabel("final evaluation loss, nats")
    handles = {}
    for axis in axes:
        lines, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    ordered = {name: handles[name] for name in labels}
    drawn.legend(
        ordered.values(), ordered.keys(), loc="outside right upper", fontsize=8
    )
    return drawn


def common_beginning(models: Sequence[str]) -> str:
    """Returns the settings with which all models but the plain one begin."""
    plain = min(models, key=len)
    begins = all(x == plain or x.startswith(f"{plain}, ") for x in models)
    return f"{plain}, " if begins else ""


def draw_curve(axis, result: Result, number: int) -> None:
    """Draws the mean over the seeds, and the area between the lowest and the highest.

    The number decides color, style and marker.
    """
    rates = np.array(list(result.curve))
    losses = [np.array(x) for x in result.curve.values()]
    color = COLORS[number % len(COLORS)]
    axis.plot(
        rates,
        np.array([x.mean() for x in losses]),
        color=color,
        linestyle=STYLES[number // len(COLORS)],
        marker=MARKERS[number // len(COLORS)],
        markersize=4,
        label=result.label,
    )
    low, high = (np.array([f(x) for x in losses]) for f in (np.min, np.max))
    axis.fill_between(rates, low, high, color=color, alpha=0.12, linewidth=0)
