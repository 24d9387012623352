"""The processes of a run: one on every host, or a single one.

All processes run the same program. Host 0 alone reads and writes the folder of the run,
except for checkpoints, of which every host writes its part.
"""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from trainer.errors import UsageError

T = TypeVar("T")

SHUTDOWN_TIMEOUT = 60  # seconds that a failing host waits for the others to exit


class Cluster(NamedTuple):
    """How this process finds the others."""

    automatic: bool = False  # JAX finds them through Cloud TPU, Slurm or Open MPI
    coordinator: str | None = None  # address of process 0, host:port
    num_processes: int | None = None
    process_id: int | None = None

    @property
    def given(self) -> bool:
        return self.automatic or self.coordinator is not None


def connect(cluster: Cluster) -> None:
    """Joins the other processes; must come before anything else that JAX does."""
    if not cluster.given:
        return
    address = cluster.coordinator
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise UsageError(f"--coordinator must be HOST:PORT, not {address!r}")
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the other processes: {error}") from error


def is_main() -> bool:
    return jax.process_index() == 0


def log(message: str) -> None:
    """Prints one line about this host to the standard error stream."""
    host = f"host {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"pretrain.py: {host}{message}", file=sys.stderr, flush=True)


def broadcast(make: Callable[[], Any]) -> Any:
    """Calls `make` on host 0; returns its JSON value, or raises its UsageError, on all.

    Host 0 alone takes the time. With a single host the value is passed on as it is.
    """
    if jax.process_count() == 1:
        return make()
    value, message = None, ""
    if is_main():
        try:
            value = make()
        except UsageError as error:
            message = str(error)
    content = to_bytes([value, message])
    length = multihost_utils.broadcast_one_to_all(np.int32(len(content)))
    if not is_main():
        content = np.zeros(length, np.uint8)
    value, message = from_bytes(multihost_utils.broadcast_one_to_all(content))
    if message:
        raise UsageError(message)
    return value


def gather(value: Any) -> list[Any]:
    """Returns the JSON values of all hosts, on every host."""
    if jax.process_count() == 1:
        return [value]
    content = to_bytes(value)
    lengths = multihost_utils.process_allgather(np.array([len(content)])).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [from_bytes(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def to_bytes(value: Any) -> np.ndarray:
    """Encodes a JSON value in ASCII, names of files that are not UTF-8 included."""
    return np.frombuffer(json.dumps(value).encode("ascii"), np.uint8)


def from_bytes(content: np.ndarray) -> Any:
    """Decodes what `to_bytes` encoded."""
    return json.loads(content.tobytes())


def first_nonempty(text: str) -> str:
    """Returns the first text of any host that is not empty, or an empty one."""
    return next(filter(None, gather(text)), "")


def on_all_hosts(make: Callable[[], T]) -> T:
    """Returns what `make` returns here; raises the UsageError of any host on all."""
    made, message = None, ""
    try:
        made = make()
    except UsageError as error:
        message = str(error)
    if message := first_nonempty(message):
        raise UsageError(message)
    return made


def wait_for_all(name: str) -> None:
    """Returns when every host has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class StopRequest:
    """Records whether a signal requested the run to stop.

    After Ctrl-C or SIGTERM, which clusters send before a preemption, the running step
    is finished and the state is saved. A second Ctrl-C ends the program at once.
    """

    def __init__(self):
        self.signal: int | None = None
        self._calls = 0  # unlike the step, this never goes back

    def seen(self, step: int) -> bool:
        """Returns whether to stop after `step`, the same answer on all hosts."""
        del step
        self._calls += 1
        if jax.process_count() == 1 or self.signal is not None:
            return self.signal is not None
        # JAX handles SIGTERM itself, and chooses a call that all hosts will reach.
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals inside a with statement."""
        # One of several hosts cannot stop alone: there Ctrl-C ends the program.
        alone = jax.process_count() == 1
        signals = (signal.SIGINT, signal.SIGTERM) if alone else ()

        def handler(number, frame):
            self.signal = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        previous = {number: signal.signal(number, handler) for number in signals}
        try:
            yield self
        finally:
            for number, old in previous.items():
                signal.signal(number, old)
