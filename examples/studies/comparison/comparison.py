"""What a comparison showed: statistics of many runs, their table and picture."""

import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from spam_optax import functional
from studies.comparison.experiments import Experiment, Spec
from trainer.config import BURST_LENGTH, RunConfig
from trainer.output import summary

Record = dict[str, Any]  # of one run, as single_run.Program returns it

SPIKE_WINDOW = 100  # steps that a loss is judged by
RECOVERY_WINDOW = 10  # steps whose mean loss must be back
FAR = 4  # times the best learning rate


class Line(NamedTuple):
    """One row of the table: all runs of one optimizer under like conditions."""

    label: str
    scenario: str
    model: str
    best_rate: float  # peak learning rate with the lowest mean final loss
    is_at_edge: bool  # whether the best is the lowest or highest rate swept
    final_loss: float  # evaluation loss at the best rate: mean over the seeds
    low: float  # the lowest of the seeds
    high: float  # the highest
    seeds: int
    far_loss: float | None  # at FAR times the best rate, if that was swept
    sensitivity: float | None  # mean over the rates of the loss less the best one
    spike_score: float  # percent of steps whose loss spikes, at the best rate
    # After a burst, at the best rate; None where none can be seen, and infinite:
    worst_jump: float | None  # mean over the seeds; a loss was not finite
    recovery: float | None  # steps: median over the seeds; the loss never came back
    diverged: int  # runs of all rates that ended above their first loss
    runs: int
    bytes_per_parameter: float  # of optimizer state
    seconds_per_step: float  # of the fastest run, the least disturbed
    curve: dict[float, list[float]]  # rate -> final losses of the seeds, capped
    gradient_spikes: dict[float, float]  # rate -> steps of a run that spike, mean

    @property
    def spikes_from(self) -> float | None:
        """The lowest rate at which a gradient spikes in any of the seeds."""
        return min((r for r, n in self.gradient_spikes.items() if n), default=None)


def read(
    folder: pathlib.Path, specs: Iterable[Spec], digest: str
) -> tuple[list[Record], list[str]]:
    """The records of the lines that are whole, and how far the others have come.

    A line with some of its rates or seeds would not compare with the others.
    """
    groups = {}
    for spec in specs:
        key = spec.scenario, model_of(spec.settings()), spec.label
        groups.setdefault(key, []).append(spec.read(folder, digest))
    records, unfinished = [], []
    for (scenario, model, label), group in groups.items():
        there = [record | record["settings"] for record in group if record]
        if len(there) == len(group):
            records += there
        else:
            of = f"{len(there)} of {len(group)}"
            unfinished.append(f"{label} ({scenario}; {model}): {of}")
    return records, unfinished


def capped_loss(record: Record) -> float:
    """The final evaluation loss; a diverged run's is that of its initialization."""
    final, first = record["final_eval_loss"], record["first_eval_loss"]
    return first if final is None else min(final, first)


def diverged(record: Record) -> bool:
    final = record["final_eval_loss"]
    return final is None or final >= record["first_eval_loss"]


def burst_starts(record: Record) -> tuple[int, ...]:
    if record["scenario"] == "clean":
        return ()
    return RunConfig(steps=record["steps"], bursts=record["bursts"]).burst_starts


def fault_steps(record: Record) -> np.ndarray:
    """Counted from 0; none in a clean run."""
    starts = np.array(burst_starts(record), int)
    return np.add.outer(starts - 1, range(BURST_LENGTH)).ravel()


def losses_of(record: Record) -> np.ndarray:
    return np.array(record["losses"], np.float64)


def recovery_steps(record: Record) -> float | None:
    """Steps from the worst burst's end until the loss is back where it was.

    Back is when the mean of ten steps is no higher than that of the 20 steps before the
    burst; infinite if that does not happen before the next burst or the end. None if
    there is no burst, or too few steps after any.
    """
    losses, starts = losses_of(record), burst_starts(record)
    steps = []
    for start, next_start in itertools.pairwise([*starts, len(losses) + 1]):
        before = losses[max(0, start - 1 - summary.STEPS_BEFORE_FAULT) : start - 1]
        after = losses[start - 1 + BURST_LENGTH : next_start - 1]
        if len(after) < RECOVERY_WINDOW or not len(before):
            continue
        means = np.lib.stride_tricks.sliding_window_view(after, RECOVERY_WINDOW)
        back = np.flatnonzero(means.mean(axis=1) <= before.mean())
        steps.append(float(back[0]) if len(back) else np.inf)
    return max(steps, default=None)


def has_corrupted_batches(record: Record) -> bool:
    """Whether the losses of the bursts are those of random tokens."""
    return record["scenario"] == "batches"


def spike_percent(record: Record) -> float:
    """Of the steps whose batch was not corrupted."""
    losses = np.nan_to_num(losses_of(record), nan=np.inf).astype(np.float32)
    if has_corrupted_batches(record):
        losses = np.delete(losses, fault_steps(record))
    window = min(SPIKE_WINDOW, len(losses) // 2)
    return float(functional.spike_score(losses, window=window))


def gradient_spikes(record: Record) -> int:
    """Steps whose gradient norm is 10 times its running median, but for the faults."""
    norms = np.array(record["gradient_norms"], np.float64)
    return int(np.delete(summary.find_spikes(norms), fault_steps(record)).sum())


def worst_jump(record: Record) -> float | None:
    """Infinite if a loss is not finite, before a burst or after it."""
    skipped = BURST_LENGTH if has_corrupted_batches(record) else 1
    jump = summary.worst_loss_jump(losses_of(record), burst_starts(record), skipped)
    return np.inf if jump is not None and np.isnan(jump) else jump


def model_of(record: Record) -> str:
    """The settings of the model that experiments change."""
    head = ", untied head" if record["untied_head"] else ""
    return f"{record['initialization']}, {record['embedding']}{head}"


def lines(records: Iterable[Record]) -> list[Line]:
    """A line for every optimizer, scenario and model, the best first."""

    def key(record):
        return record["scenario"], model_of(record), record["label"]

    groups = itertools.groupby(sorted(records, key=key), key)
    found = [line(list(group)) for _, group in groups]
    return sorted(found, key=lambda line: (line.scenario, line.model, line.final_loss))


def line(records: Sequence[Record]) -> Line:
    """The statistics of runs that differ in learning rate and seed."""
    by_rate = {}
    for record in sorted(records, key=lambda r: (r["learning_rate"], r["seed"])):
        by_rate.setdefault(record["learning_rate"], []).append(record)
    curve = {rate: [capped_loss(r) for r in rs] for rate, rs in by_rate.items()}
    means = {rate: float(np.mean(losses)) for rate, losses in curve.items()}
    best = min(means, key=means.get)
    at_best = by_rate[best]
    far = next((means[rate] for rate in means if np.isclose(rate, FAR * best)), None)
    first = records[0]
    jumps = [worst_jump(r) for r in at_best]
    recoveries = [recovery_steps(r) for r in at_best]
    return Line(
        label=first["label"],
        scenario=first["scenario"],
        model=model_of(first),
        best_rate=best,
        is_at_edge=best in (min(means), max(means)),
        final_loss=means[best],
        low=min(curve[best]),
        high=max(curve[best]),
        seeds=len(at_best),
        far_loss=far,
        sensitivity=sensitivity(means),
        spike_score=float(np.mean([spike_percent(r) for r in at_best])),
        worst_jump=None if None in jumps else float(np.mean(jumps)),
        recovery=None if None in recoveries else float(np.median(recoveries)),
        diverged=sum(map(diverged, records)),
        runs=len(records),
        bytes_per_parameter=first["optimizer_bytes"] / first["parameters"],
        seconds_per_step=min(r["seconds_per_step"] for r in records),
        curve=curve,
        gradient_spikes={
            rate: float(np.mean([gradient_spikes(r) for r in rs]))
            for rate, rs in by_rate.items()
        },
    )


def to_json(line: Line) -> dict[str, Any]:
    """As JSON, which knows no infinity: "inf" in its place. None is of no number."""
    values = line._asdict().items()
    return {name: "inf" if value == np.inf else value for name, value in values}


def sensitivity(means: dict[float, float]) -> float | None:
    """Mean over the rates of the loss, less the lowest; None of a single rate."""
    losses = list(means.values())
    return float(np.mean(losses)) - min(losses) if len(losses) > 1 else None


# -------------------------------------------------------------------------- the table

HEADINGS = {
    "label": "optimizer",
    "best_rate": "best rate",
    "final_loss": "final loss",
    "spread": "over seeds",
    "far_loss": f"at {FAR} x rate",
    "sensitivity": "LR sensitivity",
    "spike_score": "spike score %",
    "spikes_from": "spikes from",
    "worst_jump": "worst jump",
    "recovery": "steps to recover",
    "diverged": "diverged",
    "bytes_per_parameter": "state bytes/param",
    "time": "step time",
}
NOTES = f"""\
Final loss: evaluation loss in nats at the optimizer's own best learning rate, mean over
the seeds, whose lowest and highest are beside it; a rate marked * is the lowest or
highest that was swept. At {FAR} x rate: the final loss at {FAR} times the best rate. LR
sensitivity (Wortsman et al., 2023): mean over all swept rates of the final loss, capped
at the loss of initialization, less the best. Spike score (AdaGC): percent of the steps
whose training loss is 10 deviations from the mean of the {SPIKE_WINDOW} steps before,
or of half the run's if they are fewer. Spikes from: the lowest of the swept rates at
which, in any run, a gradient's norm was {summary.SPIKE_FACTOR:g} times the median of
the {summary.MEDIAN_WINDOW} before, in a step without a fault. Worst jump: rise of the
training loss within 40 steps after a burst, mean over the seeds; inf: it was not
finite. Neither counts the loss of a batch that was corrupted. Steps to recover: from a
burst's end until the mean loss of {RECOVERY_WINDOW} steps is no higher than before it,
the worst burst's, median over the seeds; inf: not before the next burst or the end.
Diverged: runs, of all rates, that ended no better than they began. Step time: of the
fastest run, as a multiple of adam's; other work on the machine disturbs it.
"""


def cells(line: Line, seconds: dict[str, float]) -> dict[str, str]:
    number = summary.number
    time = seconds[line.label] / seconds["adam"] if "adam" in seconds else None
    return {
        "label": line.label,
        "best_rate": f"{line.best_rate:g}{'*' if line.is_at_edge else ''}",
        "final_loss": f"{line.final_loss:.3f}",
        "spread": f"{line.low:.3f} to {line.high:.3f} ({line.seeds})",
        "far_loss": number(line.far_loss, ".3f"),
        "sensitivity": number(line.sensitivity, ".3f"),
        "spike_score": f"{line.spike_score:.2f}",
        "spikes_from": number(line.spikes_from, "g"),
        "worst_jump": number(line.worst_jump, "+.3f"),
        "recovery": number(line.recovery, ".0f"),
        "diverged": f"{line.diverged} of {line.runs}",
        "bytes_per_parameter": f"{line.bytes_per_parameter:.2f}",
        "time": number(time, ".2f"),
    }


def markdown(
    name: str,
    experiment: Experiment,
    found: Sequence[Line],
    unfinished: Sequence[str],
) -> str:
    """The experiment's question, and a table for every scenario and model."""
    parts = [f"## {name}: {experiment.question}\n"]
    fastest = {}  # of any scenario: the program is the same
    for line in found:
        seconds = fastest.get(line.label, line.seconds_per_step)
        fastest[line.label] = min(seconds, line.seconds_per_step)
    for (scenario, model), group in grouped(found):
        rows = list(group)
        table = [cells(row, fastest) for row in rows]
        shown = [key for key in HEADINGS if any(row[key] != "-" for row in table)]
        parts.append(f"### {scenario}; initialization {model}\n")
        parts.append(markdown_row([HEADINGS[key] for key in shown]))
        parts.append("|---" * len(shown) + "|")
        parts += [markdown_row([row[key] for key in shown]) for row in table]
        parts.append("")
    parts += spikes_by_rate(found)
    if unfinished:
        parts.append(f"Runs that are not finished: {'; '.join(unfinished)}.\n")
    return "\n".join(parts) + "\n"


def spikes_by_rate(found: Sequence[Line]) -> list[str]:
    """A table of the lines with gradient spikes; nothing if there are none."""
    spiking = [line for line in found if line.spikes_from is not None]
    if not spiking:
        return []
    rates = sorted({rate for line in spiking for rate in line.gradient_spikes})
    heading = ["optimizer", "scenario", "initialization", *(f"{r:g}" for r in rates)]
    rows = [
        [
            line.label,
            line.scenario,
            line.model,
            *(summary.number(line.gradient_spikes.get(r), ".1f") for r in rates),
        ]
        for line in spiking
    ]
    return [
        "### Gradient spikes in a run, mean over the seeds, at each rate\n",
        markdown_row(heading),
        "|---" * len(heading) + "|",
        *map(markdown_row, rows),
        "",
    ]


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def grouped(found: Iterable[Line]):
    return itertools.groupby(found, lambda line: (line.scenario, line.model))


# ------------------------------------------------------------------------ the picture

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


def picture(found: Sequence[Line]) -> matplotlib.figure.Figure:
    """Final loss over learning rate, a panel for every scenario and model.

    Of one optimizer, the models are in one panel.
    """
    if len({line.label for line in found}) == 1:
        found = [line._replace(label=line.model, model=line.label) for line in found]
    panels = [(key, list(group)) for key, group in grouped(found)]
    labels = list(dict.fromkeys(line.label for line in found))
    figure = matplotlib.figure.Figure(
        figsize=(5 * len(panels) + 2.6, 4.6), layout="constrained", dpi=150
    )
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, ((scenario, model), rows) in zip(axes, panels, strict=True):
        for row in rows:
            draw_curve(axis, row, labels.index(row.label))
        axis.set_xscale("log", base=2)
        rates = sorted({rate for row in rows for rate in row.curve})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        axis.set_xlabel("peak learning rate")
        axis.set_title(f"{scenario}; {model}", fontsize=10)
        axis.grid(alpha=0.3)
    best = min(row.final_loss for row in found)
    worst = max(max(row.curve[row.best_rate]) for row in found)
    axes[0].set_ylim(best - 0.05, worst + max(0.5, 0.5 * (worst - best)))
    axes[0].set_ylabel("final evaluation loss, nats")
    handles = {}
    for axis in axes:
        lines, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    ordered = {name: handles[name] for name in labels}
    figure.legend(
        ordered.values(), ordered.keys(), loc="outside right upper", fontsize=8
    )
    return figure


def draw_curve(axis, row: Line, number: int) -> None:
    """Mean over the seeds, from the lowest to the highest of them."""
    rates = np.array(list(row.curve))
    losses = [np.array(x) for x in row.curve.values()]
    mean = np.array([x.mean() for x in losses])
    color = COLORS[number % len(COLORS)]
    axis.plot(
        rates,
        mean,
        color=color,
        linestyle=STYLES[number // len(COLORS)],
        marker=MARKERS[number // len(COLORS)],
        markersize=4,
        label=row.label,
    )
    low, high = (np.array([f(x) for x in losses]) for f in (np.min, np.max))
    axis.fill_between(rates, low, high, color=color, alpha=0.12, linewidth=0)
