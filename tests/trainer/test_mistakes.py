"""Mistakes of the user: each is reported in one line, and changes no file."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import pretrain
from trainer import run_folder
from trainer.config import RunConfig
from trainer.output import sinks
from trainer.run_folder import Run
from trainer_in_process import refused
from trainer_process import without_timing


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data=nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--data=empty"], ["empty"]),
        (["--data=hf:"], ["hf: must name a data set"]),
        ([f"--data={'x' * 300}"], ["data file xxx", "name too long"]),
        ([f"--tokenizer={'x' * 300}"], ["cannot load the tokenizer xxx"]),
        (["--checkpoints="], ["--checkpoints", "name of a folder"]),
        (["--output=\udcff"], ["udcff", "must be UTF-8"]),
        (["--data=empty.txt"], ["empty.txt", "is empty"]),
        (["--data=short.txt"], ["train", "90 bytes", "101"]),
        (["--data=medium.txt"], ["validation", "50 bytes", "101"]),
        (["--output=file.txt/run"], ["output folder", "file.txt"]),
        (["--output=file.txt"], ["--output", "must be a folder", "file.txt"]),
        ([f"--output={'x' * 300}"], ["output folder", "name too long"]),
        (["--preset=huge"], ["--preset", "huge", "tiny"]),
        (["--data=*.md"], ["*.md"]),
        (["--data=hf:no/such-data"], ["no/such-data"]),
        (["--tokenizer=nobody/nothing"], ["nobody/nothing"]),
        (["--accumulate=5"], ["--accumulate", "--batch-size", "12"]),
        (["--embedding=odd"], ["--embedding", "odd", "scaled"]),
        (["--width=50"], ["width", "twice the heads", "6, not 50"]),
        (["--layers=0"], ["--layers", ">= 1"]),
        (["--remat=some"], ["--remat", "some", "full"]),
        (["--density=0", "--optimizer=sparse_spam"], ["--density", "> 0"]),
        (["--density=1.5"], ["--density", "<= 1"]),
        (["--z-loss=-1"], ["--z-loss", ">= 0"]),
        (["--fsdp=0"], ["--fsdp", ">= 1"]),
        (["--fsdp=64"], ["1 x 64 x 1", "64 devices"]),
        (["--tensor=9"], ["9 devices"]),
        (["--data-parallel=5"], ["5 x 1 x 1", "12 sequences"]),
        (["--coordinator=localhost:1"], ["--num-processes", "together"]),
        (["--distributed"], ["--output"]),
        (
            [
                *("--coordinator=localhost:1", "--num-processes=2", "--process-id=2"),
                "--output=x",
            ],
            ["--process-id", "below", "2"],
        ),
        (["--compile-only"], ["--target", "tpu:v5e:4x4"]),
        (["--compile-only", "--target=cpu:1"], ["tpu:v5e:4x4", "cpu:1"]),
        (["--compile-only", "--target=tpu:v5e:0x2"], ["tpu:v5e:0x2", ">= 1"]),
        (["--target=tpu:v5e:4x4"], ["--target", "--compile-only"]),
        (
            ["--compile-only", "--target=tpu:v5e:4x4", "--accumulate=5"],
            ["--accumulate", "--batch-size", "12"],
        ),
        (["--output="], ["--output", "the name of a folder"]),
        (["--wandb=project"], ["--wandb", "pip install wandb"]),
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
        (["--spike-factor=1e40"], ["--spike-factor", "which is inf in float32"]),
        (["--z-loss=1e40"], ["--z-loss", ">= 0", "which is inf in float32"]),
        (["--weight-decay=-1e-40"], ["--weight-decay", ">= 0"]),
        (["--clip-norm=1e-50"], ["--clip-norm", "> 0", "which is 0 in float32"]),
        (["--spike-kind=odd"], ["--spike-kind", "noise"]),
        (["--threshold=0"], ["--threshold", "> 0"]),
        (["--reset-interval=1"], ["--reset-interval", ">= 2"]),
        (["--eval-every=0"], ["--eval-every", ">= 1"]),
        (["--checkpoint-every=0"], ["--checkpoint-every", ">= 1"]),
        (["--no-such-flag"], ["unrecognized", "--no-such-flag"]),
        (["--resume"], ["--resume needs --output"]),
        (["--resume", "--output=nowhere"], ["no run to resume", "nowhere"]),
        (["--resume", "--output=damaged"], ["damaged", "config.json"]),
        (["--resume", "--output=deep"], ["damaged", "config.json", "recursion"]),
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
    pathlib.Path("empty").mkdir()
    pathlib.Path("damaged/config.json").write_text("{")
    pathlib.Path("deep").mkdir()
    pathlib.Path("deep/config.json").write_text("[" * 100_000)
    line = refused(capsys, "--sequence-length=100", *flags)
    for word in words:
        assert word in line
    assert not pathlib.Path("runs").exists()


@pytest.mark.one_python
def test_mistake_in_a_process_of_its_own(trainer, tmp_path):
    code, output, errors = trainer.run("--data=nowhere.txt", cwd=tmp_path)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors and "usage" not in errors


PRINTS = """
import sys
sys.path.insert(0, "examples")
from trainer import cli

def main():
    print("\\u00fc" * {length})
    {rest}
    return 3

cli.exit_with(main)
"""


@pytest.mark.one_python
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_reader_that_has_gone_ends_a_program_quietly(length):
    """The output fits the buffer, and is written at the end, or it does not."""
    reader, writer = os.pipe()
    os.close(reader)
    code = PRINTS.format(length=length, rest="")
    done = run_python(code, stdout=writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.one_python
def test_another_closed_pipe_is_an_error():
    done = run_python(PRINTS.format(length=1, rest="raise BrokenPipeError('socket')"))
    assert done.returncode == 1 and "BrokenPipeError: socket" in done.stderr
    assert done.stdout == "\\xfc\n"  # which ASCII lacks


def run_python(code, stdout=subprocess.PIPE):
    """Runs a program, whose output is buffered and in ASCII."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parents[2],
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.one_python
def test_run_is_not_overwritten(finished_run, capsys):
    folder, _, _ = finished_run
    before = (folder / "config.json").read_text()
    line = refused(capsys, f"--output={folder}")
    assert "--resume" in line and "another folder" in line
    assert (folder / "config.json").read_text() == before


@pytest.mark.one_python
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
    config = RunConfig.from_settings(data=str(book))
    folder.create(Run(config, None, 1, "another digest"))
    book.write_text("that is the question. " * 100)
    assert "has changed" in refused(capsys, "--resume", f"--output={folder.path}")


def damage(path, how):
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "a line of garbage": [*lines[:3], b"\xff{\n", *lines[4:]],
        "a row without a step": [*lines[:3], b'{"loss": 1.0}\n', *lines[4:]],
        "a step in words": [
            *lines[:3],
            b'{"optimizer": "adam", "step": "four"}\n',
            *lines[4:],
        ],
        "the last evaluation cut": [*lines[:-1], lines[-1][:-20]],
        "too deep": [*lines[:3], b"[" * 100_000 + b"\n", *lines[4:]],
        "a step missing": [*lines[:4], *lines[5:]],
        "no file": None,
    }[how]
    path.unlink()
    if damaged is not None:
        path.write_bytes(b"".join(damaged))


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("a line of garbage", ["metrics.jsonl, line 4, is damaged"]),
        ("a row without a step", ["metrics.jsonl, line 4, is damaged"]),
        ("a step in words", ["metrics.jsonl, line 4, is damaged"]),
        ("too deep", ["metrics.jsonl, line 4, is damaged"]),
        ("a step missing", ["4 steps", "of adam", "another folder"]),
        ("no file", ["0 steps", "of adam", "another folder"]),
    ],
)
def test_resume_refuses_damaged_metrics(finished_run, tmp_path, capsys, how, words):
    """A run whose records are gone must not report an interruption each time."""
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    damage(folder / "metrics.jsonl", how)
    line = refused(capsys, "--resume", f"--output={folder}", announced=True)
    for word in words:
        assert word in line


@pytest.mark.one_python
def test_resume_without_its_checkpoints_keeps_the_records(
    finished_run, tmp_path, capsys
):
    """A mistyped --checkpoints must not begin the run again, over its metrics."""
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    before = (folder / "metrics.jsonl").read_bytes()
    flags = "--resume", f"--output={folder}", f"--checkpoints={tmp_path / 'nowhere'}"
    line = refused(capsys, *flags, announced=True)
    for words in ("nowhere/adam", "60 steps of adam", "--checkpoints", "--output"):
        assert words in line
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.one_python
def test_resume_goes_back_to_the_records_it_has(finished_run, tmp_path, capsys):
    """The records may be older than the checkpoints, for example after a power cut."""
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    damage(folder / "metrics.jsonl", "the last evaluation cut")
    assert pretrain.main(["--resume", f"--output={folder}", "--data-parallel=1"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "59 steps of spam" in line and "step 60" in line
    whole = sinks.read(finished_run[0] / "metrics.jsonl")
    assert without_timing(sinks.read(folder / "metrics.jsonl")) == without_timing(whole)


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "six"),
        ("preset", "giant"),
        ("seed", True),
        ("seed", 2**40),
        ("untied_head", 1),
        ("batch_size", 0),
        ("eval_every", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", 10**400),
        ("density", 7.0),
        ("data", 5),
        ("data", "a\0b"),
        ("preset", []),
        ("optimizers", []),
        ("optimizers", "adam"),
        ("checkpoints", 3),
        ("data_digest", None),
        ("hosts", 0),
        ("momentum", 0.9),
    ],
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
