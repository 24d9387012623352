"""The main job, end to end, and the modules it is made of."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import pretrain
from lm import (
    analysis,
    corpus,
    model,
    optimizers,
    records,
    run_folder,
    training,
)
from lm.config import OPTIMIZERS, RunConfig

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SMALL = {"model": "nano", "steps": 24, "batch_size": 4, "sequence_length": 16}
SMALL_FLAGS = [
    "--model=nano",
    "--steps=60",
    "--batch-size=4",
    "--sequence-length=16",
    "--eval-every=20",
    "--eval-sequences=16",
    "--checkpoint-every=8",
    "--spike-kind=scale",
]
PAIR = ["--optimizer", "adam", "spam"]
STEP_KEYS = {
    "optimizer",
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "clipped_grad_norm",
    "spikes_clipped",
    "fault",
    "tokens_per_second",
}
SUMMARY_KEYS = {
    "final_eval_loss",
    "worst_loss_jump",
    "worst_burst",
    "spikes_seen",
    "spikes_clipped",
    "tokens_per_second",
}


@pytest.fixture(scope="module")
def task():
    text = corpus.SHAKESPEARE.read_bytes()[:20_000]
    return pretrain.make_task(RunConfig(**SMALL), text)


@pytest.fixture(scope="module")
def rows(task):
    """A whole run of every optimizer."""
    return rows_of(task, OPTIMIZERS)


def rows_of(task, names):
    rows = []
    for name in names:
        optimizer = optimizers.make(name, task.config)
        training.train(
            training.initial_state(task, optimizer),
            task,
            optimizer,
            record=rows.append,
            save=lambda state: None,
            interrupted=lambda: False,
        )
    return rows


def gradients_at(task, params, step):
    """Loss, gradients and fault state at `step` of a run that stays at `params`."""
    fault_state = task.faults.init(params)
    for n in range(step):
        loss, gradients, fault_state = training.faulty_gradients(
            params,
            fault_state,
            task.batches[n],
            graphdef=task.graphdef,
            faults=task.faults,
        )
    return loss, gradients, fault_state


# ---------------------------------------------------------------------------- model


@nnx.jit
def logits_of(decoder, tokens):
    return decoder(tokens)


@pytest.fixture(scope="module")
def decoder():
    return model.Decoder(model.PRESETS["nano"], rngs=nnx.Rngs(0))


def parameter_count(config):
    """By hand: attention, gated feed-forward, norms, embedding."""
    block = 4 * config.width**2 + 3 * config.width * config.ffn_width + 2 * config.width
    return config.layers * block + config.vocabulary * config.width + config.width


@pytest.mark.parametrize("preset", model.PRESETS)
def test_model_has_the_parameters_of_its_shape(preset):
    config = model.PRESETS[preset]
    abstract = nnx.eval_shape(lambda: model.Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(abstract)))
    assert sum(leaf.size for leaf in leaves) == parameter_count(config)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_loss_at_initialization_is_that_of_a_uniform_guess(task):
    loss = training.evaluate(
        task.initial_params, task.validation, graphdef=task.graphdef
    )
    assert loss == pytest.approx(math.log(256), rel=0.03)


def test_model_is_causal(decoder):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % 256)
    logits, other = logits_of(decoder, tokens), logits_of(decoder, changed)
    np.testing.assert_array_equal(logits[:, :7], other[:, :7])
    assert (np.abs(logits[:, 7:] - other[:, 7:]).max(axis=-1) > 0).all()


def test_model_sees_the_order_of_earlier_tokens(decoder):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    swapped = tokens.at[:, 2].set(tokens[:, 3]).at[:, 3].set(tokens[:, 2])
    last, other = (logits_of(decoder, t)[:, -1] for t in (tokens, swapped))
    assert np.abs(last - other).max() > 1e-6


def test_layers_are_drawn_independently_and_all_used(task):
    _, gradients, _ = gradients_at(task, task.initial_params, 1)
    layers = model.PRESETS["nano"].layers
    for leaf in jax.tree.leaves(gradients["blocks"]):
        assert len(leaf) == layers
        assert (np.abs(leaf).reshape(layers, -1).max(axis=1) > 0).all()
    kernel = task.initial_params["blocks"]["ffn"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_scan_unrolling_does_not_change_the_model(decoder):
    config = dataclasses.replace(model.PRESETS["nano"], scan_unroll=2)
    unrolled = model.Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    np.testing.assert_allclose(
        logits_of(decoder, tokens), logits_of(unrolled, tokens), atol=1e-5
    )


rotate = jax.jit(model.rotate)


def test_rotary_product_depends_on_the_distance_only():
    tokens = 10
    query, key = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    queries, keys = (
        np.asarray(rotate(np.tile(x, (1, tokens, 1, 1)), 100.0))[0, :, 0]
        for x in (query, key)
    )
    products = queries @ keys.T
    for distance in range(tokens):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert len({round(float(x), 4) for x in products[0]}) == tokens


def test_rotation_keeps_norms_and_the_first_position():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    rotated = np.asarray(rotate(x, 10_000.0))
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
    np.testing.assert_allclose(
        np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_flat_dot_general_is_the_product():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 5))
    dimensions = (((2,), (0,)), ((), ()))
    np.testing.assert_allclose(
        model.flat_dot_general(x, kernel, dimensions), x @ kernel, rtol=1e-5
    )
    with pytest.raises(ValueError, match="last axis"):
        model.flat_dot_general(x, kernel, (((1,), (0,)), ((), ())))


# --------------------------------------------------------------------------- corpus


def test_split_is_contiguous_and_without_overlap():
    text = bytes(range(200)) * 5
    train, validation = corpus.split(text)
    assert len(validation) == 100
    assert train.tobytes() + validation.tobytes() == text


def test_windows_cover_every_target_once():
    tokens = np.arange(100, dtype=np.uint8)
    windows = corpus.Windows(tokens, 7)
    assert len(windows) == 14
    targets = np.concatenate([windows[i][1:] for i in range(len(windows))])
    np.testing.assert_array_equal(targets, np.arange(1, 99))


def test_batches_are_a_function_of_seed_and_step():
    tokens = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)
    first = corpus.batches(tokens, 16, 4, seed=3)
    second = corpus.batches(tokens, 16, 4, seed=3)
    in_order = [first[n] for n in range(200)]
    for n in (150, 3, 70):  # no order of access matters
        np.testing.assert_array_equal(second[n], in_order[n])
    other = corpus.batches(tokens, 16, 4, seed=4)
    assert not np.array_equal(other[0], first[0])
    assert first[0].shape == (4, 17)
    assert first[0].dtype == np.uint8


def test_an_epoch_holds_every_window_once_and_epochs_differ():
    tokens = np.arange(161, dtype=np.uint8)  # ten windows, named by their first byte
    data = corpus.batches(tokens, 16, 5, seed=0)
    epochs = [[*data[2 * n][:, 0], *data[2 * n + 1][:, 0]] for n in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 160, 16))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_evaluation_batches_are_spread_and_bounded():
    tokens = np.arange(241, dtype=np.uint8)
    stack = corpus.evaluation_batches(tokens, 8, batch_size=4, limit=10)
    assert stack.shape == (2, 4, 9)
    starts = stack[:, :, 0].reshape(-1)
    assert starts[0] == 0 and starts[-1] == 232
    assert len(set(starts)) == 8
    assert corpus.evaluation_batches(tokens, 100, 4, 10).shape == (1, 2, 101)


# -------------------------------------------------------------------- training steps


def test_optimizers_meet_identical_parameters_batches_and_faults(task):
    first_fault = task.config.fault_steps[0]
    reached = {}
    for name in OPTIMIZERS:
        state = training.initial_state(task, optimizers.make(name, task.config))
        last = gradients_at(task, state.params, first_fault)
        reached[name] = state.params, state.fault_state, last
    for name in OPTIMIZERS[1:]:
        jax.tree.map(np.testing.assert_array_equal, reached[name], reached["adam"])
    _, clean, _ = gradients_at(task, task.initial_params, first_fault - 1)
    _, faulty, _ = reached["adam"][-1]
    assert optax.tree.norm(faulty) > 500 * optax.tree.norm(clean)


def test_training_leaves_the_first_parameters_alone(task, rows):
    _, fresh = training.initialize(task.config)
    jax.tree.map(np.testing.assert_array_equal, task.initial_params, fresh)
    first = [row for row in rows if row["step"] == 1]
    assert len(first) == len(OPTIMIZERS)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len({row[name] for row in first}) == 1


def test_gradient_norm_after_clipping_is_what_entered_the_moments(rows):
    steps = {name: records.steps_of(rows, name) for name in OPTIMIZERS}
    for row in steps["adam"]:
        assert row["clipped_grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    for row in steps["adam_clip"]:
        expected = min(1.0, row["grad_norm"])
        assert row["clipped_grad_norm"] == pytest.approx(expected, rel=1e-3)
    clipped = 0
    for row in steps["spam"]:
        close = row["clipped_grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
        if row["spikes_clipped"]:
            clipped += 1
            assert row["clipped_grad_norm"] < row["grad_norm"] * 1.001
        else:
            assert close, "also right in reset steps"
    assert clipped
    for row in steps["clip_spam"]:
        assert row["clipped_grad_norm"] <= 1.001


def test_all_optimizers_follow_one_schedule(rows):
    rates = [
        analysis.column(records.steps_of(rows, name), "learning_rate")
        for name in ("adam", "clip_spam")
    ]
    np.testing.assert_array_equal(*rates)
    assert rates[0].max() == pytest.approx(4e-3)
    assert rates[0].argmax() == 2  # a tenth of 24 steps
    assert rates[0][-1] < 0.15 * 4e-3


def test_fault_steps_are_four_bursts_of_three():
    config = RunConfig(steps=500)
    assert config.burst_starts == (100, 200, 300, 400)
    assert len(config.fault_steps) == 12
    assert RunConfig(bursts=0).fault_steps == ()
    assert set(RunConfig(steps=3).fault_steps) <= {1, 2, 3}


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 500, 100_000])
def test_every_length_of_run_gives_valid_optimizers(steps):
    config = RunConfig(steps=steps)
    for name in OPTIMIZERS:
        optimizers.make(name, config)
    assert (
        config.spam_intervals["grace_steps"] < config.spam_intervals["reset_interval"]
    )


# ------------------------------------------------------------------------- analysis


def test_running_median_and_spikes():
    norms = np.array([1.0, 1.0, 11.0, np.nan, 1.0, 10.0])
    np.testing.assert_array_equal(
        analysis.running_median(norms), [np.nan, 1.0, 1.0, 1.0, 1.0, 1.0]
    )
    assert analysis.count_spikes(norms) == 2  # 11 > 10 x 1, and the NaN; 10 is not


def test_worst_loss_jump_looks_40_steps_ahead_and_20_back():
    losses = np.full(200, 2.0)
    losses[:79] = 9.0  # more than 20 steps before the burst at step 100
    losses[99] = 7.0  # the burst's own step: its loss is from before the update
    losses[139] = 2.5  # step 140, the last that counts
    losses[140] = 8.0
    assert analysis.worst_loss_jump(losses, (100,)) == pytest.approx(0.5)
    assert analysis.worst_loss_jump(losses, (100, 120)) == pytest.approx(8 - 2.25)
    assert analysis.worst_loss_jump(losses, ()) is None
    losses[110] = np.nan
    assert math.isnan(analysis.worst_loss_jump(losses, (100,)))


# ------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the program in a process of its own.

    The processes share a compilation cache, which saves each of them 20 seconds.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    path = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(path),
    }

    def start_program(*flags, cwd):
        return subprocess.Popen(
            [sys.executable, EXAMPLES / "pretrain.py", *flags],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start_program


def finish(process):
    """Exit code, output and error output."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def wait_for_rows(process, metrics, count):
    """Waits until the running program has written `count` rows."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError("no rows in time")


def read_lines(path):
    """The rows, read without the program's own reader."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_timing(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def final_state(folder, name):
    """The arrays of an optimizer's last checkpoint, without knowing their structure."""
    (step,) = (folder / "checkpoints" / name).iterdir()
    assert step.name == "60"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((step / "default").resolve())


@pytest.fixture(scope="module")
def finished_run(start, tmp_path_factory):
    """Two optimizers in a process of their own, from an empty folder."""
    folder = tmp_path_factory.mktemp("finished")
    process = start(*SMALL_FLAGS, *PAIR, "--output=run", cwd=folder)
    code, output, errors = finish(process)
    assert code == 0, errors
    return folder / "run", output, errors


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
        "spike_suppression.png",
        "summary.json",
        "tensorboard",
    }
    for name in ("adam", "spam"):
        (events,) = (folder / "tensorboard" / name).iterdir()
        assert events.name.startswith("events.out.tfevents")
        assert events.stat().st_size > 60 * 100


def test_metrics_have_a_line_a_step_and_an_evaluation(finished_run):
    folder, _, _ = finished_run
    rows = read_lines(folder / "metrics.jsonl")
    fault_steps = {12, 13, 14, 24, 25, 26, 36, 37, 38, 48, 49, 50}
    for name in ("adam", "spam"):
        own = [row for row in rows if row["optimizer"] == name]
        steps = [row for row in own if "loss" in row]
        evaluations = [row for row in own if "eval_loss" in row]
        assert [row["step"] for row in steps] == list(range(1, 61))
        assert all(set(row) == STEP_KEYS for row in steps)
        assert {row["step"] for row in steps if row["fault"]} == fault_steps
        assert [row["step"] for row in evaluations] == [20, 40, 60]
    assert [row["optimizer"] for row in rows] == ["adam"] * 63 + ["spam"] * 63


def test_summary_follows_from_the_metrics(finished_run):
    folder, _, _ = finished_run
    rows = read_lines(folder / "metrics.jsonl")
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
        jumps = []
        for fault in (12, 24, 36, 48):
            before = [steps[s]["loss"] for s in steps if fault - 20 <= s < fault]
            after = [steps[s]["loss"] for s in steps if fault < s <= fault + 40]
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


def test_picture_is_a_picture(finished_run):
    folder, _, _ = finished_run
    data = (folder / "spike_suppression.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert 1000 <= width <= 3000 and 800 <= height <= 3000
    assert len(data) > 30_000


def test_killed_run_resumes_bit_for_bit(finished_run, start, tmp_path):
    whole, _, _ = finished_run
    folder = tmp_path / "run"
    process = start(*SMALL_FLAGS, *PAIR, "--output=run", cwd=tmp_path)
    wait_for_rows(process, folder / "metrics.jsonl", 63 + 20)  # of spam
    process.kill()
    finish(process)
    assert len(records.read(folder / "metrics.jsonl")) < 2 * 63

    process = start("--resume", "--output=run", cwd=tmp_path)
    wait_for_rows(process, folder / "metrics.jsonl", 63 + 30)
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert code == 130
    assert errors.splitlines() == [
        "Interrupted. Continue with: pretrain.py --resume --output run"
    ]
    rows = records.read(folder / "metrics.jsonl")
    assert 63 + 30 <= len(rows) < 2 * 63
    assert set(json.loads((folder / "summary.json").read_text())) == {"adam"}

    process = start("--resume", *SMALL_FLAGS, "--output=run", cwd=tmp_path)
    code, _, errors = finish(process)
    assert (code, errors) == (0, "")
    assert without_timing(records.read(folder / "metrics.jsonl")) == without_timing(
        records.read(whole / "metrics.jsonl")
    )
    summary, expected = (
        json.loads((path / "summary.json").read_text()) for path in (folder, whole)
    )
    assert without_timing(summary.values()) == without_timing(expected.values())
    for name in ("adam", "spam"):
        jax.tree.map(
            np.testing.assert_array_equal,
            final_state(folder, name),
            final_state(whole, name),
        )


def test_nonfinite_losses_are_recorded_as_null(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps=12", "--spike-kind=nan", "--spike-rate=0.01", "--output=run"]
    assert pretrain.main([*SMALL_FLAGS, *PAIR, *flags]) == 0
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert summary["adam"]["final_eval_loss"] is None
    assert summary["adam"]["worst_loss_jump"] is None
    assert summary["spam"]["final_eval_loss"] < 5.6
    assert "NaN" not in pathlib.Path("run/metrics.jsonl").read_text()
    assert pathlib.Path("run/spike_suppression.png").stat().st_size > 30_000
    assert " - " in capsys.readouterr().out


def test_run_without_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--optimizer=spam", "--steps=3", "--no-spikes"]
    assert pretrain.main([*SMALL_FLAGS, *flags]) == 0
    (folder,) = pathlib.Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["spam"]["worst_loss_jump"] is None
    assert summary["spam"]["worst_burst"] is None
    assert "No faults" in capsys.readouterr().out


def test_interrupt_before_the_first_step_ends_at_once(
    task, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def make_task(config, text):
        signal.raise_signal(signal.SIGINT)
        return task

    monkeypatch.setattr(pretrain, "make_task", make_task)
    assert pretrain.main([*SMALL_FLAGS, "--output=run"]) == 130
    assert json.loads(pathlib.Path("run/summary.json").read_text()) == {}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    capsys.readouterr()


# ------------------------------------------------------------------ mistakes, help


def refused(capsys, *flags):
    """The one line with which the program refuses `flags`."""
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(list(flags))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("pretrain.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data=nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--data=."], ["data file .", "directory"]),
        (["--data=empty.txt"], ["empty.txt", "is empty"]),
        (["--data=short.txt"], ["train", "90 bytes", "101"]),
        (["--data=medium.txt"], ["validation", "50 bytes", "101"]),
        (["--output=file.txt/run"], ["output folder", "file.txt"]),
        (["--output=file.txt"], ["output folder", "file.txt"]),
        (["--model=huge"], ["--model", "huge", "tiny"]),
        (["--optimizer=sgd"], ["--optimizer", "sgd", "clip_spam"]),
        (["--optimizer"], ["--optimizer", "at least one"]),
        (["--steps=0"], ["--steps", ">= 1", "'0'"]),
        (["--steps=many"], ["--steps", "'many'"]),
        (["--steps=1.5"], ["--steps", "'1.5'"]),
        (["--learning-rate=0"], ["--learning-rate", "> 0", "'0'"]),
        (["--learning-rate=nan"], ["--learning-rate", "'nan'"]),
        (["--learning-rate=inf"], ["--learning-rate", "'inf'"]),
        (["--batch-size=-1"], ["--batch-size", "'-1'"]),
        (["--sequence-length=0"], ["--sequence-length", "'0'"]),
        (["--seed=-1"], ["--seed", ">= 0"]),
        (["--bursts=-1"], ["--bursts", ">= 0"]),
        (["--spike-rate=1.5"], ["--spike-rate", "<= 1", "'1.5'"]),
        (["--spike-factor=x"], ["--spike-factor", "'x'"]),
        (["--spike-kind=odd"], ["--spike-kind", "noise"]),
        (["--threshold=0"], ["--threshold", "> 0"]),
        (["--reset-interval=1"], ["--reset-interval", ">= 2"]),
        (["--eval-every=0"], ["--eval-every", ">= 1"]),
        (["--checkpoint-every=0"], ["--checkpoint-every", ">= 1"]),
        (["--no-such-flag"], ["unrecognized", "--no-such-flag"]),
        (["--resume"], ["--resume needs --output"]),
        (["--resume", "--output=nowhere"], ["no run to resume", "nowhere"]),
        (["--resume", "--output=damaged"], ["damaged", "config.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_line_and_exit_code_2(
    flags, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty.txt").touch()
    pathlib.Path("short.txt").write_text("x" * 100)
    pathlib.Path("medium.txt").write_text("x" * 500)
    pathlib.Path("file.txt").write_text("")
    pathlib.Path("damaged").mkdir()
    pathlib.Path("damaged/config.json").write_text("{")
    line = refused(capsys, "--sequence-length=100", *flags)
    for word in words:
        assert word in line
    assert not pathlib.Path("runs").exists()


def test_mistake_in_a_process_of_its_own(start, tmp_path):
    code, output, errors = finish(start("--data=nowhere.txt", cwd=tmp_path))
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors and "usage" not in errors


def test_run_is_not_overwritten(finished_run, capsys):
    folder, _, _ = finished_run
    before = (folder / "config.json").read_text()
    line = refused(capsys, f"--output={folder}")
    assert "--resume" in line and "another folder" in line
    assert (folder / "config.json").read_text() == before


def test_resume_refuses_other_settings(finished_run, tmp_path, capsys):
    folder, _, _ = finished_run
    line = refused(capsys, "--resume", f"--output={folder}", "--learning-rate=1e-3")
    assert "learning_rate = 0.001" in line and "0.004" in line
    line = refused(capsys, "--resume", f"--output={folder}", "--optimizer=spam")
    assert "adam spam" in line


def test_resume_refuses_a_changed_text(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("To be, or not to be. " * 100)
    folder = run_folder.RunFolder(tmp_path / "run")
    run_folder.begin(folder, {"data": str(book)})
    book.write_text("that is the question. " * 100)
    assert "has changed" in refused(capsys, "--resume", f"--output={folder.path}")


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


def damage(path, how):
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "a line of garbage": [*lines[:3], b"\xff{\n", *lines[4:]],
        "a row without a step": [*lines[:3], b'{"loss": 1.0}\n', *lines[4:]],
        "the last evaluation cut": [*lines[:-1], lines[-1][:-20]],
        "a step missing": [*lines[:5], *lines[6:]],
        "no file": None,
    }[how]
    path.unlink()
    if damaged is not None:
        path.write_bytes(b"".join(damaged))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("a line of garbage", ["metrics.jsonl, line 4, is damaged"]),
        ("a row without a step", ["metrics.jsonl, line 4, is damaged"]),
        ("the last evaluation cut", ["2 evaluations of spam", "another folder"]),
        ("a step missing", ["59 steps", "of adam", "another folder"]),
        ("no file", ["0 steps", "of adam", "another folder"]),
    ],
)
def test_resume_refuses_damaged_metrics(finished_run, tmp_path, capsys, how, words):
    """A run whose records are gone must not say that it was interrupted for ever."""
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    damage(folder / "metrics.jsonl", how)
    line = refused(capsys, "--resume", f"--output={folder}")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", "six"), ("model", "giant"), ("optimizers", ["sgd"]), ("seed", True)],
)
def test_resume_refuses_a_damaged_configuration(
    finished_run, tmp_path, capsys, name, value
):
    config = json.loads((finished_run[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    assert "is damaged" in refused(capsys, "--resume", f"--output={tmp_path}")


def test_steps_must_fit_an_int32(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "<= 2147483647" in refused(capsys, "--steps=99999999999")
