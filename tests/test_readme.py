"""The README and the pages of docs/: their code runs, and named files exist."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
TRAINERS = sorted((DOCS / "trainers").glob("*.md"))
PAGES = [README, *sorted(DOCS.glob("*.md")), *TRAINERS]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def python_of(page):
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.mark.parametrize(
    "page",
    [
        page if page == README else pytest.param(page, marks=pytest.mark.slow)
        for page in filter(python_of, PAGES)
    ],
    ids=lambda page: page.stem,
)
def test_python_blocks_run(page, capsys):
    """Each page is one program. Comments after `print` are lines of its output."""
    code = python_of(page)
    exec(compile(code, page.name, "exec"), {})
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    comments = r"^print\([^#\n]*\)(?:  # (.*)|\n((?:# .*\n)+))"
    after_print = re.findall(comments, code, re.MULTILINE)
    for same_line, next_lines in after_print:
        promised = [same_line] if same_line else re.findall(r"# (.*)", next_lines)
        assert promised[0] in printed
        start = printed.index(promised[0])
        assert printed[start : start + len(promised)] == promised


def test_pages_with_code_are_found():
    assert sum(map(bool, map(python_of, PAGES))) >= 6


@EVERY_PAGE
def test_files_named_exist(page):
    """Checks links to files, and files of the project named between backquotes."""
    text = page.read_text()
    links = re.findall(r"\]\(((?!http|#)[^)\s]+)\)", text)
    named = re.findall(r"`((?:tests|docs|benchmarks|examples)/[^`\s]+)`", text)
    assert links or named or page.name == "development.md"
    missing = [x for x in links if not (page.parent / x.partition("#")[0]).exists()]
    missing += [x for x in named if not (ROOT / x).exists()]
    assert not missing


def test_readme_is_short_and_links_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for page in DOCS.glob("*.md"):
        if page.name != "index.md":
            assert f"(docs/{page.name})" in text
            assert f"({page.name})" in (DOCS / "index.md").read_text()


def test_page_of_every_trainer_is_in_the_table():
    text = (DOCS / "in-your-trainer.md").read_text()
    assert TRAINERS
    for page in TRAINERS:
        assert f"(trainers/{page.name})" in text


def rows_of(page, header):
    """Returns the cells of the table with this header, without the header."""
    table = re.search(rf"{re.escape(header)}.*?\n\n", page.read_text(), re.DOTALL)[0]
    rows = table.strip().splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_results_of_the_demonstration_are_those_committed():
    rows = rows_of(DOCS / "evidence.md", "| final validation loss")
    for column, file in ((1, "pretrain.json"), (2, "pretrain_no_spikes.json")):
        runs = json.loads((DOCS / "results" / file).read_text()).values()
        losses = [f"{run['final_eval_loss']:.3f}" for run in runs]
        assert [row[column].strip("*") for row in rows] == losses


def test_costs_are_those_committed():
    results = json.loads((ROOT / "benchmarks/results/results.json").read_text())
    steps = results["step"]["data"]["matrices"]["rows"]
    moved = results["compiled"]["data"]["rows"]
    for name, first, second, state, temporaries, traffic in rows_of(
        DOCS / "cost.md", "| | step, parameters first"
    ):
        by_order = {x["order"]: x for x in steps if x["optimizer"] == name}
        params_first = by_order["params, state, gradients"]
        gradients_first = by_order["gradients, state, params"]
        assert first == f"{params_first['ratio']:.2f}"
        assert second == f"{gradients_first['ratio']:.2f}"
        assert state == f"{params_first['state_bytes']:.0f}"
        assert temporaries == f"{params_first['temporary_bytes']:.0f}"
        (on_tpu,) = (
            x["bytes"] for x in moved if (x["optimizer"], x["chip"]) == (name, "v5e")
        )
        assert traffic == f"{on_tpu:.1f}"


def test_compile_times_are_those_committed():
    results = json.loads((ROOT / "benchmarks/results/results.json").read_text())
    seconds = {
        (row["platform"], row["optimizer"]): sum(row["seconds"].values())
        for row in results["compile"]["data"]["rows"]
    }
    for name, *ratios in rows_of(DOCS / "cost.md", "| | XLA:CPU"):
        for platform, ratio in zip(("cpu", "tpu"), ratios, strict=True):
            baseline = seconds[platform, "optax.adamw"]
            assert ratio == f"{seconds[platform, name] / baseline:.2f}"
