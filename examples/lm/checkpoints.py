"""Orbax checkpoints of a `TrainState`, one folder for each optimizer."""

import pathlib

import orbax.checkpoint as ocp

from lm.training import TrainState


class Checkpoints:
    """The newest checkpoint of each optimizer of a run.

    Saving waits until the checkpoint is complete: the training step donates its state,
    and what is recorded afterwards must not be newer than what can be restored. A
    checkpoint that was being written when the program was killed is never seen.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder.resolve()  # Orbax insists on it

    def latest_step(self, optimizer: str) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        if not (self._folder / optimizer).is_dir():
            return 0
        with self._manager(optimizer) as manager:
            return manager.latest_step() or 0

    def save(self, optimizer: str, state: TrainState) -> None:
        with self._manager(optimizer) as manager:
            manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def restore(self, optimizer: str, like: TrainState) -> TrainState:
        """The newest checkpoint, in the structure and dtypes of `like`."""
        with self._manager(optimizer) as manager:
            return manager.restore(
                manager.latest_step(), args=ocp.args.StandardRestore(like)
            )

    def _manager(self, optimizer: str) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder / optimizer, options=options)
