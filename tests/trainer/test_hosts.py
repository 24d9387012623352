"""The trainer on several hosts and devices: processes that talk to each other."""

import json
import os
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

import spam_optax
from trainer import hosts, optimizers, sharding, train_step
from trainer.checkpoints import Checkpoints
from trainer.errors import UsageError
from trainer.run_folder import RunFolder
from trainer_process import (
    CONTINUE,
    checkpoint_steps,
    count_lines,
    finish_all,
    freeze_at,
    read_rows,
)

BOTH = ("spam", "sparse_spam")
FLAGS = [
    "--preset=nano",
    "--batch-size=8",
    "--sequence-length=16",
    "--eval-every=10",
    "--eval-sequences=16",
    "--no-spikes",
]
SHORT = [*FLAGS, "--steps=20", "--checkpoint-every=10"]
LONG = [*FLAGS, "--steps=40", "--checkpoint-every=4", "--optimizer=adam"]
ASK = "reached_preemption_sync_point"


@pytest.fixture(scope="module")
def one_device(trainer, tmp_path_factory):
    """The folder of a run with both optimizers, on one device of one host."""
    folder = tmp_path_factory.mktemp("one")
    result = trainer.run(*SHORT, "--optimizer", *BOTH, "--output=run", cwd=folder)
    assert (result.code, result.errors) == (0, "")
    return folder / "run"


@pytest.fixture(scope="module")
def long_run(trainer, tmp_path_factory):
    """A longer run with one optimizer, on one device of one host."""
    folder = tmp_path_factory.mktemp("long")
    assert trainer.run(*LONG, "--output=run", cwd=folder).code == 0
    return folder / "run"


def losses_of(folder: pathlib.Path, optimizer: str) -> dict[tuple[str, int], float]:
    """The losses of the steps and of the evaluations of an optimizer."""
    return {
        (kind, row["step"]): row[kind]
        for row in read_rows(folder)
        for kind in ("loss", "eval_loss")
        if row["optimizer"] == optimizer and kind in row
    }


def assert_same_losses(folder: pathlib.Path, expected: pathlib.Path, optimizer: str):
    losses, others = losses_of(folder, optimizer), losses_of(expected, optimizer)
    assert losses.keys() == others.keys()
    assert len(losses) >= 22
    for key, loss in losses.items():
        assert loss == pytest.approx(others[key], abs=1e-4), (optimizer, key)


def momentum_mask(folder: pathlib.Path) -> dict:
    """Which entries have momentum in the last state of sparse_spam."""
    config = RunFolder(folder).read().config
    optimizer = optimizers.make("sparse_spam", config)
    mesh = sharding.make_mesh(sharding.Parallelism(data=1), 8)
    task = train_step.make_task(config, config.model, mesh)
    like = jax.eval_shape(lambda: train_step.initial_state(task, optimizer))
    path = folder / "checkpoints" / "sparse_spam" / "20" / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path, sharding.abstract(like, mesh))
    return spam_optax.momentum_mask(state.opt_state, state.params)


def own_lines(text: str) -> list[str]:
    """Returns the lines that do not come from Gloo or from JAX's C++ code."""
    lines = text.splitlines()
    return [line for line in lines if "[Gloo]" not in line and ".cc:" not in line]


# ----------------------------------------------------------------------- same numbers


@pytest.fixture(scope="module")
def two_hosts(trainer, tmp_path_factory):
    """The same run on two hosts, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    flags = [*SHORT, "--optimizer", *BOTH, "--output=run"]
    results = finish_all(trainer.start_hosts(2, *flags, cwd=folder))
    assert [(result.code, result.errors) for result in results] == [(0, "")] * 2
    return folder / "run", [result.output for result in results]


@pytest.mark.slow
def test_two_hosts_compute_what_one_does(one_device, two_hosts):
    folder, _ = two_hosts
    for name in BOTH:
        assert_same_losses(folder, one_device, name)
    masks = momentum_mask(folder)
    jax.tree.map(np.testing.assert_array_equal, masks, momentum_mask(one_device))
    shares = {float(np.mean(mask)) for mask in jax.tree.leaves(masks)}
    assert min(shares) == 0.25, "the masks are not all true"


@pytest.mark.slow
def test_host_0_alone_prints_and_both_write_a_checkpoint(two_hosts):
    folder, (first, second) = two_hosts
    assert "spam" in first and f"are in {folder.name}" in first
    assert own_lines(second) == []
    for name in BOTH:
        assert checkpoint_steps(folder, name) == [10, 20]
    state = folder / "checkpoints" / "spam" / "20" / "state"
    for process in (0, 1):
        files = (state / f"ocdbt.process_{process}").rglob("*")
        assert sum(file.stat().st_size for file in files if file.is_file()) > 1000
    assert len(list((folder / "tensorboard" / "spam").iterdir())) == 1


@pytest.mark.nightly
@pytest.mark.slow
def test_eight_devices_compute_what_one_does(one_device, trainer, tmp_path):
    flags = [*SHORT, "--fsdp=2", "--tensor=2", "--optimizer", *BOTH, "--output=run"]
    code, output, errors = trainer.run(*flags, cwd=tmp_path, devices=8)
    assert (code, errors) == (0, "")
    assert "on 8 cpu" in output
    for name in BOTH:
        assert_same_losses(tmp_path / "run", one_device, name)
    jax.tree.map(
        np.testing.assert_array_equal,
        momentum_mask(tmp_path / "run"),
        momentum_mask(one_device),
    )


# ------------------------------------------------------------------ stopping, resuming


def stop_hosts(trainer, cwd, *signaled) -> int:
    """Runs two hosts until some of them get a SIGTERM. Returns the step.

    Host 0 stands still until the notice has been taken.
    """
    processes = trainer.start_hosts(2, *LONG, "--fsdp=2", "--output=run", cwd=cwd)
    metrics = cwd / "run" / "metrics.jsonl"
    freeze_at(processes[0], lambda: count_lines(metrics) > 6)
    for number in signaled:
        processes[number].send_signal(signal.SIGTERM)
    time.sleep(1.5)  # JAX looks for a signal every second
    processes[0].send_signal(signal.SIGCONT)
    results = finish_all(processes)
    assert [result.code for result in results] == [0, 0]
    assert [own_lines(result.errors) for result in results] == [[CONTINUE], []]
    step = checkpoint_steps(cwd / "run", "adam")[-1]
    assert max(row["step"] for row in read_rows(cwd / "run")) == step < 40
    return step


@pytest.mark.nightly
@pytest.mark.slow
def test_two_hosts_stop_together_and_any_number_goes_on(trainer, tmp_path, long_run):
    stop_hosts(trainer, tmp_path, 1)
    for devices, mesh in ((1, []), (8, ["--fsdp=4", "--tensor=2"])):
        folder = tmp_path / f"on-{devices}"
        shutil.copytree(tmp_path / "run", folder / "run")
        flags = ["--resume", *mesh, "--output=run"]
        code, _, errors = trainer.run(*flags, cwd=folder, devices=devices)
        assert (code, errors) == (0, "")
        assert_same_losses(folder / "run", long_run, "adam")


@pytest.mark.nightly
@pytest.mark.slow
def test_two_hosts_go_back_if_one_cannot_read_its_part(trainer, tmp_path, long_run):
    step = stop_hosts(trainer, tmp_path, 0, 1)
    newest = tmp_path / "run" / "checkpoints" / "adam" / str(step)
    files = (newest / "state" / "ocdbt.process_1" / "d").iterdir()
    os.truncate(max(files, key=lambda file: file.stat().st_size), 1000)
    flags = ["--resume", "--fsdp=2", "--output=run"]
    results = finish_all(trainer.start_hosts(2, *flags, cwd=tmp_path))
    assert [result.code for result in results] == [0, 0]
    (line,) = results[0].errors.splitlines()
    assert f"going back from the checkpoint of step {step} to the one before" in line
    assert results[1].errors == ""
    assert_same_losses(tmp_path / "run", long_run, "adam")


def test_hosts_exchange_names_that_are_not_utf8(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: x[None])
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: x)
    name = os.fsdecode(b"\xff.txt")
    assert hosts.gather(name) == [name]
    assert hosts.broadcast(lambda: name) == name


def test_stop_requests_of_jax_have_increasing_numbers(monkeypatch):
    """The numbers grow although steps begin again with every optimizer.

    JAX lets the hosts stop at a number that none of them has reached yet.
    """
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, ASK, lambda number: asked.append(number))
    stop = hosts.StopRequest()
    assert not any(stop.seen(step) for step in (1, 2, 3, 1, 2, 3))
    assert asked == [1, 2, 3, 4, 5, 6]


def test_saving_makes_no_stop_request(monkeypatch, tmp_path):
    """Orbax would make one with the step of a checkpoint, which may be in the past."""
    monkeypatch.setattr(multihost_utils, ASK, lambda number: pytest.fail("asked"))
    state = train_step.TrainState(jnp.int32(3), False, {}, (), ())
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


# --------------------------------------------------------------------------- mistakes


@pytest.mark.slow
def test_mistake_on_host_0_ends_all_hosts(trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    processes = trainer.start_hosts(2, *LONG, "--output=run", cwd=tmp_path)
    results = finish_all(processes)
    assert [result.code for result in results] == [2, 2]
    assert results[0].errors == (
        "pretrain.py: error: run already holds a run: continue it with --resume, or"
        " choose another folder with --output\n"
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {}


@pytest.mark.slow
def test_mistake_on_another_host_ends_all_hosts(trainer, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "text.txt").write_text("To be, or not to be. " * 100)
    flags = [*LONG, "--data=text.txt", f"--output={tmp_path / 'run'}"]
    results = finish_all(trainer.start_hosts(2, *flags, cwd=folders))
    assert [result.code for result in results] == [2, 2]
    for result in results:
        assert result.errors == (
            "pretrain.py: error: cannot read the data file text.txt: No such file or"
            " directory\n"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
@pytest.mark.slow
def test_broken_shard_of_one_host_ends_all_at_the_same_step(trainer, tmp_path):
    """Only host 1 reads it. Both hosts save the state of the step before."""
    pytest.importorskip("datasets")
    lines = [json.dumps({"text": f"{n}: To be, or not to be."}) for n in range(900)]
    for name in ("train-0", "train-1", "train-2", "train-3", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "train-3.jsonl").write_text('{"text": "cut short')
    flags = [*LONG, "--steps=80", "--eval-every=80", "--batch-size=64"]
    flags += [f"--data=hf:{tmp_path}", f"--output={tmp_path / 'run'}"]
    results = finish_all(trainer.start_hosts(2, *flags, cwd=tmp_path))
    assert [result.code for result in results] == [1, 1]
    (line,) = results[0].errors.splitlines()
    assert (
        "train-3.jsonl, of which 0 rows were read: " in line and results[1].errors == ""
    )
    step = checkpoint_steps(tmp_path / "run", "adam")[-1]
    assert f"no batch for step {step + 1}, step {step} is saved: " in line
    assert len(read_rows(tmp_path / "run")) == step

    flags = ["--resume", f"--output={tmp_path / 'run'}", "--skip-bad-data=1"]
    results = finish_all(trainer.start_hosts(2, *flags, cwd=tmp_path))
    assert [result.code for result in results] == [0, 0]
    told = [result.errors for result in results]
    assert sorted(errors.count("\n") for errors in told) == [0, 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["adam"]["bad_data_skipped"] == 1


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:port"])
def test_coordinator_has_a_port(address):
    with pytest.raises(UsageError, match=f"must be HOST:PORT, not '{address}'"):
        hosts.connect(hosts.Cluster(False, address, 2, 0))
