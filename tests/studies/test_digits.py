"""Classification of digits: the data and its faults, the model, and the program."""

import json
import sys

import jax
import numpy as np
import pytest

import vision as program
from studies import digits, task
from trainer.config import RunConfig

# The studies hardly depend on the version of Python: see docs/development.md.
pytestmark = pytest.mark.slow

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

FLAGS = ["--width", "8", "--heads", "2", "--layers", "1"]
BASE = RunConfig(steps=60, batch_size=8, bursts=3)


@pytest.fixture(scope="module")
def tiny():
    return digits.Digits(digits.Options(width=8, heads=2, layers=1))


def test_every_image_is_in_training_or_test(tiny):
    images, numbers = digits.load()
    (train, train_numbers), (test, test_numbers) = tiny.train, tiny.test
    assert (len(train), len(test)) == (1438, 359)
    assert images.min() == 0 and images.max() == 1
    both = np.concatenate([train, test]).reshape(len(images), -1)
    order, again = (np.lexsort(x.T) for x in (both, images.reshape(len(images), -1)))
    np.testing.assert_array_equal(both[order], images.reshape(len(images), -1)[again])
    assert sorted([*train_numbers, *test_numbers]) == sorted(numbers)


def test_labels_are_wrong_in_the_fault_steps_only(tiny):
    (images, right), _ = tiny.inputs(task.Run("adam", "clean", BASE))
    (same, wrong), _ = tiny.inputs(task.Run("adam", "labels", BASE))
    np.testing.assert_array_equal(images, same)
    changed = np.flatnonzero((right != wrong).any(axis=1)) + 1
    assert list(changed) == sorted(BASE.fault_steps)
    assert (right != wrong)[changed - 1].mean() > 0.7


def test_a_patch_has_neighbouring_pixels(tiny):
    """A pixel changes the embedding of its own patch alone."""
    model = tiny.model(0)
    model.blocks = type(model.blocks)([])
    seen = []
    model.norm = lambda x: seen.append(x) or x
    image = np.zeros((1, 8, 8), np.float32)
    model(image)
    image[0, 3, 5] = 1  # row 1 and column 2 of the patches
    model(image)
    changed = np.abs(seen[1] - seen[0]).max(axis=-1)[0]
    assert np.flatnonzero(changed).tolist() == [1 * 4 + 2]


def test_a_model_has_ten_logits_for_each_image(tiny):
    logits = tiny.model(0)(jax.numpy.zeros((3, 8, 8)))
    assert logits.shape == (3, 10)


def test_the_program_writes_its_files(tmp_path):
    flags = [*FLAGS, "--output", str(tmp_path), "--workers", "1", "--steps", "60"]
    flags += ["--optimizer", "adam", "--scenario", "clean", "labels"]
    assert program.main([*flags, "--learning-rate", "0.02", "--batch-size", "32"]) == 0
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names == ["runs", "summary.json", "vision.md", "vision.png"]
    clean, labels = json.loads((tmp_path / "summary.json").read_text())["vision"]
    assert clean["final_loss"] < 2 and clean["diverged"] == 0
    assert labels["final_loss"] != clean["final_loss"]
    assert "| test loss |" in (tmp_path / "vision.md").read_text()


def test_a_missing_package_takes_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as stopped:
        program.main(["--output", str(tmp_path)])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "pip install scikit-learn" in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "30"], "--width must be a multiple of --heads, which is 4"),
        (["--scenario", "rain"], "invalid choice: 'rain'"),
        (["--steps", "11"], "must be a whole number >= 12"),
    ],
)
def test_a_mistake_takes_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main([*flags, "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
