"""The benchmarks run, and the committed pages show the committed numbers."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import gpu, report

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_help_describes_the_program():
    assert "Measure the optimizers" in run("--help")


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
    assert len(rows) == 7
    for row in rows:
        name = row.split(" | ")[0].removeprefix("| ")
        assert row == f"| {name} | {matrices[name]:.2f} | {llama[name]:.2f} |"


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
