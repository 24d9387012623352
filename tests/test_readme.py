"""The README's Python runs, as one program from top to bottom."""

import json
import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), README.name, "exec"), {})
    # What the comments in the code promise.
    promised = ["1", "1.25", "(2, 32)", "{'embed': 1.0, 'mlp': {'kernel': 0.25}}"]
    assert capsys.readouterr().out.splitlines()[-4:] == promised


def test_files_named_exist():
    """Links of the page, and the files of the project it names in code marks."""
    text = README.read_text()
    named = re.findall(r"\]\(((?!http|#)[^)]+)\)", text)
    named += re.findall(r"`((?:tests|docs|benchmarks|examples)/[^` ]+)`", text)
    assert len(named) > 6
    missing = [name for name in named if not (README.parent / name).exists()]
    assert not missing


def test_results_in_the_table_are_those_committed():
    results = README.parent / "docs" / "results"
    table = re.search(
        r"\| final validation loss.*?\n\n", README.read_text(), re.DOTALL
    )[0]
    rows = [re.findall(r"\d\.\d{3}", row) for row in table.splitlines()[2:]]
    files = ("pretrain.json", "pretrain_no_spikes.json")
    columns = [json.loads((results / file).read_text()).values() for file in files]
    losses = [[f"{run['final_eval_loss']:.3f}" for run in column] for column in columns]
    assert [row for row in rows if row] == [
        list(row) for row in zip(*losses, strict=True)
    ]
