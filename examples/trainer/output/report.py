"""report.html: the run on one page that needs nothing beside it, not even scripts."""

import base64
import dataclasses
import html
import json
import math

import numpy as np

from trainer import run_folder
from trainer.config import RunConfig, complete
from trainer.output import analysis, console, records
from trainer.output.analysis import SPIKE_SCORE, TensorSpikes
from trainer.output.records import Row, evaluations_of, steps_of
from trainer.run_folder import RunFolder

TENSORS = 10  # of an optimizer, the worst
EVALUATIONS = 20  # rows of their table
BARS = 160  # of a tensor's scores; they are as many pixels wide
HEIGHT = 28  # pixels

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --page: #fff; --faint: #6a6a70;
  --line: #d8d8dc; --bar: #0072b2; --bad: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e9; --page: #17171a;
  --faint: #a0a0a8; --line: #3a3a40; --bar: #56b4e9; --bad: #ff8a5c; } }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--text);
  background: var(--page); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
img { width: 100%; min-width: 44rem; background: #fff; border-radius: 6px; }
svg { display: block; }
.bars { stroke: var(--bar); }
.nonfinite { stroke: var(--bad); }
.limit { stroke: var(--faint); stroke-dasharray: 2 3; }
.bad { color: var(--bad); }
dt { font-weight: 600; }
dd { margin: 0 0 .6rem; }
details { margin: .8rem 0; }
"""

# Allows the page its picture and style and nothing else, whatever a name in it says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """HTML, as opposed to a text that is to be escaped."""


def element(name: str, *content, **attributes) -> Markup:
    """An HTML element; everything in it that is not Markup is escaped."""
    inside = "".join(
        part if isinstance(part, Markup) else html.escape(str(part)) for part in content
    )
    options = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{options}>{inside}</{name}>")


def table(*rows: list) -> Markup:
    """A table; the first row is its heading, and text that is too wide scrolls."""
    heading, *body = rows
    head = element("tr", *(element("th", cell) for cell in heading))
    lines = (element("tr", *(element("td", cell) for cell in row)) for row in body)
    inside = element("thead", head), element("tbody", *lines)
    return element("div", element("table", *inside), class_="wide")


def write(
    folder: RunFolder, rows: list[Row], summary: dict[str, dict], config: RunConfig
) -> None:
    """Writes the report of a run whose picture is drawn."""
    names = json.loads(folder.tensors.read_text(encoding="utf-8"))
    page = render(rows, summary, config, names, folder.picture.read_bytes())
    records.replace(folder.report, page)


def render(
    rows: list[Row],
    summary: dict[str, dict],
    config: RunConfig,
    tensor_names: list[str],
    picture: bytes,
) -> str:
    """The page; the same records give the same one."""
    title = f"Training {config.preset}: {', '.join(config.optimizers)}"
    main = element(
        "main",
        element("h1", title),
        what_was_run(summary, config),
        element("h2", "Summary"),
        summary_table(summary, config),
        figure(picture, summary),
        element("h2", "Tensors that spiked most"),
        *spike_sections(rows, summary, config, tensor_names),
        element("h2", "Validation"),
        evaluation_table(rows, summary),
        element("h2", "How to read this"),
        explanations(summary, config),
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
{element("title", title)}
<style>{STYLE}</style>
</head>
<body>
{main}
</body>
</html>
"""


def what_was_run(summary: dict[str, dict], config: RunConfig) -> Markup:
    """The run in a sentence, and its settings."""
    settings = dataclasses.asdict(config)
    usual = dataclasses.asdict(complete({"preset": config.preset}))
    changed = {k: value for k, value in settings.items() if value != usual[k]}
    missing = [name for name in config.optimizers if name not in summary]
    return element(
        "section",
        element("p", f"{console.work(config)}. {console.faults(config)}."),
        *([warning(f"Not finished: {', '.join(missing)}.")] if missing else []),
        settings_table(changed)
        if changed
        else element("p", f"All settings are defaults of the preset {config.preset}."),
        element(
            "details", element("summary", "All settings"), settings_table(settings)
        ),
    )


def warning(text: str) -> Markup:
    return element("p", text, class_="bad")


def settings_table(settings: dict) -> Markup:
    values = (
        [name, "-" if value is None else run_folder.shown(value)]
        for name, value in settings.items()
    )
    return table(["setting", "value"], *values)


def summary_table(summary: dict[str, dict], config: RunConfig) -> Markup:
    shown = analysis.columns(summary, config)
    return table(
        ["optimizer", *(column.heading for column in shown.values())],
        *([name, *analysis.cells(values, shown)] for name, values in summary.items()),
    )


def figure(picture: bytes, summary: dict[str, dict]) -> Markup:
    """The picture, inside the page."""
    losses = ", ".join(
        f"{name} halted at step {values['halted_at']:,}"
        if values["halted_at"] is not None
        else f"{name} {analysis.number(values['final_eval_loss'], '.3f')}"
        for name, values in summary.items()
    )
    data = base64.b64encode(picture).decode()
    text = html.escape(
        "Training loss, gradient norms before and after clipping, and clipped"
        f" coordinates over the steps. Final validation loss: {losses}."
    )
    image = Markup(f'<img src="data:image/png;base64,{data}" alt="{text}">')
    return element("div", image, class_="wide")


# -------------------------------------------------------------------------- tensors


def spike_sections(
    rows: list[Row],
    summary: dict[str, dict],
    config: RunConfig,
    tensor_names: list[str],
) -> list[Markup]:
    """For every optimizer the tensors that spiked most, all scores on one scale."""
    steps = {name: steps_of(rows, name) for name in summary}
    spikes = {
        name: analysis.tensor_spikes(steps[name], tensor_names) for name in summary
    }
    highest = max(
        (tensor.largest or 0.0 for found in spikes.values() for tensor in found),
        default=0.0,
    )
    scale = Scale(config.steps, math.log10(max(10 * SPIKE_SCORE, highest)))
    sections = []
    for name, found in spikes.items():
        halt = summary[name]["halted_at"]
        sections += [
            element("h3", name),
            *([] if halt is None else [halt_note(halt, steps[name][-1])]),
            spike_table(steps[name], found, scale),
        ]
    return sections


def halt_note(step: int, row: Row) -> Markup:
    what = "loss" if row["loss"] is None else "update"
    return warning(f"Halted at step {step:,}: its {what} was not finite.")


class Scale:
    """Where a step and a spike score are in a tensor's little picture."""

    def __init__(self, steps: int, decades: float):
        self.bucket = analysis.bucket_size(steps, BARS)
        self._steps = steps
        self._decades = decades  # from a score of 1, its usual value, up

    def across(self, step: float) -> str:
        return f"{step / self._steps * BARS:.1f}"

    def height(self, score: float) -> str:
        share = max(0.0, math.log10(max(score, 1.0))) / self._decades
        return f"{HEIGHT * (1 - share):.1f}"


def spike_table(steps: list[Row], found: list[TensorSpikes], scale: Scale) -> Markup:
    """The worst tensors, or a sentence if there are none."""
    worst = [tensor for tensor in found if tensor.steps][:TENSORS]
    if not worst:
        return element("p", f"No tensor had a spike score above {SPIKE_SCORE:g}.")
    numbers = analysis.column(steps, "step")
    heading = ["tensor", "steps", "not finite", "largest score", "at step", "scores"]
    return table(
        heading,
        *(
            [
                tensor.name,
                f"{tensor.steps:,}",
                f"{tensor.nonfinite:,}",
                analysis.number(tensor.largest, ",.1f"),
                analysis.number(tensor.largest_step, ","),
                bars(numbers, tensor, scale),
            ]
            for tensor in worst
        ),
    )


def bars(numbers: np.ndarray, tensor: TensorSpikes, scale: Scale) -> Markup:
    """The scores over the steps; one that is not finite is a bar up to the top."""
    at, scores = analysis.thin(numbers, tensor.scores, analysis.largest, scale.bucket)
    missing = np.isnan(tensor.scores).astype(np.float64)
    _, nonfinite = analysis.thin(numbers, missing, analysis.largest, scale.bucket)
    known = "".join(
        f"M{scale.across(step)} {HEIGHT}V{scale.height(score)}"
        for step, score in zip(at, scores, strict=True)
        if score > 1
    )
    unknown = "".join(f"M{scale.across(step)} {HEIGHT}V0" for step in at[nonfinite > 0])
    limit = f"M0 {scale.height(SPIKE_SCORE)}H{BARS}"
    return element(
        "svg",
        element("path", d=known, class_="bars"),
        element("path", d=unknown, class_="nonfinite"),
        element("path", d=limit, class_="limit"),
        viewBox=f"0 0 {BARS} {HEIGHT}",
        width=BARS,
        height=HEIGHT,
        role="img",
        aria_label=f"Spike scores of {tensor.name}",
    )


# ----------------------------------------------------------------------- validation


def evaluation_table(rows: list[Row], summary: dict[str, dict]) -> Markup:
    """Loss and perplexity of every optimizer, at up to 20 steps of the run."""
    evaluations = {
        name: {row["step"]: row for row in evaluations_of(rows, name)}
        for name in summary
    }
    steps = sorted({step for found in evaluations.values() for step in found})
    if not steps:
        return element("p", "There was no evaluation.")
    heading, lines = ["step"], {step: [f"{step:,}"] for step in evenly(steps)}
    for name, found in evaluations.items():
        heading += [f"{name}: loss", "perplexity"]
        for step, line in lines.items():
            row = found.get(step, {})
            line += [
                analysis.number(row.get("eval_loss"), ".3f"),
                analysis.number(row.get("eval_perplexity"), ",.2f"),
            ]
    return table(heading, *lines.values())


def evenly(steps: list[int]) -> list[int]:
    """Up to 20 of the steps, evenly spaced, the first and the last among them."""
    count = min(EVALUATIONS, len(steps))
    return [steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)]


def explanations(summary: dict[str, dict], config: RunConfig) -> Markup:
    meanings = {
        "Losses": f"Mean cross-entropy, in {analysis.loss_unit(config)}; perplexity is"
        " e to that.",
        **{
            column.heading: f"{column.meaning}."
            for column in analysis.columns(summary, config).values()
            if column.meaning
        },
    }
    meanings |= {
        "Spike score": "norm of a tensor's gradient over its running mean before the"
        f" step, usually near 1. Steps counts those above {SPIKE_SCORE:g}, and those"
        " whose gradient was not finite. The bars show the scores over the run, on a"
        f" logarithmic scale from 1 up, the same for all; the dotted line is"
        f" {SPIKE_SCORE:g}, red is not finite.",
        "Picture": "in the middle, the norm of the whole gradient before clipping and"
        " of what entered the moments after it. A cross marks where an optimizer"
        " halted: a step that was not finite, which was not applied.",
    }
    parts = (
        element(tag, text[0].upper() + text[1:])
        for pair in meanings.items()
        for tag, text in zip(("dt", "dd"), pair, strict=True)
    )
    caution = (
        "This is one run with one seed and one learning rate for all. To compare"
        " optimizers takes several seeds, and rates tuned for each."
    )
    return element("section", element("dl", *parts), element("p", caution))
