"""The program from its start to its end, and the files that it writes."""

import json
import pathlib
import shutil
import signal
import statistics
import types

import pytest

import pretrain
from trainer_in_process import PAIR, SMALL_FLAGS
from trainer_process import read_rows

STEP_KEYS = {
    "optimizer",
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "clipped_grad_norm",
    "update_norm",
    "param_norm",
    "tensors",
    "spikes_clipped",
    "skipped",
    "skipped_steps",
    "batch",
    "steps_above_band",
    "fault",
    "tokens_per_second",
    "flops_utilization",
}
SUMMARY_KEYS = {
    "bad_data_skipped",
    "final_eval_loss",
    "final_eval_perplexity",
    "halted_at",
    "flops_utilization",
    "worst_loss_jump",
    "worst_burst",
    "spikes_seen",
    "spikes_clipped",
    "skipped_steps",
    "rewinds",
    "tokens_per_second",
}


@pytest.mark.one_python
def test_run_leaves_its_files_and_no_warnings(finished_run):
    folder, output, errors = finished_run
    assert errors == ""
    assert "Warning" not in output
    assert "final" in output and "spam" in output and output.endswith("are in run\n")
    assert all(len(line) <= 120 for line in output.splitlines())
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "report.md",
        "spike_suppression.png",
        "summary.json",
        "tensorboard",
        "tensors.json",
    }
    for name in ("adam", "spam"):
        (events,) = (folder / "tensorboard" / name).iterdir()
        assert events.name.startswith("events.out.tfevents")
        assert events.stat().st_size > 60 * 100


@pytest.mark.nightly
@pytest.mark.slow
def test_losslint_reads_the_metrics(finished_run, capsys):
    """It reads every row of each optimizer, and finds nothing wrong with the log."""
    losslint = pytest.importorskip("losslint.cli")
    folder, _, _ = finished_run
    path = folder / "metrics.jsonl"
    assert losslint.main(["check", str(path), "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (run,) = found["runs"]
    assert run["points"] == len(read_rows(folder))
    assert {"loss", "eval_loss", "grad_norm", "learning_rate"} <= {*run["series"]}
    (finding,) = found["findings"]
    assert finding["check"] == "step_backtrack"  # where the second optimizer begins
    assert finding["details"]["count"] == 1


@pytest.mark.one_python
def test_metrics_have_a_line_a_step_and_an_evaluation(finished_run):
    folder, _, _ = finished_run
    rows = read_rows(folder)
    fault_steps = {12, 13, 14, 24, 25, 26, 36, 37, 38, 48, 49, 50}
    for name in ("adam", "spam"):
        own = [row for row in rows if row["optimizer"] == name]
        steps = [row for row in own if "loss" in row]
        evaluations = [row for row in own if "eval_loss" in row]
        assert [row["step"] for row in steps] == list(range(1, 61))
        assert all(set(row) == STEP_KEYS for row in steps)
        faults = {row["step"]: row["fault"] for row in steps if row["fault"]}
        assert {step for step, x in faults.items() if x == "gradient"} == fault_steps
        bad = {20, 21, 22, 40, 41, 42}
        assert {step for step, x in faults.items() if x == "batch"} == bad
        assert [row["step"] for row in evaluations] == [20, 40, 60]
    assert [row["optimizer"] for row in rows] == ["adam"] * 63 + ["spam"] * 63


@pytest.mark.one_python
def test_summary_follows_from_the_metrics(finished_run):
    folder, _, _ = finished_run
    rows = read_rows(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"adam", "spam"}
    for name, values in summary.items():
        assert set(values) == SUMMARY_KEYS
        steps = {
            row["step"]: row
            for row in rows
            if row["optimizer"] == name and "loss" in row
        }
        (final,) = [
            row["eval_loss"]
            for row in rows
            if row["optimizer"] == name and row["step"] == 60 and "eval_loss" in row
        ]
        losses = {}  # a batch of random tokens has the loss before it
        for step, row in steps.items():
            is_random = row["fault"] == "batch"
            losses[step] = losses[step - 1] if is_random else row["loss"]
        jumps = []
        for fault in (12, 20, 24, 36, 40, 48):
            before = [losses[s] for s in steps if fault - 20 <= s < fault]
            after = [losses[s] for s in steps if fault < s <= fault + 40]
            jumps.append(max(after) - statistics.fmean(before))
        norms = {step: row["grad_norm"] for step, row in steps.items()}
        usual = {
            step: statistics.median(norms[s] for s in norms if step - 100 <= s < step)
            for step in norms
            if step > 1
        }
        faults = [step for step, row in steps.items() if row["fault"]]
        assert values["final_eval_loss"] == final
        assert values["worst_loss_jump"] == pytest.approx(max(jumps))
        assert values["spikes_seen"] == sum(norms[s] > 10 * usual[s] for s in usual)
        assert values["spikes_seen"] >= 12
        assert values["spikes_clipped"] == sum(
            row["spikes_clipped"] for row in steps.values()
        )
        assert values["worst_burst"] == pytest.approx(
            max(steps[s]["clipped_grad_norm"] / usual[s] for s in faults)
        )
        assert values["tokens_per_second"] == pytest.approx(
            statistics.median(
                row["tokens_per_second"]
                for row in steps.values()
                if row["tokens_per_second"] is not None
            )
        )
    assert summary["adam"]["spikes_clipped"] == 0
    assert summary["spam"]["spikes_clipped"] > 0


@pytest.mark.one_python
def test_picture_is_a_picture(finished_run):
    folder, _, _ = finished_run
    data = (folder / "spike_suppression.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert 1000 <= width <= 3000 and 800 <= height <= 3000
    assert len(data) > 30_000


@pytest.mark.one_python
def test_nonfinite_step_halts_its_optimizer_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps=12", "--spike-kind=nan", "--spike-rate=0.01", "--output=run"]
    assert pretrain.main([*SMALL_FLAGS, *PAIR, *flags]) == 1
    captured = capsys.readouterr()
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert summary["adam"]["halted_at"] == 2  # of the first burst
    assert summary["adam"]["final_eval_loss"] is None
    assert summary["spam"]["halted_at"] is None
    assert summary["spam"]["final_eval_loss"] < 5.6
    assert "NaN" not in pathlib.Path("run/metrics.jsonl").read_text()
    assert pathlib.Path("run/spike_suppression.png").stat().st_size > 30_000
    (line,) = captured.err.splitlines()
    for words in ("adam", "update of step 2", "not finite", "step 1 is kept", "Try"):
        assert words in line
    assert [path.name for path in pathlib.Path("run/checkpoints/adam").iterdir()] == [
        "1"
    ]


@pytest.mark.slow
def test_run_without_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--optimizer=spam", "--steps=3", "--no-spikes", "--qk-clip=1e-3"]
    assert pretrain.main([*SMALL_FLAGS, *flags]) == 0
    (folder,) = pathlib.Path("runs").iterdir()
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert row["max_attention_logit"] > 1e-3
    assert row["heads_clipped"] >= 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["spam"]["worst_loss_jump"] is None
    assert summary["spam"]["worst_burst"] is None
    assert "No faults" in capsys.readouterr().out


def test_interrupt_before_the_first_step_ends_at_once(
    task, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def prepare(*_):
        signal.raise_signal(signal.SIGINT)
        return task, types.SimpleNamespace(digest="digest", files="1 file", left_out={})

    monkeypatch.setattr(pretrain, "prepare", prepare)
    assert pretrain.main([*SMALL_FLAGS, "--output=run"]) == 130
    assert json.loads(pathlib.Path("run/summary.json").read_text()) == {}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    capsys.readouterr()


def test_help_mentions_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    parser, _ = pretrain.parse([])
    for action in parser._actions:
        assert any(flag in text for flag in action.option_strings)
    for default in ("0.004", "5000.0", "1000.0", "noise", "tiny", "400"):
        assert f"(default: {default})" in " ".join(text.split())
    assert "examples:" in text
    assert max(map(len, text.splitlines())) <= 88


def test_a_vanished_output_folder_is_reported(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def train_all(*_):
        shutil.rmtree(folder)
        return []

    monkeypatch.setattr(pretrain, "train_all", train_all)
    assert pretrain.main(["--preset=nano", f"--output={folder}"]) == 1
    line = f"pretrain.py: the files of the run are no longer in {folder}\n"
    assert capsys.readouterr().err == line
