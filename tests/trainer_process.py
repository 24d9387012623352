"""The example trainer in processes of its own, and the files that it writes."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
PROGRAM = EXAMPLES / "pretrain.py"
CONTINUE = f"Interrupted. Continue with: python {PROGRAM} --resume --output run"
TIMEOUT = 900  # seconds after which a program counts as hung
TIMING = ("tokens_per_second", "flops_utilization")  # differ from run to run


class Finished(NamedTuple):
    """The exit status and the output of a program."""

    code: int
    output: str
    errors: str


class Trainer:
    """Starts examples/pretrain.py; leave it with a with statement.

    All processes share a compilation cache, which saves each of them many seconds, and
    compile with few optimizations, which takes a third of the time.
    """

    def __init__(self, cache: pathlib.Path):
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JAX_", "XLA_")) and "proxy" not in name.lower()
        }
        path = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            **kept,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XDG_CACHE_HOME": str(cache / "user"),
            "PYTHONPATH": os.pathsep.join(path),
        }
        self._started = []

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def start(self, *flags, cwd: pathlib.Path, devices: int = 1) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, PROGRAM, *flags],
            cwd=cwd,
            env={**self._environment, "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def run(self, *flags, cwd: pathlib.Path, devices: int = 1) -> Finished:
        return finish(self.start(*flags, cwd=cwd, devices=devices))

    def start_hosts(
        self, count: int, *flags, cwd: pathlib.Path | list[pathlib.Path]
    ) -> list[subprocess.Popen]:
        """Starts a process for each of `count` hosts, with one device each."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        together = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
        folders = cwd if isinstance(cwd, list) else [cwd] * count
        return [
            self.start(*flags, *together, f"--process-id={number}", cwd=folder)
            for number, folder in enumerate(folders)
        ]


def finish(process: subprocess.Popen, timeout: float = TIMEOUT) -> Finished:
    """Waits for the end of a program, for so many seconds."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"the program hangs:\n{output}\n{errors}") from None
    return Finished(process.returncode, output, errors)


def finish_all(processes: list[subprocess.Popen]) -> list[Finished]:
    """Waits for the end of hosts that work together."""
    deadline = time.monotonic() + TIMEOUT
    return [finish(process, deadline - time.monotonic()) for process in processes]


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Waits until something has happened while the program runs."""
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.001)


def wait_for_rows(process: subprocess.Popen, metrics: pathlib.Path, count: int) -> None:
    """Waits until the running program has written `count` rows."""
    wait_for(process, lambda: count_lines(metrics) >= count)


def freeze_at(process: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """Stops a program while `moment` holds, and leaves it standing there."""
    while True:
        wait_for(process, moment)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if moment():
            return
        process.send_signal(signal.SIGCONT)


def kill_at(process: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """Kills a program with SIGKILL while `moment` holds."""
    freeze_at(process, moment)
    process.kill()
    assert finish(process).code == -signal.SIGKILL


def count_lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_rows(folder: pathlib.Path) -> list[dict]:
    """The rows of a run, without the program's own reader."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_timing(rows: Iterable[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def checkpoint_steps(folder: pathlib.Path, optimizer: str) -> list[int]:
    """The steps of an optimizer's complete checkpoints, in order."""
    names = (path.name for path in (folder / "checkpoints" / optimizer).glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def saved_arrays(
    folder: pathlib.Path, optimizer: str, step: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, the newest one if no `step` is given, by name.

    They are read without knowing the program's structures.
    """
    if step is None:
        step = checkpoint_steps(folder, optimizer)[-1]
    path = (folder / "checkpoints" / optimizer / str(step) / "state").resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        arguments = jax.tree.map(lambda _: as_numpy, tree)
        tree = checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(restore_args=arguments)
        )
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]):
    """The same names, shapes, dtypes and bits."""
    assert one.keys() == other.keys()
    assert len(one) > 10
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.shape == other[name].shape, name
        assert array.tobytes() == other[name].tobytes(), name


def assert_same_run(folder: pathlib.Path, whole: pathlib.Path, *optimizers: str):
    """The same rows, summary and last states of these optimizers, bit for bit."""
    rows, expected = (
        [
            row
            for row in without_timing(read_rows(path))
            if row["optimizer"] in optimizers
        ]
        for path in (folder, whole)
    )
    assert rows == expected
    summary, expected = (
        json.loads((path / "summary.json").read_text()) for path in (folder, whole)
    )
    for name in optimizers:
        (one,), (other,) = (without_timing([s[name]]) for s in (summary, expected))
        assert one == other
        assert_same_arrays(saved_arrays(folder, name), saved_arrays(whole, name))
