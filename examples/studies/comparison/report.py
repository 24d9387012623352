"""Tables of the comparison."""

import itertools
import json
import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from studies import engine
from studies.comparison import figures, statistics
from studies.comparison.statistics import Result
from studies.task import Run, Score
from trainer import files
from trainer.model import PRESETS
from trainer.output import summary

LAYERS_OF_CURVES = 24  # of the models whose losses are drawn step by step
# Heading and explanation of each column. {best}, {name} and {text} are the score's.
COLUMNS = {
    "label": (
        "optimizer",
        "the trainer's optimizer, or a variant of it. If an experiment has only one,"
        " its tables name the model instead.",
    ),
    "best_rate": (
        "best rate",
        "the peak learning rate with the {best} {name}. A * marks the lowest or the"
        " highest rate of the sweep, beyond which a rate may be better.",
    ),
    "largest_rate": (
        "largest usable rate",
        "the largest rate at which the {name} is at most"
        f" {statistics.USABLE_MARGIN:g} from that at the best rate, and at the rates"
        " between as well.",
    ),
    "final_loss": (
        "{name}",
        "{text} at the best rate, mean over the seeds.",
    ),
    "spread": (
        "over seeds",
        "the lowest and the highest {name} of the seeds, and their number.",
    ),
    "far_loss": (
        f"at {statistics.HIGH_RATE_FACTOR} x rate",
        f"the {{name}} at {statistics.HIGH_RATE_FACTOR} times the best rate.",
    ),
    "sensitivity": (
        "LR sensitivity",
        "the mean {name} over all rates of the sweep, minus the best one (Wortsman"
        " et al., 2023). A {name} counts as the {start} before training at {most}.",
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
LOSS = Score("final loss", "the evaluation loss in nats", columns=tuple(COLUMNS))


def columns(score: Score) -> dict[str, list[str]]:
    """Returns heading and explanation of the columns that a score's tables have."""
    words = {
        "best": "lowest" if score.sign > 0 else "highest",
        "most": "most" if score.sign > 0 else "least",
        "start": score.name.removeprefix("final "),
        "name": score.name,
        "text": score.text,
    }
    known = COLUMNS | score.more
    return {key: [x.format(**words) for x in known[key]] for key in score.columns}


def write(
    study: engine.Study,
    grids: dict[str, list[Run]],
    questions: dict[str, str],
    folder: pathlib.Path,
    title: str = "Comparison",
    score: Score = LOSS,
    draw: Callable[[list[Result], list[engine.Record]], Any] = figures.draw,
) -> None:
    """Writes the tables, numbers and figures of the finished runs of experiments.

    Args:
      study: The study that made the records.
      grids: The runs of each experiment.
      questions: What each experiment asks.
      folder: The folder to write to. The records are in its folder `runs`.
      title: The heading of the page, and the name of its file.
      score: What is compared.
      draw: Makes the figure of an experiment from its results and records.
    """
    tables, numbers = [], {}
    for name, runs in grids.items():
        finished, unfinished = complete(study, runs, folder / "runs")
        found = statistics.results(finished)
        heading = f"{name}: {questions[name]}"
        tables.append(markdown(heading, found, unfinished, score))
        if found:
            numbers[name] = [result.to_json() for result in found]
            draw(found, finished).savefig(folder / f"{name}.png")
            if figures.has_depths(found):
                deep = [x for x in finished if x["layers"] == LAYERS_OF_CURVES]
                drawn = figures.figure_of_losses(deep or finished)
                drawn.savefig(folder / f"{name}_losses.png")
    text = "\n".join([f"# {title}\n", *tables, explanations(score)])
    files.replace(folder / f"{title.lower()}.md", text)
    text = json.dumps(numbers, indent=1, allow_nan=False)
    files.replace(folder / "summary.json", text + "\n")


def complete(
    study: engine.Study, runs: Sequence[Run], folder: pathlib.Path
) -> tuple[list[engine.Record], list[str]]:
    """Returns the records of complete rows, and the progress of the other rows.

    A row without some of its rates or seeds could not be compared with the others.
    """
    groups = {}
    for run in runs:
        key = (*statistics.panel_of(study.settings(run)), run.label)
        groups.setdefault(key, []).append(run)
    found, unfinished = [], []
    for (scenario, *model, label), group in groups.items():
        there = [x for x in engine.read_all(study, group, folder) if x is not None]
        if len(there) == len(group):
            found += there
        else:
            of = f"{len(there)} of {len(group)}"
            unfinished.append(f"{label} ({scenario}; {name_of_model(*model)}): {of}")
    return found, unfinished


# ------------------------------------------------------------------------- the tables


def markdown(
    heading: str,
    results: Sequence[Result],
    unfinished: Sequence[str],
    score: Score = LOSS,
) -> str:
    """Returns a heading, and a table for each scenario and model.

    If there is one optimizer only, the rows of a table are the models.
    """
    labels = {result.label for result in results}
    by_model = len(labels) == 1 and len({x.panel[1:] for x in results}) > 1
    if by_model:
        results = sorted(results, key=lambda x: (x.scenario, x.final_loss))
    parts = [f"## {heading}\n"]
    seconds = {}  # of the fastest run of any scenario: the program is the same
    for result in results:
        known = seconds.get(result.label, np.inf)
        seconds[result.label] = min(known, result.seconds_per_step or np.inf)
    headings = columns(score)
    if by_model:
        headings["label"][0] = "model"
    else:
        headings.pop("largest_rate", None)
    for (scenario, *model), group in itertools.groupby(
        results, lambda x: x.panel[:1] if by_model else x.panel
    ):
        rows = []
        for result in group:
            row = cells(result, seconds, score)
            own = {"label": name_of_model(*result.panel[1:])} if by_model else {}
            rows.append(row | own)
        shown = [key for key in headings if any(row[key] != "-" for row in rows)]
        table = [[headings[key][0] for key in shown]]
        table += [[row[key] for key in shown] for row in rows]
        name = name_of_model(*model) if model else ""
        title = f"### {scenario}" + (f"; initialization {name}" if name else "")
        parts += [title, "", *table_lines(table), ""]
    parts += spikes_by_rate(results) if "spikes_from" in score.columns else []
    if unfinished:
        parts.append(f"Unfinished runs: {'; '.join(unfinished)}.\n")
    return "\n".join(parts) + "\n"


def name_of_model(layers: int, width: int, model: str) -> str:
    """Returns initialization and options, and a shape that is not the preset tiny's."""
    tiny = PRESETS["tiny"]
    is_tiny = (layers, width) == (tiny.layers, tiny.width)
    return model if is_tiny else f"{model}, {layers} layers of width {width}"


def cells(
    result: Result, seconds: dict[str, float], score: Score = LOSS
) -> dict[str, str]:
    """Returns the row of a table; `seconds` has the step time of each optimizer."""
    number = summary.number

    def scored(loss):
        return number(None if loss is None else score.sign * loss, f".{score.digits}f")

    low, high = (result.low, result.high)[:: score.sign]
    time = seconds[result.label] / seconds.get("adam", np.inf)
    return {
        "label": result.label,
        "best_rate": f"{result.best_rate:g}{'*' if result.is_at_edge else ''}",
        "largest_rate": f"{result.largest_rate:g}",
        "final_loss": scored(result.final_loss),
        "spread": f"{scored(low)} to {scored(high)} ({result.seeds})",
        "far_loss": scored(result.far_loss),
        "sensitivity": scored(result.sensitivity),
        "spike_score": f"{result.spike_score:.2f}",
        "spikes_from": number(result.spikes_from, "g"),
        "skipped": " + ".join(f"{x:.1f}" for x in result.skipped or ()) or "-",
        "worst_jump": number(result.worst_jump, "+.3f"),
        "recovery": number(result.recovery, ".0f"),
        "diverged": f"{result.diverged} of {result.runs}",
        "bytes_per_parameter": f"{result.bytes_per_parameter:.2f}",
        "time": number(time if 0 < time < np.inf else None, ".2f"),
        **{key: number(x, ".3f") for key, x in (result.more or {}).items()},
    }


def explanations(score: Score = LOSS) -> str:
    """Returns what each column of the tables shows, in Markdown."""
    lines = [
        textwrap.fill(f"- **{heading}**: {text}", 88, subsequent_indent="  ")
        for heading, text in columns(score).values()
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
        counts = [spikes_at(result, rate) for rate in rates]
        row = [result.label, result.scenario, name_of_model(*result.panel[1:])]
        table.append([*row, *counts])
    title = "### Gradient spikes per run at each rate, mean over the seeds\n"
    note = ["In brackets: the largest norm, in robust deviations from the median.", ""]
    has_deviations = any(result.deviations for result in spiking)
    return [title, *(note if has_deviations else []), *table_lines(table), ""]


def spikes_at(result: Result, rate: float) -> str:
    """Returns the number of gradient spikes at a rate, and the largest one's size."""
    count = summary.number(result.gradient_spikes.get(rate), ".1f")
    deviation = (result.deviations or {}).get(rate)
    return count if deviation is None else f"{count} ({deviation:.0f})"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table's lines in Markdown; the first row has the headings."""
    heading, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return [heading, "|---" * len(rows[0]) + "|", *lines]
