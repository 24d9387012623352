"""What a training run is."""

import dataclasses

OPTIMIZERS = ("adam", "adam_clip", "spam", "clip_spam")
KINDS = ("noise", "scale", "nan", "inf")
BURST_LENGTH = 3  # consecutive steps


class UsageError(Exception):
    """A mistake of the user's, told in one line."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of a run; written to its config.json."""

    optimizers: tuple[str, ...] = OPTIMIZERS
    model: str = "tiny"  # a key of model.PRESETS
    steps: int = 400  # optimizer steps, for each optimizer
    learning_rate: float = 4e-3  # at its peak
    batch_size: int = 12  # sequences a step
    sequence_length: int = 64  # bytes
    data: str | None = None  # a text file; None is the embedded Shakespeare
    seed: int = 0  # of parameters, batches and faults
    bursts: int = 4  # faults, each BURST_LENGTH steps long
    spike_rate: float = 1.0  # fraction of the gradient's coordinates hit in a burst
    spike_factor: float = 1000.0  # noise as a multiple of the tensor's RMS, or a factor
    spike_kind: str = "noise"  # one of KINDS
    threshold: float = 5000.0  # SPAM's, on g**2 / v
    reset_interval: int | None = None  # SPAM's, in steps; None is a quarter of the run
    eval_every: int = 100  # steps
    eval_sequences: int = 512  # at most, evenly spaced in the validation text
    checkpoint_every: int = 100  # steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def burst_starts(self) -> tuple[int, ...]:
        """First step of each burst, counted from 1: evenly spaced inside the run."""
        starts = (
            round(self.steps * n / (self.bursts + 1)) for n in range(1, self.bursts + 1)
        )
        return tuple(max(1, start) for start in starts)

    @property
    def fault_steps(self) -> tuple[int, ...]:
        """All steps whose gradient is corrupted, counted from 1."""
        steps = {
            start + offset
            for start in self.burst_starts
            for offset in range(BURST_LENGTH)
        }
        return tuple(sorted(step for step in steps if step <= self.steps))

    def evaluations(self, steps: int) -> int:
        """How often a run evaluates in its first `steps` steps."""
        extra = steps == self.steps and steps % self.eval_every != 0
        return steps // self.eval_every + extra

    @property
    def spam_intervals(self) -> dict[str, int]:
        """SPAM's clock, scaled to a short run.

        The published 500 steps between resets, 150 of warm-up after each, would leave
        so short a run without either. The warm-up keeps its share of the interval;
        the grace after a reset keeps its 20 steps where they fit.
        """
        interval = self.reset_interval or max(2, self.steps // 4)
        return {
            "reset_interval": interval,
            "warmup_steps": round(0.3 * interval),
            "grace_steps": min(20, interval - 1),
        }
