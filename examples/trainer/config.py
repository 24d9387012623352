"""What a training run is."""

import dataclasses
from typing import Any

OPTIMIZERS = (
    "adam",
    "adam_clip",
    "adamw",
    "adamw_clip",
    "adafactor",
    "lion",
    "spam",
    "clip_spam",
    "spam_chain",
    "sparse_spam",
    "stable_spam",
    "stabilizer_adam",
    "adam_mini",
    "stable_adamw",
    "zclip_adam",
    "adagc_adam",
    "galore",
    "muon",
)
DEMONSTRATION = ("adam", "adam_clip", "spam", "clip_spam")
EMBEDDINGS = ("plain", "scaled", "normed")
INITIALIZATIONS = ("standard", "stable", "wesar")
DEPTH_SCALED = ("stable", "wesar")  # what writes to the stream: over sqrt(2 * layers)
NORMS = ("pre", "scaled", "mixed")
COMPUTE_DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")
KINDS = ("noise", "scale", "nan", "inf")
BURST_LENGTH = 3  # consecutive steps


class UsageError(Exception):
    """A mistake of the user's, told in one line."""


class DataError(UsageError):
    """Data that cannot be read, told in one line that names the file."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of a run; written to its config.json.

    On how many devices it runs is not among it: see `sharding.Parallelism`.
    """

    optimizers: tuple[str, ...] = DEMONSTRATION
    steps: int = 400  # optimizer steps, for each optimizer
    seed: int = 0  # of parameters, batches, masks and faults

    preset: str = "tiny"  # a key of model.PRESETS
    embedding: str = "plain"  # one of EMBEDDINGS
    initialization: str = "standard"  # one of INITIALIZATIONS; stable: Spike No More
    norm: str = "pre"  # one of NORMS; scaled: LayerNorm Scaling, mixed: Mix-LN
    gated_attention: bool = False  # a sigmoid gate on what the heads put out
    untied_head: bool = False  # a head of its own rather than the embedding, transposed
    z_loss: float = 0.0  # weight of the mean squared log-partition function
    compute_dtype: str = "float32"  # of activations; parameters and moments are float32
    remat: str = "none"  # what the backward pass computes again, one of REMAT

    data: str | None = None  # None is the embedded Shakespeare; see data.load
    tokenizer: str = "bytes"  # see tokenization.load
    separator: str | None = None  # token between documents; None: see tokenization.load
    batch_size: int = 12  # sequences a step, on all devices together
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    sequence_length: int = 64  # tokens

    learning_rate: float = 4e-3  # at its peak
    warmup_steps: int | None = None  # None is a tenth of the run
    weight_decay: float | None = None  # None: 0.1 for adamw and lion, else 0
    clip_norm: float = 1.0  # of the global norm; for zclip and adagc the largest one
    threshold: float = 5000.0  # SPAM's, on g**2 / v
    reset_interval: int | None = None  # SPAM's, in steps; None is a quarter of the run
    density: float = 0.25  # of sparse_spam's momentum
    row_blocks: int = 1  # of sparse_spam: devices that may share a matrix's rows

    bursts: int = 4  # faults, each BURST_LENGTH steps long
    spike_rate: float = 1.0  # fraction of the gradient's coordinates hit in a burst
    spike_factor: float = 1000.0  # noise as a multiple of the tensor's RMS, or a factor
    spike_kind: str = "noise"  # one of KINDS

    eval_every: int = 100  # steps
    eval_sequences: int = 512  # at most, evenly spaced in the validation text
    checkpoint_every: int = 100  # steps
    keep_checkpoints: int = 2  # the newest ones

    def __post_init__(self):
        if self.norm == "scaled" and self.initialization in DEPTH_SCALED:
            raise UsageError(
                f"--norm scaled and --initialization {self.initialization} both make"
                " sub-layers smaller with depth, and must not be combined: use"
                " --initialization standard, or another --norm"
            )

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

    @property
    def unclipped_bursts(self) -> tuple[int, ...]:
        """Where bursts begin in SPAM's grace after a reset: it clips nothing then."""
        intervals = self.spam_intervals
        return tuple(
            start
            for start in self.burst_starts
            if start % intervals["reset_interval"] < intervals["grace_steps"]
        )

    def evaluates_at(self, step: int) -> bool:
        """Whether a run evaluates after `step`."""
        return step == self.steps or step % self.eval_every == 0

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


# The settings of the papers that trained these shapes on C4: GaLore's steps, SPAM's
# learning rates. A preset brings them along; flags change them one by one.
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
    "untied_head": True,
    "compute_dtype": "bfloat16",
    "remat": "full",
    "bursts": 0,
    "eval_every": 1000,
    "checkpoint_every": 1000,
}


def complete(given: dict[str, Any]) -> RunConfig:
    """A run with the settings `given`; the rest come with the preset."""
    preset = given.get("preset", RunConfig.preset)
    defaults = {**COMMON, **PUBLISHED[preset]} if preset in PUBLISHED else {}
    return RunConfig(**{**defaults, **given})
