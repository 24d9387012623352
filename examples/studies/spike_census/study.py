"""The runs of the census: their settings, their models and texts, and their records."""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from studies import engine
from studies.spike_census import architectures, counting
from trainer import model, optimizers
from trainer.config import RunConfig
from trainer.data import text_files
from trainer.errors import UsageError

MODELS = {
    "llama": (model.Decoder, "plain"),
    "llama-scaled": (model.Decoder, "scaled"),
    "llama-normed": (model.Decoder, "normed"),
    "gpt2": (architectures.GPT2, "plain"),
    "hawk": (architectures.Hawk, "plain"),
}
TEXTS = {"shakespeare": text_files.SHAKESPEARE, "prose": text_files.PROSE}
HEAD_WIDTH = 16
EMBEDDING = "embed/embedding"
DIGITS = 4  # of the largest scores in a record


@dataclasses.dataclass(frozen=True)
class Setting:
    """All settings that decide the numbers of one run."""

    model: str = "llama"  # a key of MODELS
    text: str = "shakespeare"  # a key of TEXTS, or the path of a text file
    tokenizer: str = "bytes"  # see tokenization.load
    batch_size: int = 16  # sequences per step
    sequence_length: int = 64  # tokens
    layers: int = 3
    width: int = 64  # a multiple of HEAD_WIDTH
    steps: int = 600
    learning_rate: float = 4e-3  # at its peak
    seed: int = 0  # of parameters and batches

    @property
    def name(self) -> str:
        """Returns a name that is unique among the runs of one table."""
        text = self.text if self.text in TEXTS else pathlib.Path(self.text).stem
        tokenizer = self.tokenizer.replace(":", "-").replace("/", "-")
        return f"{self.model}_{text}_{tokenizer}_b{self.batch_size}"


class Record(NamedTuple):
    """The results of one finished run."""

    setting: Setting
    tensors: dict[str, int]  # coordinates of each
    halted_at: int | None  # the step, from 1, that was not finite
    loss: np.ndarray  # of each step
    counts: dict[str, np.ndarray]  # steps x tensors: gss_count, gss_max, online_...

    @property
    def warmup(self) -> int:
        """Returns the number of steps in which the learning rate rises."""
        return max(1, self.setting.steps // 10)

    def spikes(self, *, embedding: bool = True) -> np.ndarray:
        """Counts the coordinates of each step with a gradient spike."""
        chosen = [embedding or name != EMBEDDING for name in self.tensors]
        return self.counts["gss_count"][:, chosen].sum(axis=1)

    def largest_outside_embedding(self) -> np.ndarray:
        """Returns each step's largest gradient spike score outside the embedding.

        Most steps have no spike there, so their number would tell little.
        """
        chosen = [name != EMBEDDING for name in self.tensors]
        return self.counts["gss_max"][:, chosen].max(axis=1)


class SpikeCensus(engine.Study):
    """Trains each model on each text, and counts all gradient spikes."""

    def settings(self, run: Setting) -> dict[str, Any]:
        return dataclasses.asdict(run)

    def name(self, run: Setting) -> str:
        return f"{run.name}-{engine.digest(self.settings(run))}"

    def data_digest(self, run: Setting) -> str:
        """Returns the digest of text and tokenizer.

        Raises:
          UsageError: If the text cannot be read, or is too short for one batch.
        """
        text = load_text(run.text, run.tokenizer)
        needed = run.batch_size * run.sequence_length + 1
        if len(text.tokens) < needed:
            raise UsageError(
                f"the text {run.text} is too short: one batch takes {needed:,} tokens,"
                f" its training part has {len(text.tokens):,}"
            )
        return text.digest

    def compile(self, run: Setting) -> engine.Train:
        return train  # JAX compiles the steps when they run

    def decode(self, record: engine.Record) -> Record:
        return decode(record)


def train(run: Setting, progress: engine.Progress) -> engine.Record:
    """Trains once to compute the mean gradient, and again to compare with it."""
    task = make_task(run)
    counted = counting.count_spikes(task, progress)
    counts = {
        name: engine.to_json(table, DIGITS if name.endswith("max") else None)
        for name, table in counted.counts.items()
    }
    return {
        "tensors": counting.tensor_sizes(task.params),
        "halted_at": counted.halted_at,
        "loss": engine.to_json(counted.losses),
        **counts,
    }


def decode(record: engine.Record) -> Record:
    """Converts a record of JSON; raises KeyError, TypeError or ValueError."""
    tables = [f"{kind}_{what}" for kind in counting.KINDS for what in ("count", "max")]
    decoded = Record(
        Setting(**record["settings"]),
        dict(record["tensors"]),
        record["halted_at"],
        np.array(record["loss"], np.float64),
        {name: np.array(record[name]) for name in tables},
    )
    shape = len(decoded.loss), len(decoded.tensors)
    if any(table.shape != shape for table in decoded.counts.values()):
        raise ValueError("its tables do not have a row for every step")
    return decoded


class Text(NamedTuple):
    """A text to train on, as tokens."""

    tokens: np.ndarray
    vocabulary: int
    digest: str  # changes when the text or the tokenizer does


@functools.lru_cache(maxsize=2)
def load_text(name: str, tokenizer: str) -> Text:
    """Returns the training part of a text: a key of TEXTS, or a path."""
    path = str(TEXTS.get(name, name))
    made, tokens, digest = text_files.load(path, tokenizer)
    return Text(tokens.train, made.vocabulary, digest)


def make_task(setting: Setting) -> counting.Task:
    """Makes model, batches and learning rates of a run."""
    text = load_text(setting.text, setting.tokenizer)
    kind, embedding = MODELS[setting.model]
    shape = model_config(setting, text.vocabulary, embedding)
    graphdef, state = nnx.split(kind(shape, rngs=nnx.Rngs(setting.seed)))
    schedule = optimizers.schedule(
        RunConfig(steps=setting.steps, learning_rate=setting.learning_rate)
    )
    return counting.Task(
        graphdef,
        nnx.to_pure_dict(state),
        text_files.batches(
            text.tokens, setting.sequence_length, setting.batch_size, setting.seed
        ),
        np.asarray(schedule(np.arange(setting.steps))),
    )


def model_config(
    setting: Setting, vocabulary: int, embedding: str
) -> model.ModelConfig:
    return model.ModelConfig(
        layers=setting.layers,
        width=setting.width,
        heads=setting.width // HEAD_WIDTH,
        ffn_width=11 * setting.width // 4,
        vocabulary=vocabulary,
        positions=setting.sequence_length,
        embedding=embedding,
        scan_unroll=setting.layers,
    )
