"""The pages of results show the numbers that are committed beside them."""

import importlib
import json
import pathlib
import re

import numpy as np
import pytest

from studies.comparison import experiments, report, study
from studies.comparison.statistics import Result
from studies.spike_census import tables

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"


def results_of(page, name):
    """Returns the committed results of an experiment of a page."""
    contents = json.loads((RESULTS / f"{page}.json").read_text())[name]
    return [Result.from_json(content) for content in contents]


def rows_below(page, heading):
    """Returns the cells of the table of a page that begins with a heading."""
    text = (RESULTS / f"{page}.md").read_text()
    table = text.partition(f"\n{heading}")[2].partition("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


@pytest.mark.parametrize("name", ["comparison", "stability"])
def test_the_pages_of_the_comparison_have_the_committed_tables(name):
    page = (RESULTS / f"{name}.md").read_text().splitlines()
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    for name, contents in stored.items():
        results = [Result.from_json(content) for content in contents]
        again = json.loads(json.dumps([result.to_json() for result in results]))
        assert again == contents
        heading = f"{name}: {experiments.EXPERIMENTS[name].question}"
        lines = report.markdown(heading, results, []).splitlines()
        assert set(lines) <= set(page)
    assert set(report.explanations().splitlines()) <= set(page)


def test_experiments_without_committed_results_are_named():
    stored = [
        name
        for page in ("comparison", "stability")
        for name in json.loads((RESULTS / f"{page}.json").read_text())
    ]
    assert len(stored) == len(set(stored))
    missing = [name for name in experiments.EXPERIMENTS if name not in stored]
    assert set(stored) | set(missing) == set(experiments.EXPERIMENTS)
    text = (RESULTS / "stability.md").read_text()
    named = re.findall("^- `(.*)`: ", text.partition("## Not yet run")[2], re.M)
    assert named == missing


def test_the_table_of_depths_shows_the_committed_numbers():
    found = {(r.layers, r.model): r for r in results_of("stability", "depth")}
    rows = rows_below("stability", "| layers | standard,")
    assert [int(row[0]) for row in rows] == list(experiments.DEPTHS)
    for layers, *cells in rows:
        both = [found[int(layers), x] for x in ("standard, plain", "stable, scaled")]
        want = [(f"{x.final_loss:.3f}", f"{x.largest_rate:g}") for x in both]
        assert cells == [cell for pair in want for cell in pair]
        assert both[1].high < both[0].low  # every seed is better


def test_the_table_of_natural_spikes_shows_the_committed_numbers():
    found = {(r.label, r.model): r for r in results_of("stability", "natural")}
    rows = rows_below("stability", "| optimizer | 0.008 |")
    assert {row[0] for row in rows} == {label for label, _ in found}
    ways = [
        f"standard, plain{way}"
        for way in ("", ", warm-up 1", ", batch 2", ", bfloat16")
    ]
    for label, *cells, spikes in rows:
        curves = [found[label, way].curve for way in ways[:2]]
        losses = [np.mean(curve[rate]) for curve in curves for rate in (8e-3, 3.2e-2)]
        assert cells == [f"{loss:.3f}" for loss in losses]
        counts = [found[label, way].gradient_spikes for way in ways]
        assert spikes == f"{np.mean([count[3.2e-2] for count in counts]):.2f}"
        assert not any(count[8e-3] for count in counts)  # as the text says


def test_the_table_of_faults_shows_the_committed_numbers():
    names = {
        "Adam": "adam",
        "Adam, norm clipped": "adam_clip",
        "SPAM": "spam",
        "SPAM, norm clipped": "clip_spam",
    }
    stored = json.loads((RESULTS / "comparison.json").read_text())["guards"]
    found = {(r["label"], r["scenario"]): r for r in stored}
    page = (RESULTS / "comparison.md").read_text()
    table = page.partition("| final loss | clean |")[2].partition("\n\n")[0]
    heading, _, *rows = table.splitlines()
    scenarios = ["clean", *heading.strip(" |").split(" | ")]
    assert sorted(scenarios) == sorted(study.SCENARIOS)
    assert len(rows) == len({label for label, _ in found}) == 10
    for row in rows:
        name, *cells = row.strip("| ").split(" | ")
        name, _, guard = name.partition(" in ")
        kinds = {
            "": "",
            "a guard": "guard, ",
            "the published guard": "published guard, ",
        }
        for scenario, cell in zip(scenarios, cells, strict=True):
            result = found[kinds[guard] + names[name], scenario]
            has_diverged = result["diverged"] == result["runs"]
            assert cell == (
                "diverged" if has_diverged else f"{result['final_loss']:.3f}"
            )


def test_the_page_of_initialization_has_the_committed_gradients():
    stored = json.loads((RESULTS / "gradient_flow.json").read_text())
    page = " ".join((RESULTS.parent / "initialization.md").read_text().split())
    standard, stable = (stored[name] for name in ("standard", "stable"))
    assert standard["steps"] == stable["steps"] == [0, 10, 30, 100, 300]
    ends = [[x[0] / x[-1] for x in m["gradient_norm"]] for m in (standard, stable)]
    norms = [[*m["attention"][0], *m["ffn"][0]] for m in (standard, stable)]
    cells = [
        ("step 0: gradient", *(f"{x[0]:.1f}" for x in ends)),
        (
            "step 0: Jacobian",
            f"up to {max(norms[0]):.1f}",
            f"{min(norms[1]):.2f} to {max(norms[1]):.2f}",
        ),
        ("step 300: gradient", *(f"{x[-1]:.0f}" for x in ends)),
        ("step 300: Jacobian", *(f"{m['ffn'][-1][0]:.0f}" for m in (standard, stable))),
        ("step 300: loss", *(f"{m['loss'][-1]:.2f}" for m in (standard, stable))),
    ]
    table = page.partition("| | standard | stable |")[2]
    for name, *numbers in cells:
        row = table.partition(f"| {name}")[2].partition(" | ")[2]
        assert row.startswith(" | ".join(numbers) + " |"), (name, numbers)
    ranges = {x: stable[f"{x}_bound"] for x in ("attention", "ffn")}
    for name, text in {"attention": "attention", "ffn": "the feed-forward"}.items():
        low, high = min(ranges[name]), max(ranges[name])
        assert f"{low:.2f} to {high:.2f} for {text}" in page
        assert np.all(np.array(stable[name][0]) < ranges[name])
    over = (np.array(stable["attention"]) > stable["attention_bound"]).sum(axis=1)
    assert f"in {over[1]} layers at step 10 and in {over[4]} at step 300" in page
    for name in ("attention", "ffn"):
        shares = np.mean(np.array(standard[name])[2:4] < 0.1, axis=1)
        assert np.all((shares > 0.45) & (shares < 0.6))
    losses = [f"{loss:.2f}" for loss in standard["loss"]]
    assert f"the loss stays at {losses[2]} and {losses[3]}." in page


def test_the_page_of_the_census_has_the_committed_tables():
    """Except for the table of the kinds of tensors, which needs the records."""
    page = (RESULTS / "spike_census.md").read_text()
    runs = json.loads((RESULTS / "spike_census.json").read_text())["runs"]
    for make in (
        tables.spikes_table,
        tables.relation_table,
        tables.embeddings_table,
    ):
        assert make(list(runs.values())).to_markdown() in page


def test_the_page_of_other_tasks_has_the_committed_tables():
    page = (RESULTS / "tasks.md").read_text().splitlines()
    stored = json.loads((RESULTS / "tasks.json").read_text())
    assert stored
    for name, contents in stored.items():
        program, *_ = name.split(", ")  # what follows is its setting
        example = importlib.import_module(program).EXAMPLE
        results = [Result.from_json(content) for content in contents]
        heading = f"{name}: {example.question}"
        lines = report.markdown(heading, results, [], example.study.score).splitlines()
        assert set(lines) <= set(page)


def test_the_table_of_forecasts_shows_the_committed_numbers():
    found = {(r.label, r.scenario): r for r in results_of("tasks", "forecast")}
    rows = rows_below("tasks", "| severity | Adam |")
    assert [row[0] for row in rows] == ["0", "1", "2", "5"]
    for severity, *cells in rows:
        names = ("adam", "spam", "stable_spam", "adam_clip")
        losses = [found[name, f"severity {severity}"].final_loss for name in names]
        assert cells == [f"{loss:.3f}" for loss in losses]


def test_the_table_of_the_wide_model_shows_the_committed_numbers():
    found = {r.label: r for r in results_of("tasks", "finetune, width 512")}
    heading = "| optimizer | best rate | loss | over seeds | forgetting | state"
    rows = rows_below("tasks", heading)
    assert sorted(row[0] for row in rows) == sorted(found)
    for name, *cells in rows:
        r = found[name]
        assert cells == [
            f"{r.best_rate:g}",
            f"{r.final_loss:.3f}",
            f"{r.low:.3f} to {r.high:.3f} ({r.seeds})",
            f"{r.more['forgetting']:.3f}",
            f"{r.bytes_per_parameter:.2f}",
        ]
