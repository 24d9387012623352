"""The processes of a run: one on every host, or a single one.

All run the same program. Host 0 alone reads and writes the folder of the run, except
for checkpoints, to which every host writes its part.
"""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from trainer.config import UsageError

T = TypeVar("T")

NAMES = "surrogateescape"  # for names of files that are not UTF-8
LEAVING = 60  # seconds that a host which fails waits for the others, and ends them


class Cluster(NamedTuple):
    """How this process finds the others."""

    automatic: bool = False  # JAX asks Cloud TPU, Slurm or Open MPI
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
            shutdown_timeout_seconds=LEAVING,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the other processes: {error}") from error


def is_main() -> bool:
    return jax.process_index() == 0


def say(message: str) -> None:
    """Prints one line about this host to the standard error stream."""
    host = f"host {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"pretrain.py: {host}{message}", file=sys.stderr, flush=True)


def from_main(make: Callable[[], str]) -> str:
    """What `make` returns on host 0, on every host; so is its UsageError."""
    if jax.process_count() == 1:
        return make()
    failed, text = False, ""
    if is_main():
        try:
            text = make()
        except UsageError as error:
            failed, text = True, str(error)
    content = text.encode("utf-8", NAMES)
    header = np.array([failed, len(content)], np.int32)
    failed, length = multihost_utils.broadcast_one_to_all(header)
    padded = np.zeros(length, np.uint8)
    if is_main():
        padded[:] = np.frombuffer(content, np.uint8)
    text = multihost_utils.broadcast_one_to_all(padded).tobytes().decode("utf-8", NAMES)
    if failed:
        raise UsageError(text)
    return text


def gather(text: str) -> list[str]:
    """The texts of all hosts, on every host."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode("utf-8", NAMES), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(content)])).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    pairs = zip(rows, lengths, strict=True)
    return [row[:length].tobytes().decode("utf-8", NAMES) for row, length in pairs]


def any_of(text: str) -> str:
    """The first text of any host that is not empty, if there is one."""
    return next(filter(None, gather(text)), "")


def everywhere(make: Callable[[], T]) -> T:
    """What `make` returns here; its UsageError on any host is raised on all."""
    made, message = None, ""
    try:
        made = make()
    except UsageError as error:
        message = str(error)
    if message := any_of(message):
        raise UsageError(message)
    return made


def wait_for_all(name: str) -> None:
    """Goes on when every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class StopRequest:
    """Whether somebody asked the run to stop, and who.

    Ctrl-C, and SIGTERM, with which clusters announce a preemption, let the step end and
    the state be saved; pressed again, Ctrl-C ends the program at once.
    """

    def __init__(self):
        self.signal: int | None = None
        self._asked = 0  # times; unlike a step, never begins again

    def seen(self, step: int) -> bool:
        """Whether to stop after `step`; with several hosts, the same on all of them."""
        del step
        self._asked += 1
        if jax.process_count() == 1 or self.signal is not None:
            return self.signal is not None
        # JAX itself listens for SIGTERM, and finds a number that all will reach.
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals inside a with statement."""
        # One host alone cannot stop for Ctrl-C: there it ends the program as usual.
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
