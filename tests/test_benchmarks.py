"""The benchmarks run, and the committed pages show the committed numbers."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu, guards, report

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.slow
def test_help_describes_the_program():
    assert "Measure the optimizers" in run("--help")


@pytest.mark.nightly
@pytest.mark.slow
def test_a_section_by_itself(tmp_path):
    """Earlier results of other sections are kept."""
    (tmp_path / "results.json").write_text((RESULTS / "results.json").read_text())
    before = json.loads((tmp_path / "results.json").read_text())
    run("--quick", "--only", "state", "--output", str(tmp_path))
    after = json.loads((tmp_path / "results.json").read_text())
    assert after["step"] == before["step"]
    state = after["state"]["data"]["60M"]["state_bytes_per_parameter"]
    assert round(state["optax.adam"], 3) == round(state["spam"], 3) == 8
    assert "## State" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "state.png").stat().st_size > 10_000


def test_the_report_shows_the_results():
    results = json.loads((RESULTS / "results.json").read_text())
    assert (RESULTS / "results.md").read_text() == report.render(results)


def test_the_page_of_the_gpu_shows_its_results():
    results = json.loads((RESULTS / "gpu.json").read_text())
    assert (RESULTS / "gpu.md").read_text() == gpu.render(results)


def test_the_table_of_costs_on_a_gpu_is_that_measured():
    results = json.loads((RESULTS / "gpu.json").read_text())
    matrices, llama = (
        {row["optimizer"]: row["ratio"] for row in results[title]["rows"]}
        for title in ("matrices", "60M")
    )
    page = (ROOT / "docs" / "cost.md").read_text()
    table = page.partition("## On a GPU")[2].partition("\n\n- ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 11
    for row in rows:
        name = row.split(" | ")[0].removeprefix("| ")
        assert row == f"| {name} | {matrices[name]:.2f} | {llama[name]:.2f} |"


def test_the_steps_in_the_readme_are_those_measured():
    results = json.loads((RESULTS / "gpu.json").read_text())
    ratios = {row["optimizer"]: row["ratio"] for row in results["matrices"]["rows"]}
    shown = {
        "track_spikes`": ("track_spikes(adam)",),
        "[`spam`](": ("spam, no counts",),
        "clip_by_global_norm": ("clip_by_global_norm, adam",),
        "[`skip_spikes`](": ("skip_spikes(adam)",),
        "clip_update_norm`": ("adam, clip_update_norm",),
        "sparse_spam`": ("sparse_spam 1/4, no counts", "adam_mini"),
    }
    page = (ROOT / "README.md").read_text()
    table = page.partition("## Which tool?")[2].partition("## Install")[0]
    for tool, names in shown.items():
        (line,) = (x for x in table.splitlines() if tool in x and x.startswith("|"))
        steps = " or ".join(f"{ratios[name]:.2f}" for name in names)
        assert line.endswith(f" | {steps} |"), tool


def test_the_pages_about_guards_show_their_results():
    results = json.loads((RESULTS / "guards.json").read_text())
    assert (RESULTS / "guards.md").read_text() == guards.render(results)
    page = (RESULTS.parents[1] / "docs" / "guards.md").read_text()
    for run in results.values():
        cells = [f"{run['steps']:,}"]
        for rule in guards.RULES:
            row = run["rules"][rule]
            cells.append(f"{100 * row['skipped'] / run['steps']:.3f} %")
            cells.append(", ".join(map(str, row["found"])))
        assert f" | {' | '.join(cells)} |" in page
    clipped = results["gpt2_124m_llmc"]["rules"]["zclip"]["skipped"]
    assert f"clips {100 * clipped / 19_560:.3f} % of the steps" in page


@pytest.mark.nightly
@pytest.mark.slow
def test_planted_spikes_are_counted():
    rng = np.random.default_rng(0)
    loss, norm = (
        (level + 0.01 * rng.standard_normal(5000)).astype(np.float32)
        for level in (3.0, 1.0)
    )
    loss[250] = 9.0
    rows = guards.measure(loss, norm)["rules"]
    assert rows["skip_spikes"] == {"skipped": 1, "found": [30, 30]}
    assert rows["zclip"]["found"] == [None, 30]
    alone = guards.measure(loss, None)["rules"]
    assert alone["skip_spikes"] == {"skipped": 1, "found": [30]}
    assert "zclip" not in alone


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_memory_tables_of_the_launch_scripts_are_those_measured(kind):
    results = json.loads((RESULTS / "results.json").read_text())
    rows = [
        row
        for row in results["presets"]["data"]
        if row["target"].partition(":")[0] == kind
    ]
    assert rows
    page = (ROOT / "examples" / kind / "README.md").read_text()
    assert report.preset_table(rows) in page
