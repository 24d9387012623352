"""The notebooks run, draw their figures, and are committed without machine data."""

import json
import pathlib
import re

import ipykernel.kernelspec
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT = 300  # seconds
# What the test changes in the cells, so that the runs are shorter than those committed.
SHORTER = {
    "=600": "=200",
    "SPIKE, AFTER = 101, 1500": "SPIKE, AFTER = 101, 500",
    "WIDTH, LAYERS = 64, 24": "WIDTH, LAYERS = 64, 4",
    "depths = (3, 12, 48)": "depths = (3,)",
    "widths = (16, 64, 256)": "widths = (16,)",
    "STEPS, BATCH_SIZE = 300, 8": "STEPS, BATCH_SIZE = 240, 8",
    "STEPS, RATE = 300, 3e-3": "STEPS, RATE = 180, 3e-3",
}
MAX_BYTES = 600_000
# The others are nightly.
QUICK = ("how_optimizers_answer_a_spike", "find_the_batch_and_the_tensor")
# Absolute paths of POSIX and Windows homes, temporary folders and environments.
MACHINE_PATH = re.compile(
    r"/(home|Users|root|tmp|work|mnt|opt|usr|var|private)/|[A-Z]:\\|site-packages"
    r"|\.venv|ipykernel_\d"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_image(cell):
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def assert_sound(notebook):
    """Every code cell ran, none raised or warned, and every figure was drawn."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        where = f"code cell {number}: {cell.source.splitlines()[0]}"
        assert cell.execution_count == number, where
        for output in cell.outputs:
            assert output.output_type != "error", where
            assert output.get("name") != "stderr", f"{where}\n{output.get('text')}"
        assert has_image(cell) == ("plt.show()" in cell.source), where


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel "python3" of the running interpreter, away from the user's settings.

    A python3 kernel that the user registered may belong to another environment.
    """
    ipykernel.kernelspec.write_kernel_spec(str(tmp_path / "kernels" / "python3"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # With this set jupyter_core does not warn of its change of folders.
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")


def execute(notebook, folder):
    nbclient.NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def test_every_part_to_shorten_is_in_a_notebook():
    sources = [cell.source for path in NOTEBOOKS for cell in code_cells(read(path))]
    assert all(any(part in source for source in sources) for part in SHORTER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.nightly)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_runs_in_its_own_folder(path, kernel):
    notebook = read(path)
    for cell in code_cells(notebook):
        for part, shorter in SHORTER.items():
            cell.source = cell.source.replace(part, shorter)
    execute(notebook, path.parent)
    assert_sound(notebook)


def test_all_begin_with_the_same_cell():
    assert len({code_cells(read(path))[0].source for path in NOTEBOOKS}) == 1


@pytest.mark.slow
def test_the_first_cell_finds_the_examples_from_the_root(kernel):
    """The test runs the cells up to the imports. The others do not need the folder."""
    notebook = read(NOTEBOOKS[0])
    last = max(
        i
        for i, cell in enumerate(notebook.cells)
        if re.search("^from (trainer|studies)", cell.source, re.M)
    )
    notebook.cells = notebook.cells[: last + 1]
    execute(notebook, ROOT)


@each_notebook
def test_committed_outputs(path):
    """Executed from top to bottom, with every figure, and not too large."""
    assert_sound(read(path))
    assert path.stat().st_size < MAX_BYTES


@each_notebook
def test_committed_file_has_no_paths_or_times_of_a_machine(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.metadata  # times of execution would be here
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
            assert not MACHINE_PATH.search(json.dumps(output)), output
    assert not MACHINE_PATH.search(json.dumps(notebook.metadata))
    assert str(ROOT) not in json.dumps(notebook)
