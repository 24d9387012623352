"""Going back to a checkpoint, and looking at the batches that were left out."""

import itertools
import json

import numpy as np
import pytest

import pretrain
from trainer import data, show_batch
from trainer.config import RunConfig
from trainer.errors import UsageError
from trainer.output import sinks
from trainer.run_folder import Run, RunFolder
from trainer_in_process import refused
from trainer_process import (
    assert_same_run,
    checkpoint_steps,
    finish_all,
    kill_at,
    read_rows,
    without_timing,
)

# Three batches of random tokens, 75 to 77. The checkpoint before them is that of 60,
# because none is written while the loss is high.
FLAGS = [
    "--preset=nano",
    "--optimizer=adam",
    "--batch-size=8",
    "--sequence-length=32",
    "--steps=150",
    "--bursts=0",
    "--bad-batches=1",
    "--rewind=1",
    "--rewind-after=3",
    "--checkpoint-every=15",
    "--eval-every=50",
    "--eval-sequences=16",
    "--learning-rate=0.01",
    "--data-parallel=1",
]


def row(step, name="adam", **values):
    return {"optimizer": name, "step": step, "loss": 2.0, **values}


def test_a_rewind_marks_the_rows_since_and_a_resume_before_it_undoes_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sinks.write(path, [row(step) for step in range(1, 6)] + [row(5, "spam")])
    sinks.rewind(path, {"optimizer": "adam", "step": 2, "rewind": 1})
    sinks.write(path, [*sinks.read(path), row(3), row(4)])
    rows = sinks.read(path)
    assert [r["step"] for r in sinks.steps_of(rows, "adam")] == [1, 2, 3, 4]
    assert [r["step"] for r in sinks.taken_back(rows, "adam")] == [3, 4, 5]
    assert sinks.recorded(path, "adam", RunConfig(eval_every=9)) == 4
    sinks.cut(path, "adam", 3)
    rows = sinks.read(path)
    assert [r["step"] for r in sinks.steps_of(rows, "adam")] == [1, 2, 3]
    assert [r["step"] for r in sinks.taken_back(rows, "adam")] == [3, 4, 5]
    sinks.cut(path, "adam", 1)
    rows = sinks.read(path)
    assert rows == [row(1), row(5, "spam")]


def test_a_batch_is_found_by_its_number():
    config = RunConfig.from_settings(batch_size=4, sequence_length=16, accumulate=2)
    loaded = data.load(config)
    batches = list(itertools.islice(loaded.train, 3))
    for number, batch in enumerate(batches, 1):
        np.testing.assert_array_equal(loaded.batch(number), batch)


def test_a_random_batch_is_the_same_for_any_number_of_hosts():
    config = RunConfig.from_settings(batch_size=8, sequence_length=16, accumulate=2)
    whole = data.random_batch(config, 256, 7, data.Host())
    parts = [data.random_batch(config, 256, 7, data.Host(i, 2)) for i in range(2)]
    assert whole.shape == (2, 4, 17)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert np.any(whole != data.random_batch(config, 256, 8, data.Host()))


def test_a_rewind_needs_two_checkpoints():
    with pytest.raises(UsageError, match="keep_checkpoints must be >= 2"):
        RunConfig(rewind=1, keep_checkpoints=1)


def test_show_batch_puts_the_parts_of_a_stream_together(tmp_path, capsys):
    """Each of two hosts reads one file, in which every letter is the same."""
    pytest.importorskip("datasets")
    for name in ("train-a", "train-b", "validation"):
        text = json.dumps({"text": name[-1] * 20_000}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(text)
    config = RunConfig.from_settings(
        data=f"hf:{tmp_path}", batch_size=4, sequence_length=16, optimizers=("adam",)
    )
    digest = data.load(config).digest
    folder = RunFolder(tmp_path / "run")
    folder.create(Run(config, None, hosts=2, data_digest=digest))
    begun = row(1, batch=3, fault=None, skipped="loss spike")
    sinks.write(folder.metrics, [begun])
    assert show_batch.run(folder, 1, (), skip_bad_data=0) == 0
    announced, *sequences = capsys.readouterr().out.split("--- sequence ")
    assert announced == "Batch 3\n  step 1 of adam: loss 2.000, skipped (loss spike)\n"
    texts = [sequence.splitlines()[1] for sequence in sequences]
    first, second = (set("".join(half)) for half in (texts[:2], texts[2:]))
    assert {*first, *second} == {"a", "b"} and not first & second


@pytest.fixture(scope="module")
def whole_run(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewind")
    code, _, errors = trainer.run(*FLAGS, "--output=run", cwd=folder)
    assert code == 0
    assert errors == (
        "adam: back from step 77 to step 60, because the loss was above its band for 3"
        " steps; the 17 batches since are left out (rewind 1 of 1)\n"
    )
    return folder / "run"


@pytest.mark.slow
def test_run_goes_back_and_leaves_the_batches_out(whole_run):
    rows = read_rows(whole_run)
    steps = sinks.steps_of(rows, "adam")
    assert [r["step"] for r in steps] == list(range(1, 151))
    assert [r["batch"] for r in steps] == [*range(1, 61), *range(78, 168)]
    assert not any(r["fault"] for r in steps)
    taken_back = sinks.taken_back(rows, "adam")
    assert [r["step"] for r in taken_back] == list(range(61, 78))
    assert [r["fault"] for r in taken_back[-3:]] == ["batch"] * 3
    assert [r["steps_above_band"] for r in taken_back[-4:]] == [0, 1, 2, 3]
    assert checkpoint_steps(whole_run, "adam") == [135, 150]
    report = (whole_run / "report.md").read_text()
    assert "Went back from step 77 to step 60" in report
    assert json.loads((whole_run / "summary.json").read_text())["adam"]["rewinds"] == 1


@pytest.mark.nightly
@pytest.mark.slow
def test_killed_run_goes_back_as_if_nothing_had_happened(whole_run, trainer, tmp_path):
    folder = tmp_path / "run"

    def last(taken_back):
        """The last step, after the rewind or before."""
        rows = read_complete(folder)
        if bool(sinks.rewinds_of(rows, "adam")) != taken_back:
            return 0
        return max((r["step"] for r in sinks.steps_of(rows, "adam")), default=0)

    flags = [*FLAGS, "--output=run"]
    for moment in (lambda: 62 <= last(False) < 77, lambda: 61 <= last(True) < 75):
        kill_at(trainer.start(*flags, cwd=tmp_path), moment)
        flags = ["--resume", "--output=run"]
    code, _, errors = trainer.run(*flags, cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert_same_run(folder, whole_run, "adam")


def read_complete(folder):
    path = folder / "metrics.jsonl"
    return sinks.read(path) if path.exists() else []


@pytest.mark.slow
def test_step_that_is_not_finite_goes_back_once_and_then_halts(tmp_path, capsys):
    """The gradient is corrupted again, since the fault belongs to the step."""
    flags = ["--steps=12", "--bursts=1", "--bad-batches=0", "--spike-kind=nan"]
    flags += ["--checkpoint-every=5", "--eval-every=4", f"--output={tmp_path / 'run'}"]
    assert pretrain.main([*FLAGS, *flags]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("adam: back from step 6 to step 5, because it was not")
    assert "the update of step 6 is not finite" in second
    steps = sinks.steps_of(read_rows(tmp_path / "run"), "adam")
    assert [r["batch"] for r in steps] == [1, 2, 3, 4, 5, 7]


@pytest.mark.slow
def test_show_batch_prints_the_text_of_both_batches_of_a_step(whole_run, capsys):
    where = f"--output={whole_run}"
    assert pretrain.main(["--show-batch=76", where]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Batch 76\n  step 76 of adam: loss ")
    assert "corrupted batch, taken back by rewind 1\n" in text
    good = text[text.index("Batch 93\n") :]
    assert good.count("--- sequence") == 8
    config = RunConfig.from_settings(batch_size=8, sequence_length=32)
    (batch,) = data.load(config).batch(93)
    assert all(bytes(tokens).decode() in good for tokens in batch)
    message = f"{whole_run}/metrics.jsonl has no step 151 of this run"
    assert refused(capsys, "--show-batch=151", where) == message
    assert "needs --output" in refused(capsys, "--show-batch=1")
    rows = without_timing(read_rows(whole_run))
    assert rows[-1]["step"] == 150, "nothing was trained"


@pytest.mark.nightly
@pytest.mark.slow
def test_two_guarded_hosts_skip_the_same_steps_and_go_back_together(
    whole_run, trainer, tmp_path
):
    flags = [flag for flag in FLAGS if not flag.startswith("--data-parallel")]
    flags += ["--guard", "--output=run"]
    results = finish_all(trainer.start_hosts(2, *flags, cwd=tmp_path))
    assert [result.code for result in results] == [0, 0]
    rows, expected = (read_rows(folder) for folder in (tmp_path / "run", whole_run))
    (rewind,) = sinks.rewinds_of(rows, "adam")
    assert len(rewind["places"]) == 2 and rewind["rewound_from"] == 77
    skipped = [r for r in rows if r.get("skipped")]
    assert [r["step"] for r in skipped] == [75, 76, 77]
    assert all("loss spike" in r["skipped"] for r in skipped)
    one, other = (sinks.steps_of(run, "adam") for run in (rows, expected))
    assert [r["batch"] for r in one] == [r["batch"] for r in other]
    np.testing.assert_allclose(
        [r["loss"] for r in one], [r["loss"] for r in other], rtol=1e-3
    )
