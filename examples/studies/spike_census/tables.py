"""Tables of a census, for the terminal and as Markdown."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from studies.spike_census import statistics
from studies.spike_census.counting import GSS_THRESHOLD, ONLINE_THRESHOLD
from studies.spike_census.statistics import STEPS_AFTER
from studies.spike_census.study import Record
from trainer.output.summary import number

KINDS_SHOWN = 6  # of the tensors of each model, those with the most spikes
EMBEDDINGS = ("llama", "llama-scaled", "llama-normed")
EMBEDDING_COLUMNS = {  # numbers of a summary, and their formats
    "final_loss": ".3f",
    "gss_rate": ".1f",
    "gss_rate_after_warmup": ".2f",
    "online_rate_after_grace": ".2f",
}


class Table(NamedTuple):
    """A title, headings, rows of texts, and a note that explains them."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str = ""
    left: int = 1  # columns with words

    def to_rich(self) -> rich.table.Table:
        result = rich.table.Table(
            title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD
        )
        for column, heading in enumerate(self.headings):
            justify = "left" if column < self.left else "right"
            result.add_column(heading, justify=justify)
        for row in self.rows:
            result.add_row(*row)
        return result

    def to_markdown(self) -> str:
        rule = ["---" if i < self.left else "---:" for i in range(len(self.headings))]
        lines = [self.headings, rule, *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        note = f"\n\n{self.note}" if self.note else ""
        return f"## {self.title}\n\n{body}{note}\n"


def tables(records: Sequence[Record], summaries: Sequence[dict]) -> list[Table]:
    """Returns all tables of some runs."""
    result = [spikes_table(summaries), relation_table(summaries)]
    result += [kinds_table(records)]
    if {s["setting"]["model"] for s in summaries} & set(EMBEDDINGS[1:]):
        result.append(embeddings_table(summaries))
    return result


def words(summary: dict) -> list[str]:
    """Returns the first columns of a table, which name the run."""
    setting = summary["setting"]
    halted = summary["halted_at"]
    return [
        setting["model"] + (f" (halted at {halted:,})" if halted else ""),
        setting["text"],
        str(setting["batch_size"]),
    ]


def percent(value: float | None) -> str:
    return number(value, ".0%")


def spikes_table(summaries: Sequence[dict]) -> Table:
    rows = [
        [
            *words(s),
            f"{s['final_loss']:.3f}",
            number(s["gss_rate"], ".1f"),
            percent(s["gss_share_in_warmup"]),
            number(s["gss_rate_after_warmup"], ".2f"),
            percent(s["gss_embedding_share_after_warmup"]),
            *spike_words(s["largest"]),
            number(s["online_rate_after_grace"], ".2f"),
        ]
        for s in summaries
    ]
    return Table(
        "How often gradients spike",
        ["model", "text", "batch", "final loss", "spikes per million", "in warm-up"]
        + ["per million after it", "of these in embedding", "largest score"]
        + ["in", "at step", "online per million"],
        rows,
        f"A spike is a gradient coordinate of more than {GSS_THRESHOLD:g} times its"
        " mean size over the run. Rates are per million coordinates and steps. The"
        " warm-up is the first tenth of the steps. Online spikes are coordinates with"
        f" g²/v above {ONLINE_THRESHOLD:g}, where v is Adam's second moment before the"
        f" step, without bias correction. The first {statistics.GRACE_STEPS} steps do"
        " not count for them, because SPAM clips nothing there. The final loss is the"
        f" mean of the last {statistics.FINAL_STEPS} steps.",
        left=2,
    )


def spike_words(largest: dict | None) -> list[str]:
    if largest is None:
        return ["-"] * 3
    tensor = largest["tensor"].removesuffix("/kernel")
    return [f"{largest['score']:.0f}", tensor, f"{largest['step']:,}"]


def correlation(relation: dict | None, name: str) -> str:
    if relation is None or relation[name] is None:
        return "-"
    return f"{relation[name]:+.2f} ({relation[f'{name}_p']:.3f})"


def rates(relation: dict | None, name: str) -> str:
    if relation is None:
        return "-"
    many, others = (
        relation[f"{name}_bump_rate_{which}"] for which in ("many", "others")
    )
    return f"{many:.0%} / {others:.0%} ({number(relation[f'{name}_bump_p'], '.3f')})"


def relation_table(summaries: Sequence[dict]) -> Table:
    rows = []
    for s in summaries:
        relation, outside = s["relation"], s["relation_outside_embedding"]
        rows.append(
            [
                *words(s),
                correlation(relation, "same_rho"),
                correlation(relation, "after_rho"),
                change(relation),
                rates(relation, "same"),
                rates(relation, "after"),
                correlation(outside, "same_rho"),
                correlation(outside, "after_rho"),
            ]
        )
    return Table(
        "Whether spikes occur together with loss bumps",
        ["model", "text", "batch", "ρ with own loss", "ρ with losses after"]
        + ["loss after, nats", "bump at the step", f"bump within {STEPS_AFTER} after"]
        + ["outside embedding: own", "after"],
        rows,
        "All numbers are of the steps after the warm-up. ρ is the rank correlation"
        " between a step's number of spikes and the excess loss of its own batch, or"
        f" of the next {STEPS_AFTER} batches. The last two columns use the step's"
        " largest score outside the embedding instead. The excess loss is the loss"
        f" minus the median of the {statistics.MEDIAN_STEPS} steps on either side. A"
        f" bump is an excess of more than {statistics.BUMP_DEVIATIONS:g} robust"
        " standard deviations. The tenth of the steps with the most spikes is compared"
        " with the other steps: the loss after them by its difference, and bumps by"
        " their rates (with many spikes / others). The numbers in parentheses are"
        " two-sided p-values, from rotating one series against the other."
        f" {agreement(summaries)}",
        left=2,
    )


def change(relation: dict | None) -> str:
    if relation is None:
        return "-"
    p = number(relation["after_change_p"], ".3f")
    return f"{relation['after_change']:+.3f} ({p})"


def agreement(summaries: Sequence[dict]) -> str:
    """Returns sentences that count the runs with each relation."""
    sentences = []
    for key, what in (
        ("relation", "Number of spikes"),
        ("relation_outside_embedding", "Largest score outside the embedding"),
    ):
        found = statistics.pooled([s[key] for s in summaries])
        for name, which in (("same_rho", "own loss"), ("after_rho", "losses after")):
            sentences.append(
                f"{what} and {which}: the median ρ is {number(found[name], '+.2f')}; of"
                f" {found['runs']} runs, {found[f'{name}_positive']} are above and"
                f" {found[f'{name}_negative']} below 0 with p <"
                f" {statistics.SIGNIFICANCE:g}."
            )
    return " ".join(sentences)


def kinds_table(records: Sequence[Record]) -> Table:
    rows = []
    for model in dict.fromkeys(record.setting.model for record in records):
        chosen = [record for record in records if record.setting.model == model]
        rows += [
            [
                model,
                row["kind"],
                percent(row["coordinates"]),
                percent(row["spikes"]),
                f"{row['rate']:.1f}",
                f"{row['rate_after_warmup']:.2f}",
                f"{row['largest']:.0f}",
            ]
            for row in statistics.by_kind(chosen)[:KINDS_SHOWN]
        ]
    return Table(
        "Which tensors spike",
        ["model", "tensor", "of coordinates", "of spikes", "per million"]
        + ["per million after warm-up", "largest score"],
        rows,
        f"The {KINDS_SHOWN} kinds of tensors of each model with the highest rates, over"
        " all layers and runs.",
        left=2,
    )


def embeddings_table(summaries: Sequence[dict]) -> Table:
    """Compares the embeddings by means over their runs."""
    rows = []
    for model in EMBEDDINGS:
        chosen = [s for s in summaries if s["setting"]["model"] == model]
        if not chosen:
            continue
        cells = [
            spread([s[key] for s in chosen], EMBEDDING_COLUMNS[key])
            for key in EMBEDDING_COLUMNS
        ]
        largest = [s["largest"]["score"] for s in chosen if s["largest"]]
        rows.append([model, str(len(chosen)), *cells, spread(largest, ".0f")])
    return Table(
        "How the embedding's scale changes the spikes",
        ["model", "runs", "final loss", "spikes per million"]
        + ["per million after warm-up", "online per million", "largest score"],
        rows,
        "Each cell has the mean over the runs, and their range. llama has a plain"
        " embedding, llama-scaled multiplies it by the square root of the width, and"
        " llama-normed applies a LayerNorm to it.",
    )


def spread(values: Sequence[Any], style: str) -> str:
    """Returns mean and range of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{np.mean(known):{style}} ({low:{style}} to {high:{style}})"


def to_markdown(tables: Sequence[Table]) -> str:
    """Returns a page with all tables."""
    sections = (table.to_markdown() for table in tables)
    return "\n".join(["# Census of gradient spikes\n", *sections])


def show(tables: Sequence[Table]) -> None:
    """Prints the tables."""
    console = rich.console.Console(width=None if sys.stdout.isatty() else 170)
    for table in tables:
        console.print(table.to_rich())
        console.print(table.note + "\n", highlight=False)
