"""The configuration of a training run."""

import dataclasses
from typing import Any

from trainer.errors import UsageError
from trainer.model import PRESETS, ModelConfig
from trainer.settings import (
    OneOf,
    Real,
    Switch,
    Text,
    Texts,
    Whole,
    check_settings,
    declared,
    setting,
)

DEMONSTRATION = ("adam", "adam_clip", "spam", "clip_spam", "guard_clip_spam")
KINDS = ("noise", "scale", "nan", "inf")
BURST_LENGTH = 3  # consecutive steps


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of a run; written to its config.json.

    The number of devices is not part of it: see `sharding.Parallelism`. The settings of
    the model are in `model`; `from_settings` takes both by name.
    """

    optimizers: tuple[str, ...] = setting(DEMONSTRATION, Texts())  # of optimizers.TABLE
    steps: int = setting(400, Whole(1))  # optimizer steps, for each optimizer
    seed: int = setting(0, Whole(0))  # of parameters, batches, masks and faults

    model: ModelConfig = PRESETS["tiny"]
    z_loss: float = setting(0.0, Real())  # weight of the mean squared log-partition

    # None is the embedded Shakespeare; see data.load.
    data: str | None = setting(None, Text())
    tokenizer: str = setting("bytes", Text())  # see tokenization.load
    # Token between documents; None: see tokenization.load.
    separator: str | None = setting(None, Text())
    batch_size: int = setting(12, Whole(1))  # sequences per step, on all devices
    accumulate: int = setting(1, Whole(1))  # parts of a batch, computed in turn
    sequence_length: int = setting(64, Whole(1))  # tokens

    learning_rate: float = setting(4e-3, Real(exclude_low=True))  # at its peak
    # None is a tenth of the run.
    warmup_steps: int | None = setting(None, Whole(0))
    # None: 0.1 for adamw and lion, else 0.
    weight_decay: float | None = setting(None, Real())
    # Of the global norm; for zclip and adagc the largest one.
    clip_norm: float = setting(1.0, Real(exclude_low=True))
    threshold: float = setting(5000.0, Real(exclude_low=True))  # SPAM's, on g**2 / v
    # SPAM's, in steps; None is a quarter of the run.
    reset_interval: int | None = setting(None, Whole(2))
    density: float = setting(0.25, Real(0, 1, exclude_low=True))  # sparse_spam's
    # Of sparse_spam: the number of devices that may share a matrix's rows.
    row_blocks: int = setting(1, Whole(1))

    # Whether steps with a spike in loss or gradient norm are skipped.
    guard: bool = setting(False, Switch())

    # Times that the run goes back to a checkpoint and leaves out the batches since.
    rewind: int = setting(0, Whole(0))
    rewind_after: int = setting(20, Whole(1))  # steps with a loss above its band

    bursts: int = setting(4, Whole(0))  # faults, each BURST_LENGTH steps long
    # Of random tokens, each BURST_LENGTH long; None is half as many as bursts.
    bad_batches: int | None = setting(None, Whole(0))
    # Fraction of the gradient's coordinates that a burst hits.
    spike_rate: float = setting(1.0, Real(0, 1))
    # Noise as a multiple of the tensor's RMS, or a factor.
    spike_factor: float = setting(1000.0, Real())
    spike_kind: str = setting("noise", OneOf(KINDS))

    eval_every: int = setting(100, Whole(1))  # steps
    # The largest number, evenly spaced in the validation text.
    eval_sequences: int = setting(512, Whole(1))
    checkpoint_every: int = setting(100, Whole(1))  # steps
    keep_checkpoints: int = setting(2, Whole(1))  # the newest ones

    def __post_init__(self):
        check_settings(self)
        if self.rewind and self.keep_checkpoints < 2:
            raise UsageError(
                "keep_checkpoints must be >= 2 with rewind: the newest checkpoint may"
                " be from after the loss began to rise"
            )

    @classmethod
    def from_settings(cls, **given: Any) -> "RunConfig":
        """Makes a run of the settings given by name, those of the model included.

        The other settings come with the preset.

        Raises:
          UsageError: If a value is not accepted.
          TypeError: If there is no setting of a given name.
        """
        preset = given.pop("preset", cls.model.preset)
        if preset not in list(PRESETS):  # from a damaged file, it may be unhashable
            raise UsageError(
                f"preset must be one of {', '.join(PRESETS)}, not {preset!r}"
            )
        defaults = {**COMMON, **PUBLISHED[preset]} if preset in PUBLISHED else {}
        own = defaults | given
        of_model = {name: own.pop(name) for name in MODEL_SETTINGS if name in own}
        return cls(model=dataclasses.replace(PRESETS[preset], **of_model), **own)

    def with_settings(self, **changes: Any) -> "RunConfig":
        """Returns this run with other values of some settings.

        Another preset brings its own shape.
        """
        kept = self.settings()
        if changes.get("preset", self.model.preset) != self.model.preset:
            kept = {name: x for name, x in kept.items() if name not in SHAPE}
        return self.from_settings(**(kept | changes))

    def settings(self) -> dict[str, Any]:
        """Returns all settings by name, as `from_settings` takes them."""
        return {
            **{name: getattr(self, name) for name in declared(self)},
            "preset": self.model.preset,
            **{name: getattr(self.model, name) for name in MODEL_SETTINGS},
        }

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def burst_starts(self) -> tuple[int, ...]:
        """The first step of each burst, counted from 1, evenly spaced in the run."""
        return self._evenly(self.bursts)

    @property
    def bad_batch_starts(self) -> tuple[int, ...]:
        """The first batch of random tokens of each fault, likewise."""
        count = self.bursts // 2 if self.bad_batches is None else self.bad_batches
        return self._evenly(count)

    def _evenly(self, count: int) -> tuple[int, ...]:
        starts = (round(self.steps * n / (count + 1)) for n in range(1, count + 1))
        return tuple(max(1, start) for start in starts)

    @property
    def fault_steps(self) -> tuple[int, ...]:
        """All steps whose gradient is corrupted, counted from 1."""
        return self._bursts(self.burst_starts)

    @property
    def bad_batch_numbers(self) -> tuple[int, ...]:
        """All batches that are random tokens, counted from 1.

        They are the steps with these numbers, unless batches were left out before.
        """
        return self._bursts(self.bad_batch_starts)

    def _bursts(self, starts: tuple[int, ...]) -> tuple[int, ...]:
        steps = {start + offset for start in starts for offset in range(BURST_LENGTH)}
        return tuple(sorted(step for step in steps if step <= self.steps))

    @property
    def unclipped_bursts(self) -> tuple[int, ...]:
        """The first steps of bursts that fall into SPAM's grace period.

        SPAM clips nothing in these steps after a reset.
        """
        intervals = self.spam_intervals
        return tuple(
            start
            for start in self.burst_starts
            if start % intervals["reset_interval"] < intervals["grace_steps"]
        )

    def evaluates_at(self, step: int) -> bool:
        """Returns whether a run evaluates after `step`."""
        return step == self.steps or step % self.eval_every == 0

    @property
    def spam_intervals(self) -> dict[str, int]:
        """SPAM's intervals in steps, scaled to a short run.

        The published interval of 500 steps, with a warm-up of 150 after each reset,
        would leave a short run without resets. The warm-up keeps its share of the
        interval. The grace period keeps its 20 steps where they fit.
        """
        interval = self.reset_interval or max(2, self.steps // 4)
        return {
            "reset_interval": interval,
            "warmup_steps": round(0.3 * interval),
            "grace_steps": min(20, interval - 1),
        }


MODEL_SETTINGS = tuple(declared(ModelConfig))
SHAPE = ("layers", "width", "heads", "ffn_width")

# The settings of the papers that trained these shapes on C4: GaLore's steps, SPAM's
# learning rates. They are the defaults of the preset.
PUBLISHED = {
    "9m": {"steps": 10_000, "learning_rate": 1e-3},
    "60m": {"steps": 10_000, "learning_rate": 1e-3},
    "130m": {"steps": 20_000, "learning_rate": 8e-4},
    "350m": {"steps": 60_000, "learning_rate": 4e-4},
    "1b": {"steps": 100_000, "learning_rate": 2e-4},
}
COMMON = {
    "optimizers": ("spam",),
    "batch_size": 512,
    "sequence_length": 256,
    "warmup_steps": 1000,
    "reset_interval": 500,
    "row_blocks": 16,
    "guard": True,
    "untied_head": True,
    "compute_dtype": "bfloat16",
    "remat": "full",
    "bursts": 0,
    "eval_every": 1000,
    "checkpoint_every": 1000,
}
