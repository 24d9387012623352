"""What the trainer survives: kills, signals, damaged files, full disks, NaN."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import pretrain
from trainer import loop, optimizers, train_step
from trainer.config import RunConfig
from trainer.data import hf_stream, text_files
from trainer.output import sinks
from trainer_in_process import make_task, refused
from trainer_process import (
    CONTINUE,
    assert_same_arrays,
    assert_same_run,
    checkpoint_steps,
    finish,
    freeze_at,
    kill_at,
    read_rows,
    saved_arrays,
    without_timing,
)

pytestmark = pytest.mark.slow
SMALL = [
    "--preset=nano",
    "--batch-size=8",
    "--sequence-length=16",
    "--eval-sequences=16",
]
LONG = [
    *SMALL,
    "--steps=40",
    "--eval-every=10",
    "--checkpoint-every=7",
    "--keep-checkpoints=1",
    "--bursts=2",
    "--guard",
]
SHORT = [
    *SMALL,
    "--steps=12",
    "--eval-every=4",
    "--checkpoint-every=5",
    "--data-parallel=1",
]
RESUME = ["--resume", "--output=run"]
RESUME_SHORT = ["--resume", "--data-parallel=1"]
LARGE = 2**16  # kilobytes of a disk that holds a run


class Watch:
    """Reads from the files of a run how far it is."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.before = self.inode()

    def inode(self) -> int:
        return self.metrics.stat().st_ino if self.metrics.exists() else 0

    def going(self) -> bool:
        """It has cut the rows to its checkpoint, and so replaced the file."""
        return self.inode() != self.before

    def saving(self) -> bool:
        return any(self.folder.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))

    def rows_since(self, optimizer: str) -> int:
        """The steps recorded after the newest checkpoint."""
        steps = [row["step"] for row in self.rows() if row["optimizer"] == optimizer]
        return max(steps, default=0) - max(self.saved(optimizer), default=0)

    def rows(self) -> list[dict]:
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def saved(self, optimizer: str) -> list[int]:
        return checkpoint_steps(self.folder, optimizer)


# ------------------------------------------------------------------ kills and signals


@pytest.fixture(scope="module")
def whole_run(trainer, tmp_path_factory):
    """Two optimizers, from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*LONG, "--optimizer", "sparse_spam", "adam", "--output=run"]
    code, _, errors = trainer.run(*flags, cwd=folder)
    assert (code, errors) == (0, "")
    return folder / "run"


MOMENTS = {
    "before the first checkpoint": lambda watch: (
        watch.rows_since("sparse_spam") and not watch.saved("sparse_spam")
    ),
    "during a save": lambda watch: watch.saving() and watch.saved("sparse_spam"),
    "between checkpoints": lambda watch: (
        not watch.saving() and watch.rows_since("sparse_spam")
    ),
    "in the second optimizer": lambda watch: (
        watch.saved("adam") and watch.rows_since("adam")
    ),
}


def test_killed_and_resumed_run_equals_an_uninterrupted_one(
    whole_run, trainer, tmp_path
):
    folder = tmp_path / "run"
    flags = [*LONG, "--optimizer", "sparse_spam", "adam", "--output=run"]
    for moment in MOMENTS.values():
        watch = Watch(folder)
        process = trainer.start(*flags, cwd=tmp_path)
        kill_at(process, lambda: watch.going() and moment(watch))  # noqa: B023
        flags = RESUME
    code, _, errors = trainer.run(*flags, cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert_same_run(folder, whole_run, "sparse_spam", "adam")
    assert not watch.saving(), "what was half written is removed"


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A folder like a data set of the Hugging Face hub, of JSON lines."""
    pytest.importorskip("datasets")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("stream")
    text = text_files.SHAKESPEARE.read_text(encoding="utf-8")
    for number, name in enumerate(["train-0", "train-1", "validation"]):
        part = text[20_000 * number :][:20_000]
        lines = [json.dumps({"text": act}) + "\n" for act in part.split("\n\n")]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.nightly
def test_streamed_run_is_interrupted_and_goes_on(stream, trainer, tmp_path):
    """SIGTERM and Ctrl-C keep the position in the stream."""
    flags = [*LONG, "--optimizer=adam", f"--data=hf:{stream}", "--tokenizer=bpe:300"]
    code, _, errors = trainer.run(*flags, "--output=whole", cwd=tmp_path)
    assert (code, errors) == (0, "")

    folder = tmp_path / "run"
    flags = [*flags, "--output=run"]
    for number, expected in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        watch = Watch(folder)
        process = trainer.start(*flags, cwd=tmp_path)
        freeze_at(process, lambda: watch.going() and watch.rows_since("adam") > 1)  # noqa: B023
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        code, _, errors = finish(process)
        assert (code, errors) == (expected, CONTINUE + "\n")
        assert watch.rows_since("adam") == 0, "the state is that after the last row"
        assert watch.saved("adam")[-1] < 40
        assert json.loads((folder / "summary.json").read_text()) == {}
        flags = RESUME

    code, _, errors = trainer.run(*flags, cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert_same_run(folder, tmp_path / "whole", "adam")


def test_two_programs_do_not_share_a_folder(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*LONG, "--optimizer=adam", "--output=run"]
    watch = Watch(tmp_path / "run")
    process = trainer.start(*flags, cwd=tmp_path)
    freeze_at(process, watch.going)
    assert refused(capsys, *flags) == (
        "run already holds a run: continue it with --resume, or choose another folder"
        " with --output"
    )
    assert refused(capsys, *RESUME) == (
        "another program is running in run: wait for it, or choose another folder with"
        " --output"
    )
    process.send_signal(signal.SIGCONT)
    assert finish(process).code == 0


# ---------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Lets the runs in this process share what they compile.

    The compiled step belongs to the very objects that it was traced with.
    """

    def cached(make):
        cache = functools.cache(make)

        def lookup(*name, config):
            of_no_concern = {"checkpoint_every": 1, "optimizers": ("adam",)}
            return cache(*name, dataclasses.replace(config, **of_no_concern))

        return lambda *args: lookup(*args[:-1], config=args[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "make", cached(optimizers.make))
        patch.setattr(train_step, "make_faults", cached(train_step.make_faults))
        yield


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A finished run with checkpoints of steps 10 and 12, and faults at the end."""
    folder = tmp_path_factory.mktemp("short") / "run"
    assert pretrain.main([*SHORT, "--optimizer=adam", f"--output={folder}"]) == 0
    assert checkpoint_steps(folder, "adam") == [10, 12]
    return folder


def array_file(checkpoint: pathlib.Path) -> pathlib.Path:
    """The largest file: it has the values."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(checkpoint):
    os.truncate(array_file(checkpoint), 1000)


def delete(checkpoint):
    array_file(checkpoint).unlink()


def flip_a_bit(checkpoint):
    path = array_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def move_the_place_in_the_data(checkpoint):
    path = checkpoint / "rest" / "metadata"
    text = path.read_text()
    changed = re.sub(r"(next_index\D*)12\b", r"\g<1>11", text)
    assert changed != text
    path.write_text(changed)


def remove_metadata(checkpoint):
    (checkpoint / "state" / "_METADATA").unlink()


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = [
    truncate,
    delete,
    flip_a_bit,
    move_the_place_in_the_data,
    remove_metadata,
    empty,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_passed_over(short_run, tmp_path, capsys, damage):
    folder = shutil.copytree(short_run, tmp_path / "run")
    damage(folder / "checkpoints" / "adam" / "12")
    capsys.readouterr()
    assert pretrain.main([*RESUME_SHORT, f"--output={folder}"]) == 0
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "going back from the checkpoint of step 12 to the one before" in errors
    assert len(errors) < 500
    print(errors)
    assert_same_run(folder, short_run, "adam")


def test_run_without_a_good_checkpoint_is_left_as_it_is(short_run, tmp_path, capsys):
    folder = shutil.copytree(short_run, tmp_path / "run")
    for step in (10, 12):
        flip_a_bit(folder / "checkpoints" / "adam" / str(step))
    rows = read_rows(folder)
    for _ in range(2):  # it does not begin from nothing the second time
        line = refused(capsys, "--resume", f"--output={folder}", announced=True)
        assert line.startswith(
            f"no checkpoint in {folder}/checkpoints/adam can be used"
        )
        assert "12: " in line and "10: " in line
        assert read_rows(folder) == rows


def test_run_whose_checkpoints_are_gone_is_left_as_it_is(short_run, tmp_path, capsys):
    folder = shutil.copytree(short_run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    rows = read_rows(folder)
    line = refused(capsys, "--resume", f"--output={folder}", announced=True)
    assert line.startswith(f"there is no checkpoint in {folder}/checkpoints/adam, but")
    assert "12 steps" in line
    assert read_rows(folder) == rows


def test_run_without_a_checkpoint_begins_again_with_a_message(
    short_run, tmp_path, capsys
):
    folder = shutil.copytree(short_run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    sinks.cut(folder / "metrics.jsonl", "adam", 7)
    capsys.readouterr()
    assert pretrain.main([*RESUME_SHORT, f"--output={folder}"]) == 0
    assert capsys.readouterr().err == (
        "pretrain.py: adam: 7 steps are recorded, but there is no checkpoint in"
        f" {folder}/checkpoints/adam yet: beginning again\n"
    )
    assert_same_run(folder, short_run, "adam")


def test_saved_states_are_those_of_their_steps(tmp_path, monkeypatch):
    """Training continues in the same memory while a state is written."""
    settings = {
        "optimizers": ("adam",),
        "preset": "nano",
        "steps": 12,
        "batch_size": 8,
        "sequence_length": 16,
        "checkpoint_every": 2,
        "eval_sequences": 16,
        "keep_checkpoints": 99,
    }
    flags = ["--checkpoint-every=2", "--keep-checkpoints=99", "--optimizer=adam"]
    assert pretrain.main([*SHORT, *flags, f"--output={tmp_path / 'run'}"]) == 0

    config = RunConfig.from_settings(**settings)
    task = make_task(config)
    optimizer = optimizers.make("adam", config)
    states = {}
    with jax.set_mesh(task.mesh):
        state = train_step.initial_state(task, optimizer)
        loop.train(
            state,
            task,
            optimizer,
            iter(task.train),
            record=lambda row: None,
            save=lambda state, place: states.update(
                {int(state.step): jax.tree.map(np.array, state)}
            ),
            stop=lambda step: False,
        )
    assert sorted(states) == [2, 4, 6, 8, 10, 12]
    for step, state in states.items():
        path = tmp_path / "run" / "checkpoints" / "adam" / str(step) / "state"
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(path, state)
        jax.tree.map(np.testing.assert_array_equal, saved, state)


# ------------------------------------------------------------------------ broken data


def write_broken_set(folder):
    """A set of two shards, of which the second is broken; the order is not this."""
    folder.mkdir()
    lines = [json.dumps({"text": f"{n}: To be, or not to be."}) for n in range(90)]
    for name in ("train-0", "validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "train-1.jsonl").write_text('{"text": "cut short')
    return f"--data=hf:{folder}"


@pytest.mark.nightly
@pytest.mark.slow
def test_broken_shard_ends_a_run_that_can_go_on(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(hf_stream, "SHUFFLED", 1)
    flags = [*SHORT, write_broken_set(tmp_path / "set"), "--optimizer", "adam", "spam"]
    flags += ["--no-spikes", "--steps=40", "--eval-every=40", "--eval-sequences=8"]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert pretrain.main([*flags, "--skip-bad-data=1", f"--output={whole}"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Data: files in train: 2, files in validation: 1, ")
    assert "Files whose data was left out in part: 1\n" in captured.out
    assert captured.err.count("\n") == 1 and "leaving out the rest of" in captured.err
    assert {
        values["bad_data_skipped"]
        for values in json.loads((whole / "summary.json").read_text()).values()
    } == {1}

    for again in (
        [*flags, f"--output={folder}"],
        [*RESUME_SHORT, f"--output={folder}"],
    ):
        assert pretrain.main(again) == 1
        line = capsys.readouterr().err
        found = re.fullmatch(
            r"pretrain.py: adam: no batch for step (\d+), step (\d+) is saved: cannot"
            r" read \S+/set/train-1.jsonl, of which 0 rows were read: .*"
            r" \(--skip-bad-data 1 leaves the rest of this file out\). Continue with:"
            r" python \S+ --resume"
            rf" --output {folder}\n",
            line,
        )
        assert found, line
        step = int(found[2])
        assert int(found[1]) == step + 1 < 40
        assert checkpoint_steps(folder, "adam")[-1] == step
        assert len(read_rows(folder)) == step
    go_on = [*RESUME_SHORT, "--skip-bad-data=1", f"--output={folder}"]
    assert pretrain.main(go_on) == 0
    assert_same_run(folder, whole, "adam", "spam")
    capsys.readouterr()


# ------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a few megabytes. Returns its folder and a way to enlarge it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount("size=64k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a disk, and not everywhere")
    yield folder, lambda kilobytes: mount(f"remount,size={kilobytes}k")
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_ends_with_one_line_at_a_checkpoint(
    whole_run, trainer, small_disk, tmp_path
):
    disk, resize = small_disk
    resize(LARGE)
    flags = [*LONG, "--optimizer=adam", "--output=run"]
    flags += [f"--checkpoints={disk / 'checkpoints'}"]
    watch = Watch(disk)
    process = trainer.start(*flags, cwd=tmp_path)
    freeze_at(process, lambda: watch.saved("adam") and not watch.saving())
    resize(shutil.disk_usage(disk).used // 1024 + 150)  # less than a checkpoint takes
    process.send_signal(signal.SIGCONT)
    code, _, errors = finish(process)
    (last,) = checkpoint_steps(disk, "adam")
    assert code == 1
    assert errors == (
        f"pretrain.py: error: cannot write {disk}/checkpoints/adam: No space left on"
        f" device; complete checkpoints: {last}\n"
    )
    resize(LARGE)
    code, _, errors = trainer.run(*RESUME, cwd=tmp_path)
    assert (code, errors) == (0, "")
    (tmp_path / "run" / "checkpoints").symlink_to(disk / "checkpoints")
    assert_same_run(tmp_path / "run", whole_run, "adam")


@pytest.mark.nightly
def test_full_disk_ends_with_one_line_at_a_row(
    whole_run, trainer, small_disk, tmp_path
):
    disk, resize = small_disk
    flags = [*LONG, "--optimizer=adam", "--output=disk/run"]
    elsewhere = f"--checkpoints={tmp_path / 'checkpoints'}"
    code, _, errors = trainer.run(*flags, elsewhere, cwd=tmp_path)
    assert code == 1
    assert errors == (
        "pretrain.py: error: cannot write disk/run: No space left on device\n"
    )
    resize(LARGE)
    code, _, errors = trainer.run("--resume", "--output=disk/run", cwd=tmp_path)
    assert (code, errors) == (0, "")
    (disk / "run" / "checkpoints").symlink_to(tmp_path / "checkpoints")
    assert_same_run(disk / "run", whole_run, "adam")


def test_checkpoints_where_there_can_be_none(tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = [*SHORT, "--optimizer=adam", f"--output={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as exit_:
        pretrain.main([*flags, f"--checkpoints={tmp_path / 'file'}"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == (
        f"pretrain.py: error: cannot write {tmp_path / 'file' / 'adam'}: Not a"
        " directory; complete checkpoints: none\n"
    )


# ------------------------------------------------------------------------- not finite


def steps_of(folder, optimizer):
    """The rows of an optimizer's steps, by step, without timing."""
    rows = without_timing(read_rows(folder))
    return {
        row["step"]: row
        for row in rows
        if row["optimizer"] == optimizer and "loss" in row
    }


def test_halts_before_an_update_that_is_not_finite(tmp_path, capsys):
    folder = tmp_path / "run"
    names = ["--optimizer", "adam", "spam"]
    flags = [*SHORT, "--bursts=1", "--spike-kind=nan"]
    assert pretrain.main([*flags, *names, f"--output={folder}"]) == 1
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"pretrain.py: adam: the update of step 6 is not finite; worst gradient:"
        r" \S+ \(not finite\). The state of step 5 is kept. Try a lower"
        r" --learning-rate, or --guard, or --optimizer clip_spam, or --initialization"
        r" stable --embedding scaled\n",
        line,
    )
    assert checkpoint_steps(folder, "adam") == [5]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["adam"]["halted_at"], summary["spam"]["halted_at"]) == (6, None)
    assert summary["spam"]["final_eval_loss"] < 5.8
    rows = steps_of(folder, "adam")
    assert sorted(rows) == [1, 2, 3, 4, 5, 6]
    assert rows[6]["update_norm"] is None and rows[5]["update_norm"] > 0

    assert pretrain.main([*RESUME_SHORT, f"--output={folder}"]) == 1
    assert capsys.readouterr().err == line
    assert steps_of(folder, "adam") == rows, "the same batch, the same end"


def test_state_kept_is_that_before_the_step(tmp_path, capsys):
    """The state is saved by schedule or because of the halt."""
    flags = [*SHORT, "--bursts=1", "--spike-kind=nan", "--optimizer=adam"]
    kept = {}
    for every in (1, 4):
        folder = tmp_path / f"every-{every}"
        often = f"--checkpoint-every={every}"
        assert pretrain.main([*flags, often, f"--output={folder}"]) == 1
        kept[every] = saved_arrays(folder, "adam")
        assert checkpoint_steps(folder, "adam")[-1] == 5
    assert kept[1].pop("['halted']") != kept[4].pop("['halted']")
    assert_same_arrays(kept[1], kept[4])
    assert all(np.isfinite(array).all() for array in kept[4].values())
    capsys.readouterr()


def test_halts_at_a_loss_that_is_not_finite(tmp_path, capsys):
    flags = [*SHORT, "--no-spikes", "--optimizer=adam", "--learning-rate=1e14"]
    assert pretrain.main([*flags, f"--output={tmp_path / 'run'}"]) == 1
    errors = capsys.readouterr().err
    found = re.match(r"pretrain.py: adam: the loss of step (\d+) is not finite", errors)
    assert found and errors.count("\n") == 1
    step = int(found[1])
    assert checkpoint_steps(tmp_path / "run", "adam")[-1] == step - 1
    rows = steps_of(tmp_path / "run", "adam")
    assert max(rows) == step
    assert rows[step]["loss"] is None and rows[step - 1]["loss"] is not None
