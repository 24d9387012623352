"""Logs of runs are read alike in every format, and mistakes get one line."""

import csv
import json
import math

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

import run_logs
import skipped_steps
from spam_optax import SkipReason
from trainer.errors import UsageError

STEPS = 60
SPIKES = {40: SkipReason.LOSS_SPIKE, 45: SkipReason.NORM_SPIKE}
NONFINITE = {50: SkipReason.LOSS_NONFINITE}


def rows_of_run(loss="loss", norm="grad_norm"):
    """A run of 60 steps with a spike of the loss, one of the norm, and a NaN loss."""
    rows = [{"step": n, loss: 3.0, norm: 1.0} for n in range(1, STEPS + 1)]
    rows[39][loss], rows[44][norm], rows[49][loss] = 9.0, 30.0, math.nan
    return rows


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_events(path, rows, tensors=False):
    """Writes one event per number, as PyTorch's writer does, or TensorFlow's."""
    path.parent.mkdir(exist_ok=True)
    file = RecordWriter(str(path))
    file.write(Event(file_version="brain.Event:2").SerializeToString())
    for row in rows:
        for tag, number in row.items():
            value = Summary.Value(tag=tag)
            if tensors:
                value.tensor.dtype = 1
                value.tensor.tensor_content = np.float32(number).tobytes()
            else:
                value.simple_value = number
            event = Event(step=row["step"], summary=Summary(value=[value]))
            file.write(event.SerializeToString())
    file.close()
    return path


def write_any(folder, kind, rows):
    match kind:
        case "jsonl":
            evaluation = {"step": STEPS, "eval_loss": 2.0, "optimizer": "adam"}
            return write_json_lines(folder / "metrics.jsonl", [*rows, evaluation])
        case "csv":
            return write_csv(folder / "log.csv", rows)
        case "trainer_state":
            path = folder / "trainer_state.json"
            last = {"train_runtime": 1.0}
            if "loss" in rows[0]:
                last["train_loss"] = 3.3  # the mean of the run
            history = [*rows, {"step": STEPS, **last}]
            path.write_text(json.dumps({"epoch": 1.0, "log_history": history}))
            return path
        case "npz":
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            np.savez(folder / "log.npz", name="of the run", **columns)
            return folder / "log.npz"
    tensors = kind == "tensors"
    return write_events(folder / "tb" / "events.out.tfevents.1.host", rows, tensors)


@pytest.mark.parametrize(
    "kind", ["jsonl", "csv", "trainer_state", "npz", "scalars", "tensors"]
)
@pytest.mark.parametrize(
    "names", [("loss", "grad_norm"), ("train/loss", "train/grad_norm")]
)
def test_every_format_gives_the_same_steps(tmp_path, kind, names):
    path = write_any(tmp_path, kind, rows_of_run(*names))
    log = run_logs.read(path)
    assert log.steps.tolist() == list(range(1, STEPS + 1)) and log.notes == ()
    reasons = skipped_steps.skip_reasons(log)
    assert {n + 1: reasons[n] for n in np.flatnonzero(reasons)} == SPIKES | NONFINITE
    if kind == "scalars":
        again = run_logs.read(path.parent)
        np.testing.assert_array_equal(again.losses, log.losses)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "scalars"])
def test_a_step_recorded_twice_has_its_last_values(tmp_path, kind):
    """The run was killed after step 30, and resumed from step 20."""
    rows = rows_of_run()
    first = [row | {"loss": 7.0} for row in rows[:30]]
    log = run_logs.read(write_any(tmp_path, kind, first + rows[20:]))
    assert log.steps.tolist() == list(range(1, STEPS + 1))
    assert set(log.losses[:20]) == {7.0} and log.losses[20] == 3.0


def test_the_event_files_of_a_resumed_run_are_one_run(tmp_path):
    rows = rows_of_run()
    for number, part in enumerate((rows[:30], rows[20:])):
        path = write_events(tmp_path / "tb" / f"events.out.tfevents.{number}", part)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3)  # The program was killed.
    log = run_logs.read(tmp_path / "tb")
    assert log.steps.tolist() == list(range(1, STEPS + 1))
    assert log.norms is None
    assert log.notes == ("grad_norm is not used: 1 of 60 steps have none",)


def test_one_run_of_several_is_chosen(tmp_path):
    rows = [
        row | {"optimizer": name, "tensors": {"norm": [1.0]}}
        for name in ("spam", "adam")
        for row in rows_of_run()
    ]
    path = write_json_lines(tmp_path / "metrics.jsonl", rows)
    with pytest.raises(UsageError, match="step 1: .* several runs; .* optimizer=adam$"):
        run_logs.read(path)
    log = run_logs.read(path, only=("optimizer", "spam"))
    assert len(log.steps) == STEPS
    with pytest.raises(UsageError, match="no row with optimizer=lion"):
        run_logs.read(path, only=("optimizer", "lion"))


def test_a_norm_alone_is_enough_and_thin_logs_get_a_note(tmp_path):
    rows = [{"step": 10 * n, "norm": 1.0} for n in range(1, 9)]
    log = run_logs.read(write_csv(tmp_path / "log.csv", rows))
    assert log.losses is None and set(log.norms) == {1.0}
    assert log.notes == ("one step in 10 is recorded, but a guard sees every step",)


BAD = {
    "nothing.csv": (None, "cannot be read: No such file"),
    "log.txt": ("a", "cannot be read: expected .jsonl, .json, .csv, .npz or Tensor"),
    "empty.csv": ("", "no loss and no gradient norm: .* found nothing"),
    "names.csv": ("step,nll\n1,2\n", "expected a column loss, .* grad_norm, found st"),
    "words.csv": ("step,loss\n1,high\n", "the column loss has no numbers"),
    "steps.csv": ("step,loss\none,2\n", "the column step has 'one', expected the num"),
    "nan.csv": ("step,loss\n1,nan\n", "cannot be used: no loss and no norm in it is"),
    "list.jsonl": ("[1]\n", "cannot be read: line 1 is not a JSON object"),
    "cut.jsonl": ('{"loss": 1}\n{"lo\n{"loss": 1}\n', "line 2 is not JSON"),
    "state.json": ('{"step": 3}', "expected a trainer_state.json, with a log_history"),
    "bytes.csv": (b"\xff\xfe\x00", "cannot be read: 'utf-8' codec"),
    "text.npz": ("a", "cannot be read: "),
    "empty.npz": ("", "expected a file that numpy.savez wrote"),
    "deep.json": ("[" * 200_000, "cannot be read: "),
    "huge.jsonl": (f'{{"loss": 1{"0" * 400}}}', "the column loss has a number above"),
    "huge_step.csv": ("step,loss\n1e300,2\n", "the column step has '1e300'"),
    "a.tfevents": ("no events, but a text", "a.tfevents is no event file"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_get_one_line_with_the_name_of_the_file(tmp_path, capsys, name):
    content, words = BAD[name]
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UsageError, match=words) as caught:
        run_logs.read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}")
    with pytest.raises(SystemExit) as exit_:
        skipped_steps.main([str(tmp_path / name)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"skipped_steps.py: error: {caught.value}\n"


def test_mistakes_in_arrays_and_pictures_get_one_line(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", loss=np.ones(3), step=np.arange(2))
    with pytest.raises(UsageError, match=r"a\.npz cannot be read: expected arrays of"):
        run_logs.read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", loss=np.ones(3))
    with pytest.raises(SystemExit) as exit_:
        picture = str(tmp_path / "b.xyz")
        skipped_steps.main([str(tmp_path / "b.npz"), "--picture", picture])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "b.xyz: Format 'xyz' is not supported" in error and error.count("\n") == 1


def test_program_lists_the_steps_and_draws_them(tmp_path, capsys):
    path = write_any(tmp_path, "csv", rows_of_run("nll", "size"))
    picture = tmp_path / "log.png"
    flags = ["--loss=nll", "--norm=size", f"--picture={picture}"]
    assert skipped_steps.main([str(path), *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "3 of 60 steps (5.000%) skipped by loss and gradient norm; loss spike: 1;"
        " norm spike: 1; loss nonfinite: 1",
        "step 40: loss spike",
        "step 45: norm spike",
        "step 50: loss nonfinite",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        skipped_steps.main([str(path), "--loss=gone"])
    assert "no column gone, only step, nll, size" in capsys.readouterr().err
