"""One run of the comparison, and the compiled program that trains it."""

import dataclasses
import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spam_optax
from studies import engine
from studies.comparison import variants
from trainer import data, model, train_step
from trainer.config import SHAPE, RunConfig
from trainer.data import text_files
from trainer.data.tokenization import BYTES
from trainer.errors import UsageError

FAULTLESS = ("clean", "shift")
SCENARIOS = (*FAULTLESS, "noise", "coordinates", "nan", "batches")
# In a record, so that it does not depend on the folder of this repository.
EMBEDDED_PROSE = "examples/data/prose_pd.txt.xz"
DIGITS = 6  # of the losses in a record: the others are noise


class Run(NamedTuple):
    """One run."""

    label: str  # the row of the table: an optimizer of the trainer, or a variant
    scenario: str  # one of SCENARIOS
    config: RunConfig  # its `optimizers` and `bad_batches` are not used


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
        digest = engine.digest({k: v for k, v in settings if v != defaults.get(k)})
        rate, seed = run.config.learning_rate, run.config.seed
        label = re.sub("[^a-z0-9_.]+", "_", run.label)
        return f"{label}-{run.scenario}-{rate:g}-seed{seed}-{digest}"

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
        """Returns the results with the settings beside them."""
        results = {name: record[name] for name in RESULTS}
        reasons = record.get("skip_reasons")  # None: there is no guard
        return record["settings"] | results | {"skip_reasons": reasons}


RESULTS = ("first_eval_loss", "final_eval_loss", "losses", "gradient_norms")
RESULTS += ("optimizer_bytes", "parameters", "seconds_per_step")


class Program:
    """Trains runs that differ in learning rate, seed and fault steps only.

    A whole run is one compiled program.
    """

    def __init__(self, run: Run):
        self._label, _, self._config = run
        config = run.config
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
        self._train = jax.jit(self._run).lower(*self._inputs(run)).compile()

    def __call__(self, run: Run, progress: engine.Progress) -> engine.Record:
        """Returns the losses and gradient norms of a run, its memory and its time."""
        del progress  # one call trains the whole run
        inputs = self._inputs(run)
        start = time.perf_counter()
        results = jax.device_get(self._train(*inputs))
        seconds = time.perf_counter() - start
        return {
            **{name: engine.to_json(x, DIGITS) for name, x in results.items()},
            **self._sizes(),
            "seconds_per_step": seconds / run.config.steps,
        }

    def _sizes(self) -> dict[str, int]:
        """Returns the bytes of the optimizer's state and the number of parameters."""
        params = jax.eval_shape(self._initial_params, 0)
        state = jax.eval_shape(lambda x: self._transform(0, 1.0).init(x), params)
        return {
            "optimizer_bytes": sum(
                x.size * x.dtype.itemsize for x in jax.tree.leaves(state)
            ),
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
        }

    def _inputs(self, run: Run) -> tuple:
        """Returns seed, rate, batches, fault steps and validation batches of a run."""
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
        is_fault_step = np.zeros(config.steps, bool)
        if run.scenario == "batches":
            corrupt(batches, config, self._vocabulary)
        elif run.scenario not in FAULTLESS:
            is_fault_step[np.array(config.fault_steps) - 1] = True
        return (
            jnp.uint32(config.seed),
            jnp.float32(config.learning_rate),
            batches,
            is_fault_step,
            self._validation,
        )

    def _initial_params(self, seed: jax.typing.ArrayLike) -> optax.Params:
        decoder = model.Decoder(self._model, rngs=nnx.Rngs(jax.random.key(seed)))
        return nnx.to_pure_dict(nnx.state(decoder))

    def _transform(self, seed, rate) -> optax.GradientTransformation:
        config = dataclasses.replace(self._config, seed=seed)
        return variants.make(self._label, config, rate)

    def _faults(self, seed, is_fault_step) -> optax.GradientTransformation:
        return spam_optax.testing.inject_spikes(
            seed,
            self._config.spike_rate,
            self._config.spike_factor,
            kind=self._config.spike_kind,
            steps=lambda step: is_fault_step[step - 1],
        )

    def _run(self, seed, rate, batches, is_fault_step, validation):
        """Trains a run; this is what is compiled."""
        params = self._initial_params(seed)
        faults = self._faults(seed, is_fault_step)
        tx = self._transform(seed, rate)

        def step(carry, batch):
            loss, gradient, logits = train_step.gradient_of_batch(
                carry[0], batch[None], self._graphdef, self._config.z_loss
            )
            gradient, *carry = train_step.apply_gradient(
                gradient, *carry, tx, faults, value=loss, attention_logits=logits
            )
            curves = {"losses": loss, "gradient_norms": optax.tree.norm(gradient)}
            reason = optax.tree.get(carry[1], "skip_reason")
            if reason is not None:
                curves["skip_reasons"] = reason
            return tuple(carry), curves

        evaluate = functools.partial(train_step.evaluate, graphdef=self._graphdef)
        first = evaluate(params, validation)
        carry = params, tx.init(params), faults.init(params)
        carry, curves = jax.lax.scan(step, carry, batches)
        last = evaluate(carry[0], validation)
        return {"first_eval_loss": first, "final_eval_loss": last, **curves}


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
