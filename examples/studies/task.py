"""Trains any task under any optimizer: one compiled program is a whole run.

A task has data, a model and a loss. Its subclass of `Task` describes them:

    class Line(task.Task):
        '''Fits a line through points.'''

        def inputs(self, run):  # batches, with one row per step, and what to test on
            rng = np.random.default_rng(run.config.seed)
            x = rng.normal(size=(run.config.steps, 8))
            return np.stack([x, 3 * x + 1], axis=1), x[0]

        def init(self, seed):  # the first parameters
            return {"slope": jnp.zeros([]), "offset": jnp.zeros([])}

        def loss(self, params, batch):
            x, y = batch
            return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)

        def evaluate(self, params, test):  # what is compared: lower is better
            return (params["slope"] - 3) ** 2

    record = task.Program(Line(), run)(run, lambda fraction: None)
"""

import abc
import dataclasses
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spam_optax
from studies import engine, pictures
from studies.comparison import variants
from trainer import cli, train_step
from trainer.config import RunConfig

# Part of the run between two momentum resets.
RESET_SHARE = 1 / 3
DIGITS = 6  # of the losses in a record: the others are noise
# Scenarios in which the gradients of the fault steps are corrupted. The others, if they
# have faults, have them in the data.
GRADIENT_FAULTS = ("noise", "coordinates", "nan")
RESULTS = ("first_eval_loss", "final_eval_loss", "losses", "gradient_norms")
RESULTS += ("optimizer_bytes", "parameters", "seconds_per_step")


# Columns of the tables of tasks; `comparison.report` has them all.
COLUMNS = ("label", "best_rate", "final_loss", "spread", "far_loss", "sensitivity")
COLUMNS += ("skipped", "diverged", "bytes_per_parameter")


class Score(NamedTuple):
    """The number that is compared, as tables and figures show it."""

    name: str
    text: str  # what it is, in a sentence that goes on with "at the best rate"
    digits: int = 3  # after the point
    sign: int = 1  # -1: more is better, and a record has minus the number
    columns: tuple[str, ...] = COLUMNS
    # Heading and explanation of columns with the numbers that a record has in "more".
    more: Mapping[str, tuple[str, str]] = MappingProxyType({})


def setting(
    default: Any, text: str, parse: Any = None, metavar: str = "N"
) -> dataclasses.Field:
    """Returns a field of a task's options, for which `program` makes a flag.

    `parse` takes the text of the flag. By default it is a whole number, at least 1.
    """
    parse = parse or cli.whole(1)
    metadata = {"help": text, "type": parse, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


class Run(NamedTuple):
    """One run."""

    label: str  # the row of the table: an optimizer of the trainer, or a variant
    scenario: str  # which faults there are; "clean": none
    config: RunConfig  # its `optimizers` and `bad_batches` are not used


class Task(abc.ABC):
    """What is trained."""

    @abc.abstractmethod
    def inputs(self, run: Run) -> tuple[Any, Any]:
        """Returns the batches, with a leading axis of steps, and the data of tests."""

    @abc.abstractmethod
    def init(self, seed: jax.typing.ArrayLike) -> optax.Params:
        """Draws the first parameters."""

    def loss(self, params: optax.Params, batch: Any) -> jax.Array:
        """Returns the loss of a batch. `gradient` may be defined instead."""
        raise NotImplementedError

    def start(self, params: optax.Params, seed: jax.typing.ArrayLike) -> Any:
        """Returns the state of the task, which `gradient` changes. Most have none."""
        del params, seed

    def gradient(
        self, params: optax.Params, state: Any, batch: Any
    ) -> tuple[jax.Array, optax.Updates, Any, dict[str, Any]]:
        """Returns loss, gradient, new state, and more arguments of the optimizer."""
        return *jax.value_and_grad(self.loss)(params, batch), state, {}

    def curves(self, state: Any) -> dict[str, jax.Array]:
        """Returns numbers of each step to record, besides losses and norms."""
        del state
        return {}

    @abc.abstractmethod
    def evaluate(self, params: optax.Params, test: Any) -> jax.Array:
        """Returns the number that is compared. The lowest one is the best."""

    def first(self, seed: jax.typing.ArrayLike, test: Any) -> optax.Params:
        """Returns the first parameters, unless `init` draws them, from `test`."""
        del test
        return self.init(seed)

    def measure(
        self, before: optax.Params, after: optax.Params, test: Any
    ) -> dict[str, jax.Array]:
        """Returns more numbers of a run, from its first and its last parameters."""
        del before, after, test
        return {}


class Program:
    """Trains runs that differ in learning rate, seed and fault steps only.

    A whole run is one compiled program.
    """

    def __init__(self, task: Task, run: Run):
        self._task = task
        self._label, _, self._config = run
        self._train = jax.jit(self._run).lower(*self._inputs(run)).compile()

    def __call__(self, run: Run, progress: engine.Progress) -> engine.Record:
        """Returns the losses and gradient norms of a run, its memory and its time."""
        del progress  # one call trains the whole run
        inputs = self._inputs(run)
        start = time.perf_counter()
        results = jax.device_get(self._train(*inputs))
        seconds = time.perf_counter() - start
        if not np.isfinite(results["first_eval_loss"]):
            raise FloatingPointError("the test loss before training is not finite")
        return {
            **{name: engine.to_json(x, DIGITS) for name, x in results.items()},
            **self._sizes(),
            "seconds_per_step": seconds / run.config.steps,
        }

    def _sizes(self) -> dict[str, int]:
        """Returns the number of parameters, and bytes of state and of temporaries.

        The state is the optimizer's. The compiler reports the temporaries of the whole
        run: all that is neither an input nor a result.
        """
        params = jax.eval_shape(self._task.init, 0)
        state = jax.eval_shape(lambda x: self._transform(0, 1.0).init(x), params)
        return {
            "optimizer_bytes": sum(
                x.size * x.dtype.itemsize for x in jax.tree.leaves(state)
            ),
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "temporary_bytes": self._train.memory_analysis().temp_size_in_bytes,
        }

    def _inputs(self, run: Run) -> tuple:
        """Returns seed, rate, batches, fault steps and test data of a run."""
        config = run.config
        batches, test = self._task.inputs(run)
        is_fault_step = np.zeros(config.steps, bool)
        if run.scenario in GRADIENT_FAULTS:
            is_fault_step[np.array(config.fault_steps) - 1] = True
        rate = jnp.float32(config.learning_rate)
        return jnp.uint32(config.seed), rate, batches, is_fault_step, test

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

    def _run(self, seed, rate, batches, is_fault_step, test):
        """Trains a run; this is what is compiled."""
        params = self._task.first(seed, test)
        faults = self._faults(seed, is_fault_step)
        tx = self._transform(seed, rate)

        def step(carry, batch):
            state, *carry = carry
            loss, gradient, state, measured = self._task.gradient(
                carry[0], state, batch
            )
            gradient, *carry = train_step.apply_gradient(
                gradient, *carry, tx, faults, value=loss, **measured
            )
            curves = {"losses": loss, "gradient_norms": optax.tree.norm(gradient)}
            curves |= self._task.curves(state)
            reason = optax.tree.get(carry[1], "skip_reason")
            if reason is not None:
                curves["skip_reasons"] = reason
            return (state, *carry), curves

        first = self._task.evaluate(params, test)
        state = self._task.start(params, seed)
        carry = state, params, tx.init(params), faults.init(params)
        (_, trained, *_), curves = jax.lax.scan(step, carry, batches)
        last = self._task.evaluate(trained, test)
        return {
            "first_eval_loss": first,
            "final_eval_loss": last,
            **self._task.measure(params, trained, test),
            **curves,
        }


def decode(record: engine.Record) -> engine.Record:
    """Returns the results of a record with the settings beside them."""
    results = {name: record[name] for name in RESULTS}
    reasons = record.get("skip_reasons")  # None: there is no guard
    return record["settings"] | results | {"skip_reasons": reasons}


# -------------------------------------------------------------------------- the study

# The settings of RunConfig that decide how a task is trained.
TRAINING = ("steps", "seed", "batch_size", "learning_rate", "warmup_steps")
TRAINING += ("weight_decay", "clip_norm", "threshold", "reset_interval", "density")
TRAINING += ("bursts", "spike_rate", "spike_factor", "spike_kind")


class TaskStudy(engine.Study):
    """Trains one task under several optimizers.

    A study of a task is a subclass with the scenarios and the class of the task, which
    is made of `options`, a dataclass with the task's own settings.
    """

    score = Score("final loss", "the loss after training")

    def __init__(self, options: Any):
        self.options = options

    @abc.abstractmethod
    def task(self, run: Run) -> Task:
        """Makes the task. It is the same for all runs with the same `program`."""

    def settings(self, run: Run) -> dict[str, Any]:
        training = {name: getattr(run.config, name) for name in TRAINING}
        given = {"label": run.label, "scenario": run.scenario} | training
        return given | dataclasses.asdict(self.options)

    def name(self, run: Run) -> str:
        return file_name(run, engine.digest(self.settings(run)))

    def program(self, run: Run) -> tuple[str, RunConfig]:
        """Returns what is compiled: rate, seed and faults are its inputs."""
        return run.label, dataclasses.replace(run.config, learning_rate=1.0, seed=0)

    def compile(self, run: Run) -> engine.Train:
        return Program(self.task(run), run)

    def decode(self, record: engine.Record) -> engine.Record:
        return decode(record)

    def draw(self, results, records: Sequence[engine.Record]):
        """Draws the results of `comparison.statistics`, made of these records."""
        del records
        return pictures.by_scenario(results, self.score)


def file_name(run: Run, digest: str) -> str:
    """Returns the name of a record, which begins with what one looks for."""
    label, scenario = (re.sub("[^a-z0-9_.]+", "_", x) for x in run[:2])
    rate, seed = run.config.learning_rate, run.config.seed
    return f"{label}-{scenario}-{rate:g}-seed{seed}-{digest}"


def grid(
    base: RunConfig,
    labels: Sequence[str],
    scenarios: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[Run]:
    """Returns the runs of every optimizer, scenario, learning rate and seed."""
    combinations = itertools.product(labels, scenarios, rates, seeds)
    return [
        Run(label, scenario, with_training(base, label, learning_rate=rate, seed=seed))
        for label, scenario, rate, seed in combinations
    ]


def with_training(base: RunConfig, label: str, **changes: Any) -> RunConfig:
    """Returns `base` with changes, and resets after every third of the run."""
    if variants.row_of(label).resets:
        changes["reset_interval"] = max(2, round(RESET_SHARE * base.steps))
    return dataclasses.replace(base, **changes)
