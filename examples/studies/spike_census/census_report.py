"""The tables of a census, for the terminal and as Markdown."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.table

from studies.spike_census import census_analysis
from studies.spike_census.census_analysis import (
    AHEAD,
    AROUND,
    BUMP,
    GRACE_STEPS,
    GSS_THRESHOLD,
    LEVEL,
    ONLINE_THRESHOLD,
    Record,
)
from trainer.output.summary import number

WORST_KINDS = 6  # of a model's tensors
EMBEDDINGS = ("llama", "llama-scaled", "llama-normed")
SHOWN = {  # of each run's summary, in the comparison of embeddings
    "final_loss": ".3f",
    "gss_rate": ".1f",
    "gss_rate_after_warmup": ".2f",
    "online_rate_after_grace": ".2f",
}


class Table(NamedTuple):
    """A title, headings, rows of texts, and what to know when reading them."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str = ""
    left: int = 1  # columns of words

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
    """All tables of these runs."""
    result = [spikes_table(summaries), relation_table(summaries)]
    result += [kinds_table(records)]
    if {s["setting"]["model"] for s in summaries} & set(EMBEDDINGS[1:]):
        result.append(embeddings_table(summaries))
    return result


def words(summary: dict) -> list[str]:
    """The columns that say which run it is."""
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
        f"A spike is a coordinate of a step's gradient above {GSS_THRESHOLD:g} times"
        " its mean size over the run; rates are per million coordinates and steps. The"
        " warm-up is the first tenth of the steps. Online: g²/v above"
        f" {ONLINE_THRESHOLD:g}, with Adam's v before the step, not bias corrected, in"
        f" the steps after the first {GRACE_STEPS}, in which SPAM clips nothing either."
        f" Losses are the mean of the last {census_analysis.END} steps.",
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
    many, others = (relation[f"{name}_bump_rate_{which}"] for which in RATES)
    return f"{many:.0%} / {others:.0%} ({number(relation[f'{name}_bump_p'], '.3f')})"


RATES = ("many", "others")


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
        "Whether spikes go with loss bumps",
        ["model", "text", "batch", "ρ with own loss", "ρ with losses after"]
        + ["loss after, nats", "bump at the step", f"bump within {AHEAD} after"]
        + ["outside embedding: own", "after"],
        rows,
        "After the warm-up. ρ: rank correlation, over the steps, of the number of"
        f" spikes with the excess loss of their own batch, and of the next {AHEAD}; in"
        " the last two columns, of the step's largest score outside the embedding. The"
        f" excess is over the median of the {AROUND} steps on either side; a bump is an"
        f" excess of more than {BUMP:g} robust standard deviations. Loss after: how"
        " much larger it is after the tenth of the steps with most spikes than after"
        " others. Bumps: their rate at those steps / at others. In parentheses: the"
        " probability by chance, two-sided, from rotating one series against the"
        f" other. {agreement(summaries)}",
        left=2,
    )


def change(relation: dict | None) -> str:
    if relation is None:
        return "-"
    p = number(relation["after_change_p"], ".3f")
    return f"{relation['after_change']:+.3f} ({p})"


def agreement(summaries: Sequence[dict]) -> str:
    """How many of the runs show each relation."""
    sentences = []
    for key, what in (
        ("relation", "Number of spikes"),
        ("relation_outside_embedding", "Largest score outside the embedding"),
    ):
        found = census_analysis.pooled([s[key] for s in summaries])
        for name, which in (("same_rho", "own loss"), ("after_rho", "losses after")):
            sentences.append(
                f"{what} and {which}: median ρ {number(found[name], '+.2f')}, of"
                f" {found['runs']} runs {found[f'{name}_positive']} above and"
                f" {found[f'{name}_negative']} below 0 with p < {LEVEL:g}."
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
            for row in census_analysis.by_kind(chosen)[:WORST_KINDS]
        ]
    return Table(
        "Which tensors spike",
        ["model", "tensor", "of coordinates", "of spikes", "per million"]
        + ["per million after warm-up", "largest score"],
        rows,
        f"Of each model, over all layers and runs, the {WORST_KINDS} kinds of tensors"
        " with the highest rate.",
        left=2,
    )


def embeddings_table(summaries: Sequence[dict]) -> Table:
    """Means over the runs of each embedding, and their ranges."""
    rows = []
    for model in EMBEDDINGS:
        chosen = [s for s in summaries if s["setting"]["model"] == model]
        if not chosen:
            continue
        cells = [spread([s[key] for s in chosen], SHOWN[key]) for key in SHOWN]
        largest = [s["largest"]["score"] for s in chosen if s["largest"]]
        rows.append([model, str(len(chosen)), *cells, spread(largest, ".0f")])
    return Table(
        "What the embedding's scale changes",
        ["model", "runs", "final loss", "spikes per million"]
        + ["per million after warm-up", "online per million", "largest score"],
        rows,
        "Mean over the runs, and their range. llama: a plain embedding;"
        " llama-scaled: multiplied by the square root of the width; llama-normed:"
        " followed by a LayerNorm.",
    )


def spread(values: Sequence[Any], style: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{np.mean(known):{style}} ({low:{style}} to {high:{style}})"
