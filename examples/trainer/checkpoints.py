"""Orbax checkpoints of one optimizer's run: its state and its place in the data."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from trainer import hosts
from trainer.errors import UsageError
from trainer.train_step import TrainState

DataPosition = dict[str, Any]  # state of the data's iterator, a JSON object

# Errors raised by reads and writes that Orbax cancelled after another one failed.
LATE_ERRORS = "Event loop is closed", "Encountered error while reading array index"

# Orbax logs what it raises, and asyncio the errors of reads that Orbax cancelled.
for logger in ("absl", "asyncio"):
    logging.getLogger(logger).setLevel(logging.CRITICAL)


@functools.cache
def hide_late_errors() -> None:
    """Hides the errors of reads and writes that Orbax cancelled."""
    usual = sys.unraisablehook

    def hook(unraisable):
        if not str(unraisable.exc_value).startswith(LATE_ERRORS):
            usual(unraisable)

    sys.unraisablehook = hook


class CheckpointManager(ocp.CheckpointManager):
    """Orbax's manager, which leaves the decision to stop to `hosts.StopRequest`.

    It would report the step that it saves to JAX, at any time and from any thread. JAX
    would take it for the current step of this host, and could make the hosts stop at a
    step that is already over.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The newest checkpoints in a folder, or in a bucket (``gs://...``).

    They are written in the background: `save` copies the state and returns, and leaving
    the with statement waits. A checkpoint becomes visible when it is complete. Each has
    a digest of its contents, by which a damaged one is recognized.
    """

    def __init__(self, folder: str, keep: int):
        hide_late_errors()
        self.folder = epath.Path(folder)
        if "://" not in folder:
            self.folder = self.folder.resolve()  # Orbax insists on it
        with self._failing_clearly():
            self._manager = CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, cleanup_tmp_directories=True
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "rest": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *exception) -> None:
        # After an error, closing may raise the same error again.
        with contextlib.suppress(Exception) if kind else self._failing_clearly():
            self._manager.close()

    def latest_step(self) -> int:
        """Returns the step of the newest checkpoint, good or not, or 0."""
        return self._manager.latest_step() or 0

    def newest_before(self, step: int) -> int | None:
        """Returns the step of the newest checkpoint before `step`.

        It is 0, the beginning, if there is no checkpoint, and None if all are later.
        """
        with self._failing_clearly():
            self._manager.wait_until_finished()
        steps = self._manager.all_steps() or [0]
        return max((saved for saved in steps if saved < step), default=None)

    def save(self, state: TrainState, place: DataPosition) -> None:
        """Begins to write a checkpoint; waits for the one before to be complete.

        Raises:
          OSError: If either cannot be written.
        """
        step = int(state.step)
        if step in (0, self.latest_step()):
            return
        places = hosts.gather(json.dumps(place))
        rest = {"data": places, "digest": digest(state, places)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), rest=ocp.args.JsonSave(rest)
        )
        with self._failing_clearly():
            self._manager.save(step, args=items)

    def restore(
        self, like: TrainState, recorded: int, warn: Callable[[str], None]
    ) -> tuple[TrainState, DataPosition] | None:
        """Restores the newest good checkpoint.

        Args:
          like: Shapes, dtypes and shardings; the mesh may differ from the one saved on.
          recorded: Steps that metrics.jsonl has; newer checkpoints are passed over.
          warn: Called with a message about those and about damaged ones, which are
            renamed.

        Returns:
          The state and this host's place in the data; None if there is no checkpoint.

        Raises:
          UsageError: If none is good, or the place in the data does not fit. Then all
            is left as it is.
        """
        passed_over = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step > recorded:
                name = self.folder.name
                passed_over[step] = f"metrics.jsonl has {recorded} steps of {name}"
                continue
            state, places, problem = self._read(step, like)
            if not problem:
                place = json.loads(place_of_host(places))
                for newer, why in passed_over.items():
                    warn(
                        f"going back from the checkpoint of step {newer} to the one"
                        f" before, in {self.folder}: {why}"
                    )
                    self._set_aside(newer)
                return state, place
            passed_over[step] = f"damaged ({problem})"
        if passed_over:
            reasons = "; ".join(f"{step}: {why}" for step, why in passed_over.items())
            raise UsageError(
                f"no checkpoint in {self.folder} can be used ({reasons}): start again"
                " in another folder"
            )
        return None

    def _read(self, step: int, like: TrainState):
        """Reads state and places in the data of one checkpoint, and finds problems.

        Orbax's manager would wait forever for a host that cannot read.
        """
        folder = self.folder / str(step)
        restore_state = ocp.args.StandardRestore(like)
        state, places, expected, problem = None, [], "", ""
        try:
            state = ocp.StandardCheckpointHandler().restore(
                folder / "state", args=restore_state
            )
            rest = ocp.JsonCheckpointHandler().restore(folder / "rest")
            places, expected = rest["data"], rest["digest"]
        except Exception as error:  # Orbax raises many kinds for a damaged file
            problem = reason(error)
        problem = hosts.first_nonempty(problem)
        # The digest needs the arrays of all hosts.
        if not problem and digest(state, places) != expected:
            problem = "it is not what was saved"
        return state, places, problem

    def _set_aside(self, step: int) -> None:
        """Renames a checkpoint, so that its step can be saved again."""
        if hosts.is_main():
            aside = self.folder.parent / f"{self.folder.name}-set-aside-{step}"
            if aside.exists():
                aside.rmtree()
            (self.folder / str(step)).rename(aside)
        hosts.wait_for_all(f"set aside {step}")
        self._manager.reload()

    @contextlib.contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        """Turns any error in writing into an OSError with the complete checkpoints."""
        try:
            yield
        except Exception as error:  # Orbax raises many kinds for a full disk
            message = f"{reason(error)}; complete checkpoints: {self._complete()}"
            raise OSError(errno.EIO, message, str(self.folder)) from error

    def _complete(self) -> str:
        """Lists the steps whose checkpoints are complete, for a message."""
        try:
            steps = sorted(ocp.utils.checkpoint_steps(self.folder))
        except Exception:  # the folder itself cannot be reached
            steps = []
        return ", ".join(map(str, steps)) or "none"


def digest(state: TrainState, places: list[str]) -> str:
    """Returns a digest of the state and of the places in the data."""
    content = json.dumps([int(fingerprint(state)), places])
    return hashlib.sha256(content.encode()).hexdigest()


@jax.jit
def fingerprint(state: TrainState) -> jax.Array:
    """Returns a sum over the bits of all arrays, which is the same on any mesh."""
    total = jnp.zeros([], jnp.uint32)
    for place, leaf in enumerate(jax.tree.leaves(state)):
        bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        unsigned = jnp.dtype(f"uint{8 * bits.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(bits, unsigned).astype(jnp.uint32)
        total = total * 31 + bits.sum(dtype=jnp.uint32) + place
    return total


def place_of_host(places: list[str]) -> str:
    """Returns this host's place in the data.

    Text files have one place for all hosts, whose number may change. In a stream each
    host has read other documents.
    """
    count = jax.process_count()
    if len(places) == count:
        return places[jax.process_index()]
    if len(set(places)) == 1:
        return places[0]
    raise UsageError(
        f"the run was streaming its data to {len(places)} hosts: it can go on with"
        f" {len(places)}, not with {count}"
    )


def reason(error: Exception) -> str:
    """Describes an error briefly, in the operating system's words if it has any."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's form
        return os.strerror(int(code[1]))
    error = error.__cause__ or error  # Orbax may wrap it in a long description
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    )
