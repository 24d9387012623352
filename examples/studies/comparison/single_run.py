"""A whole training run as one compiled program, for comparisons of many small runs."""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spam_optax
from studies.comparison import experiments
from studies.comparison.experiments import Spec
from trainer import data, model, train_step
from trainer.data import text_files

Arrays = dict[str, Any]


class Program:
    """Runs that differ in learning rate and seed alone, compiled once."""

    def __init__(self, spec: Spec):
        self._spec = spec
        config = spec.config
        tokenizer, self._tokens, _ = text_files.load(
            config.data, config.tokenizer, config.separator
        )
        self._vocabulary = tokenizer.vocabulary
        self._model = model.for_platform(config.model, tokenizer.vocabulary, "cpu")
        self._digest = text_files.text_digest(config.data)
        self._graphdef, _ = model.abstract(self._model)
        data.check_length("train", self._tokens.train, tokenizer, config)
        self._validation = data.evaluation_batches(
            self._tokens.validation, tokenizer, config
        )
        arguments = self._arguments(spec)
        self._train = jax.jit(self._make_train()).lower(*arguments).compile()

    def __call__(self, spec: Spec) -> Arrays:
        """What came of a run: losses, gradient norms, and what it cost."""
        arguments = self._arguments(spec)
        start = time.perf_counter()
        results = jax.device_get(self._train(*arguments))
        seconds = time.perf_counter() - start
        return {
            "settings": spec.settings(),
            "digest": self._digest,
            **{name: finite_list(value) for name, value in results.items()},
            "optimizer_bytes": self.optimizer_bytes(),
            "parameters": self.parameters(),
            "seconds_per_step": seconds / spec.config.steps,
        }

    def optimizer_bytes(self) -> int:
        """Of the optimizer's state."""

        def init(seed, rate):
            params = self._initial_params(seed)
            return self._transform(seed, rate).init(params)

        shapes = jax.eval_shape(init, 0, 1.0)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    def parameters(self) -> int:
        shapes = jax.eval_shape(self._initial_params, 0)
        return sum(x.size for x in jax.tree.leaves(shapes))

    def _arguments(self, spec: Spec) -> tuple:
        config = spec.config
        source = text_files.batches(
            self._tokens.train, config.sequence_length, config.batch_size, config.seed
        )
        batches = np.stack([source[step] for step in range(config.steps)])
        is_fault_step = np.zeros(config.steps, bool)
        if spec.scenario == "batches":
            corrupt(batches, config, self._vocabulary)
        elif spec.scenario != "clean":
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
        label, _, config = self._spec
        return experiments.make(label, dataclasses.replace(config, seed=seed), rate)

    def _faults(self, seed, is_fault_step) -> optax.GradientTransformation:
        config = self._spec.config
        return spam_optax.testing.inject_spikes(
            seed,
            config.spike_rate,
            config.spike_factor,
            kind=config.spike_kind,
            steps=lambda step: is_fault_step[step - 1],
        )

    def _make_train(self):
        """The program: seed, rate, data and faults -> results."""

        def train(seed, rate, batches, is_fault_step, validation):
            params = self._initial_params(seed)
            faults = self._faults(seed, is_fault_step)
            tx = self._transform(seed, rate)

            def step(carry, batch):
                params, state, fault_state = carry
                loss, gradient = train_step.gradient_of_batch(
                    params, batch[None], self._graphdef, self._spec.config.z_loss
                )
                gradient, fault_state = faults.update(gradient, fault_state, params)
                update, state = tx.update(gradient, state, params)
                params = optax.apply_updates(params, update)
                return (params, state, fault_state), {
                    "losses": loss,
                    "gradient_norms": optax.tree.norm(gradient),
                }

            evaluate = functools.partial(train_step.evaluate, graphdef=self._graphdef)
            first = evaluate(params, validation)
            carry = params, tx.init(params), faults.init(params)
            carry, curves = jax.lax.scan(step, carry, batches)
            last = evaluate(carry[0], validation)
            return {"first_eval_loss": first, "final_eval_loss": last, **curves}

        return train


def corrupt(batches: np.ndarray, config, vocabulary: int) -> None:
    """Random tokens in place of those of the fault steps' batches."""
    rng = np.random.default_rng([config.seed, 1])
    for step in config.fault_steps:
        batch = batches[step - 1]
        batch[...] = rng.integers(vocabulary, size=batch.shape)


def finite_list(values: np.ndarray) -> float | None | list[float | None]:
    """As JSON; what is not finite is None. Six digits are more than noise leaves."""

    def number(x):
        return float(f"{x:.6g}") if math.isfinite(x) else None

    return [number(x) for x in values] if values.ndim else number(values.item())
