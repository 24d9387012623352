"""The engine of the studies, tested with a toy study."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import toy_study
from studies import engine
from toy_study import Toy
from trainer.errors import UsageError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_runs_of_one_program_are_compiled_once(tmp_path):
    study = Toy()
    assert engine.run_all(study, [1, -1, 2, -2, 1], tmp_path) == []
    assert study.compiled == [1, -1] and study.trained == [1, 2, -1, -2]
    assert engine.read_all(study, [2, -2, 5], tmp_path) == [4, 4, None]
    record = json.loads((tmp_path / "rate_2.json").read_text())
    assert record["settings"] == {"rate": 2} and record["digest"] == "data"


def test_a_changed_grid_runs_what_is_new_and_keeps_the_rest(tmp_path, capsys):
    engine.run_all(Toy(), [1, 2, 3], tmp_path)
    study = Toy()
    capsys.readouterr()
    assert engine.run_all(study, [2, 3, 4], tmp_path) == []
    assert study.trained == [4]
    assert capsys.readouterr().out == "3 of 3: rate_4\n"
    assert engine.read_all(study, [1, 2, 3, 4], tmp_path) == [1, 4, 9, 16]


def test_a_record_of_other_settings_or_data_is_made_again(tmp_path):
    engine.run_all(Toy(), [1, 2, 3], tmp_path)
    path = tmp_path / "rate_1.json"
    path.write_text(path.read_text().replace('"rate": 1', '"rate": 7'))
    path = tmp_path / "rate_2.json"  # a setting that does not exist any more
    path.write_text(path.read_text().replace('"rate": 2', '"rate": 2, "old": 1'))
    study = Toy()
    engine.run_all(study, [1, 2, 3], tmp_path)
    assert study.trained == [1]
    study = Toy(data="other data", bad={2: ValueError()})
    engine.run_all(study, [1, 2], tmp_path)
    assert study.trained == [1, 2]
    assert engine.read_all(study, [1, 2], tmp_path) == [1, None]
    assert engine.read_all(Toy(), [1, 2], tmp_path) == [None, 4]  # the old one is kept


@pytest.mark.parametrize(
    "content",
    [
        b'{"settings": {"ra',
        b"\0\0\0",
        b"[]",
        b"{}",
        b'{"settings": {"rate": 1}}',
        b"[" * 100_000,
    ],
    ids=["cut short", "never written", "a list", "no settings", "no results", "deep"],
)
def test_a_damaged_record_is_a_mistake(content, tmp_path):
    (tmp_path / "rate_1.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"rate_1\.json is damaged: remove it"):
        engine.run_all(Toy(), [1], tmp_path)


def test_a_run_that_fails_does_not_end_the_others(tmp_path):
    study = Toy(bad={2: ValueError("too\nlarge"), -1: KeyError("x")})
    failures = engine.run_all(study, [1, 2, 3, -1, -2], tmp_path)
    assert [failure.name for failure in failures] == ["rate_2", "rate_-1"]
    assert failures[0].message.startswith("ValueError: too\nlarge (see ")
    assert engine.read_all(study, [1, 2, 3, -2], tmp_path) == [1, None, 9, 4]
    assert "Traceback" in (tmp_path / "rate_2.error.txt").read_text()
    again = Toy()  # the next call tries them again
    assert engine.run_all(again, [1, 2, 3, -1, -2], tmp_path) == []
    assert again.trained == [2, -1]
    assert names(tmp_path) == [f"rate_{x}.json" for x in (-1, -2, 1, 2, 3)]


def test_a_mistake_of_the_user_ends_the_study(tmp_path):
    with pytest.raises(UsageError):
        engine.run_all(Toy(bad={2: UsageError("no such file")}), [1, 2, 3], tmp_path)
    assert names(tmp_path) == ["rate_1.json"]


def test_runs_are_divided_among_the_workers():
    assert engine.shared_out([[1, 2, 3], [4]], 2) == [[1, 2, 3], [4]]
    assert engine.shared_out([[1, 2, 3, 4, 5], [6]], 3) == [[1, 2], [3, 4], [5], [6]]
    assert engine.shared_out([], 2) == []


def test_arrays_become_json():
    values = np.array([[1.23456789, np.nan], [np.inf, 2]], np.float32)
    assert engine.to_json(values, 3) == [[1.23, None], [None, 2.0]]
    assert engine.to_json(np.float32(0.1)) == float(np.float32(0.1))
    assert engine.to_json(np.array([1, 2])) == [1, 2]


# -------------------------------------------------------------------------- exit codes


class Parser(toy_study.argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("no text"), 2, "toy: error: no text"),
        (OSError(20, "Not a directory", "a/b"), 1, "toy: error: a/b: Not a directory"),
        (engine.BrokenProcessPool(), 1, "with fewer --workers"),
        (KeyboardInterrupt(), 130, "repeat the command to continue"),
    ],
)
def test_an_error_takes_one_line(error, code, message, capsys):
    def work():
        raise error

    try:
        found = engine.exit_code(Parser(prog="toy"), work)
    except SystemExit as stopped:
        found = stopped.code
    text = capsys.readouterr().err
    assert found == code and message in text and text.count("\n") == 1


def test_failed_runs_take_one_line_each(capsys):
    failures = [engine.Failure("a", "ValueError: too\nlarge"), engine.Failure("b", "x")]
    assert engine.exit_code(Parser(prog="toy"), lambda: failures) == 1
    text = "toy: error: a: ValueError: too large\ntoy: error: b: x\n"
    assert capsys.readouterr().err == text
    assert engine.exit_code(Parser(prog="toy"), lambda: []) == 0


# --------------------------------------------------------------------------- processes


def start(folder, *arguments):
    paths = [pathlib.Path(toy_study.__file__).parent, pathlib.Path(engine.__file__)]
    paths = [paths[0], paths[1].parents[1], paths[1].parents[2]]
    return subprocess.Popen(
        [sys.executable, toy_study.__file__, str(folder), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_record(folder):
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(pid):
    """Returns the processes that train; the resource tracker is a child as well."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    command = {child: pathlib.Path(f"/proc/{child}/cmdline") for child in children}
    return [child for child in children if "spawn_main" in command[child].read_text()]


def is_running(pid):
    """Returns whether a process exists that has not ended."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_study_that_is_killed_in_the_middle_continues(kill, workers, tmp_path):
    """The records that were finished are kept; no process stays behind."""
    with start(tmp_path, 50, workers, 0.2) as process:
        wait_for_record(tmp_path)
        children = workers_of(process.pid)
        assert len(children) == (2 if workers == 2 else 0)
        process.send_signal(kill)
        deadline = time.monotonic() + 60
        error = process.communicate(timeout=60)[1]
    if kill != signal.SIGKILL:
        assert process.returncode == 130
        assert error.strip().endswith("repeat the command to continue")
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 0 < len(kept) < 50
    assert toy_study.main([tmp_path, 50, 1, 0]) == 0
    assert len(list(tmp_path.iterdir())) == 50
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_program(tmp_path):
    """The system kills a worker if memory runs out."""
    with start(tmp_path, 50, 2, 0.2) as process:
        wait_for_record(tmp_path)
        os.kill(int(workers_of(process.pid)[0]), signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "fewer --workers" in error and error.count("\n") == 1


@pytest.mark.slow
def test_failures_in_other_processes_are_returned(tmp_path, capsys):
    study = Toy(bad={2: ValueError("too large")})
    (failure,) = engine.run_all(study, [1, 2, 3, -1], tmp_path, workers=2)
    assert failure.name == "rate_2" and "too large" in failure.message
    assert sorted(x.split(": ")[1] for x in capsys.readouterr().out.splitlines()) == [
        "rate_-1",
        "rate_1",
        "rate_3",
    ]
    assert engine.read_all(study, [1, 2, 3, -1], tmp_path) == [1, None, 9, 1]
    processes = {json.loads(x.read_text())["process"] for x in tmp_path.glob("*.json")}
    assert os.getpid() not in processes
    with pytest.raises(UsageError, match="no such file"):
        bad = {5: UsageError("no such file")}
        engine.run_all(Toy(bad=bad), [5, -5], tmp_path, workers=2)
