"""report.md: the results of a run as Markdown tables, with the figure."""

import json

import numpy as np

from trainer import files, run_folder
from trainer.config import RunConfig
from trainer.output import console, sinks, summary
from trainer.output.sinks import Row, evaluations_of, steps_of
from trainer.output.summary import SPIKE_SCORE, TensorSpikes
from trainer.run_folder import RunFolder

TENSORS = 10  # rows of a table of tensors
SKIPPED = 30  # steps that are listed
EVALUATIONS = 20  # rows of the table of evaluations


def write(
    folder: RunFolder, rows: list[Row], summaries: dict[str, dict], config: RunConfig
) -> None:
    """Writes the report of a run, beside its figure."""
    names = json.loads(folder.tensors.read_text(encoding="utf-8"))
    text = render(rows, summaries, config, names, folder.figure.name)
    files.replace(folder.report, text)


def render(
    rows: list[Row],
    summaries: dict[str, dict],
    config: RunConfig,
    tensor_names: list[str],
    figure: str,
) -> str:
    """Returns the report as Markdown; `figure` is the file name of the figure."""
    missing = [name for name in config.optimizers if name not in summaries]
    settings = config.settings()
    defaults = RunConfig.from_settings(preset=config.model.preset).settings()
    changed = {k: value for k, value in settings.items() if value != defaults[k]}
    parts = [
        f"# Training {config.model.preset}: {', '.join(config.optimizers)}",
        f"{console.work(config)}. {console.faults(config)}.",
        *([f"**Not finished: {', '.join(missing)}.**"] if missing else []),
        "## Summary",
        summary_table(summaries, config),
        f"![loss, gradient norms and clipped coordinates]({figure})",
        explanations(summaries, config),
        "## Tensors that spiked most",
        *spike_sections(rows, summaries, tensor_names),
        "## Validation",
        evaluation_table(rows, summaries),
        "## Settings",
        f"These settings differ from the defaults of the preset {config.model.preset}."
        if changed
        else f"All settings are defaults of the preset {config.model.preset}.",
        *([settings_table(changed)] if changed else []),
        "All settings:",
        settings_table(settings),
    ]
    return "\n\n".join(parts) + "\n"


def table(heading: list[str], *rows: list[str]) -> str:
    """Returns a Markdown table; the first column is text, the others are numbers."""
    lines = heading, ["---", *["---:"] * (len(heading) - 1)], *rows
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(text: str) -> str:
    """Formats a text as one line inside a table."""
    return " ".join(text.split()).replace("|", "\\|")


def settings_table(settings: dict) -> str:
    values = (
        [name, "-" if value is None else run_folder.shown(value)]
        for name, value in settings.items()
    )
    return table(["setting", "value"], *values)


def summary_table(summaries: dict[str, dict], config: RunConfig) -> str:
    shown = summary.columns(summaries, config)
    return table(
        ["optimizer", *(column.heading for column in shown.values())],
        *([name, *summary.cells(values, shown)] for name, values in summaries.items()),
    )


def explanations(summaries: dict[str, dict], config: RunConfig) -> str:
    """Explains the columns of the summary, and how far the result carries."""
    return (
        f"{console.notes(summaries, config)}\n\n"
        "This is one run with one seed and one learning rate for all. A comparison of"
        " optimizers takes several seeds, and rates tuned for each."
    )


def spike_sections(
    rows: list[Row], summaries: dict[str, dict], tensor_names: list[str]
) -> list[str]:
    """Returns, for every optimizer, the tensors that spiked most."""
    sections = [
        "The spike score is the norm of a tensor's gradient over its running mean"
        " before the step, usually near 1. The column steps counts those with a score"
        f" above {SPIKE_SCORE:g} or a gradient that was not finite."
    ]
    for name, values in summaries.items():
        steps = steps_of(rows, name)
        sections.append(f"### {name}")
        if values["halted_at"] is not None:
            what = "loss" if steps[-1]["loss"] is None else "update"
            step = f"{values['halted_at']:,}"
            sections.append(f"**Halted at step {step}: its {what} was not finite.**")
        sections += interventions(rows, name)
        sections.append(spike_table(summary.tensor_spikes(steps, tensor_names)))
    return sections


def interventions(rows: list[Row], name: str) -> list[str]:
    """Describes the steps that the guard skipped, and the rewinds."""
    texts = [
        f"**Went back from step {row['rewound_from']:,} to step {row['step']:,}:"
        f" {row['reason']}; {row['batches_left_out']:,} batches were left out.**"
        for row in sinks.rewinds_of(rows, name)
    ]
    skipped = [row for row in steps_of(rows, name) if row["skipped"]]
    if skipped:
        first = ", ".join(
            f"{row['step']} ({row['skipped']}"
            + (f", batch {row['batch']})" if row["batch"] != row["step"] else ")")
            for row in skipped[:SKIPPED]
        )
        more = f", and {len(skipped) - SKIPPED} more" if len(skipped) > SKIPPED else ""
        texts.append(
            f"The guard skipped steps {first}{more}. `pretrain.py --show-batch STEP"
            " --output FOLDER` prints the text of a step's batch."
        )
    return texts


def spike_table(found: list[TensorSpikes]) -> str:
    """Returns the worst tensors, or a sentence if there are none."""
    worst = [tensor for tensor in found if tensor.steps][:TENSORS]
    if not worst:
        return f"No tensor had a spike score above {SPIKE_SCORE:g}."
    return table(
        ["tensor", "steps", "not finite", "largest score", "at step"],
        *(
            [
                tensor.name,
                f"{tensor.steps:,}",
                f"{tensor.nonfinite:,}",
                summary.number(tensor.largest, ",.1f"),
                summary.number(tensor.largest_step, ","),
            ]
            for tensor in worst
        ),
    )


def evaluation_table(rows: list[Row], summaries: dict[str, dict]) -> str:
    """Returns every optimizer's loss and perplexity, at up to 20 steps of the run."""
    evaluations = {
        name: {row["step"]: row for row in evaluations_of(rows, name)}
        for name in summaries
    }
    steps = sorted({step for found in evaluations.values() for step in found})
    if not steps:
        return "There was no evaluation."
    heading, lines = ["step"], {step: [f"{step:,}"] for step in evenly(steps)}
    for name, found in evaluations.items():
        heading += [f"{name}: loss", "perplexity"]
        for step, line in lines.items():
            row = found.get(step, {})
            line += [
                summary.number(row.get("eval_loss"), ".3f"),
                summary.number(row.get("eval_perplexity"), ",.2f"),
            ]
    return table(heading, *lines.values())


def evenly(steps: list[int]) -> list[int]:
    """Returns up to 20 evenly spaced steps, the first and the last among them."""
    count = min(EVALUATIONS, len(steps))
    return [steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)]
