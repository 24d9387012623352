"""The study of optimizers and models on text, without and with faults."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from studies import engine, task
from studies.task import Run
from trainer import data, model, train_step
from trainer.config import SHAPE, RunConfig
from trainer.data import text_files
from trainer.data.tokenization import BYTES
from trainer.errors import UsageError

FAULTLESS = ("clean", "shift")
SCENARIOS = (*FAULTLESS, "noise", "coordinates", "nan", "batches")
# In a record, so that it does not depend on the folder of this repository.
EMBEDDED_PROSE = "examples/data/prose_pd.txt.xz"


class Comparison(engine.Study):
    """Trains optimizers on the same data, without and with faults."""

    def __init__(self):
        self._text_digests = {}

    def settings(self, run: Run) -> dict[str, Any]:
        settings = run.config.settings()
        del settings["optimizers"], settings["bad_batches"]
        if settings["data"] == str(text_files.PROSE):
            settings["data"] = EMBEDDED_PROSE
        return {"label": run.label, "scenario": run.scenario} | settings

    def name(self, run: Run) -> str:
        """Returns a name that ignores default values.

        So a new setting changes no name.
        """
        defaults = RunConfig().settings()
        shape = RunConfig().with_settings(preset=run.config.model.preset).settings()
        defaults |= {name: shape[name] for name in SHAPE}
        settings = self.settings(run).items()
        changed = {k: v for k, v in settings if v != defaults.get(k)}
        return task.file_name(run, engine.digest(changed))

    def program(self, run: Run) -> tuple[str, bool, RunConfig]:
        """Returns what is compiled: rate, seed and fault steps are its inputs."""
        config = dataclasses.replace(run.config, learning_rate=1.0, seed=0)
        return run.label, run.scenario == "shift", config

    def data_digest(self, run: Run) -> str:
        names = [run.config.data]
        if run.scenario == "shift":
            names.append(str(text_files.PROSE))
        for name in names:
            if name not in self._text_digests:
                self._text_digests[name] = text_files.text_digest(name)
        return " ".join(self._text_digests[name] for name in names)

    def compile(self, run: Run) -> engine.Train:
        return Program(run)

    def decode(self, record: engine.Record) -> engine.Record:
        return task.decode(record)


class Program(task.Program):
    """Trains language models that differ in rate, seed and fault steps only."""

    def __init__(self, run: Run):
        super().__init__(LanguageModel(run), run)


class LanguageModel(task.Task):
    """Predicts the next token of a text, with the trainer's model."""

    def __init__(self, run: Run):
        self._config = config = run.config
        tokenizer, self._tokens, _ = text_files.load(
            config.data, config.tokenizer, config.separator
        )
        self._vocabulary = tokenizer.vocabulary
        self._model = model.for_platform(config.model, tokenizer.vocabulary, "cpu")
        self._graphdef, _ = model.abstract(self._model)
        data.check_length("train", self._tokens.train, tokenizer, config)
        if run.scenario == "shift":
            check_bytes(config)
            _, prose, _ = text_files.load(str(text_files.PROSE), config.tokenizer)
            self._later = prose.train
            self._tokens = self._tokens._replace(validation=prose.validation)
        self._validation = data.evaluation_batches(
            self._tokens.validation, tokenizer, config
        )

    def inputs(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        config = run.config
        source = text_files.batches(
            self._tokens.train, config.sequence_length, config.batch_size, config.seed
        )
        batches = np.stack([source[step] for step in range(config.steps)])
        if run.scenario == "shift":
            half = config.steps // 2
            source = text_files.batches(
                self._later, config.sequence_length, config.batch_size, config.seed
            )
            batches[half:] = [source[step] for step in range(config.steps - half)]
        if run.scenario == "batches":
            corrupt(batches, config, self._vocabulary)
        return batches, self._validation

    def init(self, seed: jax.typing.ArrayLike) -> optax.Params:
        decoder = model.Decoder(self._model, rngs=nnx.Rngs(jax.random.key(seed)))
        return nnx.to_pure_dict(nnx.state(decoder))

    def gradient(self, params, state, batch):
        loss, gradient, logits = train_step.gradient_of_batch(
            params, batch[None], self._graphdef, self._config.z_loss
        )
        return loss, gradient, state, {"attention_logits": logits}

    def evaluate(self, params, test):
        return train_step.evaluate(params, test, graphdef=self._graphdef)


def check_bytes(config: RunConfig) -> None:
    """Raises unless texts are read as bytes, as two texts share no other tokens."""
    if config.tokenizer != BYTES.name:
        raise UsageError(
            f"the scenario shift needs the tokenizer {BYTES.name}, not"
            f" {config.tokenizer}"
        )


def corrupt(batches: np.ndarray, config: RunConfig, vocabulary: int) -> None:
    """Replaces the batches of the fault steps by random tokens, in place."""
    rng = np.random.default_rng([config.seed, 1])
    for step in config.fault_steps:
        batch = batches[step - 1]
        batch[...] = rng.integers(vocabulary, size=batch.shape)
