"""The configs for Levanter, with a stand-in for the few names that they use of it.

tests/test_trainer_pages.py runs them with Levanter itself.
"""

import dataclasses
import importlib
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spam_optax

pytestmark = pytest.mark.one_python

NAME = "spam_optax.integrations.levanter"
PARAMS = {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The part of Levanter's class that the configs use."""

    learning_rate: float = 6e-4
    weight_decay: float = 0.1

    @classmethod
    def register_subclass(cls, name):
        def register(subclass):
            REGISTRY[name] = subclass
            return subclass

        return register

    def build_weight_decay_mask(self):
        return lambda params: jax.tree.map(lambda p: p.ndim > 1, params)

    def lr_scheduler(self, num_train_steps):
        return optax.linear_schedule(self.learning_rate, 0.0, num_train_steps)


REGISTRY = {}
LOGGED = {}


@pytest.fixture(autouse=True)
def levanter(monkeypatch):
    modules = {
        name: types.ModuleType(name)
        for name in ("levanter", "levanter.optim", "levanter.optim.config")
    }
    tracker = types.ModuleType("levanter.tracker")
    tracker.jit_log = LOGGED.update
    modules["levanter"].tracker = tracker
    modules["levanter.optim.config"].OptimizerConfig = OptimizerConfig
    for name, module in {**modules, tracker.__name__: tracker}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    REGISTRY.clear()
    LOGGED.clear()
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def run(tx, steps=3, scale=1.0, loss=1.0):
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(steps):
        gradients = optax.tree.scale(scale * (step + 1), params)
        updates, state = tx.update(gradients, state, params, loss=loss, grams=None)
        params = optax.apply_updates(params, updates)
    return params, state


def test_import_without_levanter_names_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME)
    monkeypatch.setitem(sys.modules, "levanter", None)
    with pytest.raises(ImportError, match="needs Levanter: see docs"):
        importlib.import_module(NAME)


def test_what_levanter_itself_misses_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME)
    monkeypatch.setitem(sys.modules, "levanter.tracker", None)
    with pytest.raises(ModuleNotFoundError, match="levanter.tracker"):
        importlib.import_module(NAME)


@pytest.mark.parametrize("name", ["spam", "sparse_spam", "stable_spam"])
def test_fields_are_the_arguments(name, levanter):
    fields = {field.name: field.default for field in dataclasses.fields(REGISTRY[name])}
    common = {field.name for field in dataclasses.fields(levanter._Config)}
    signature = inspect.signature(getattr(spam_optax, name))
    arguments = {x.name: x.default for x in signature.parameters.values()}
    for no_field in ("learning_rate", "weight_decay", "mask", "sparse_params"):
        arguments.pop(no_field, None)
    assert {x: fields[x] for x in fields.keys() - common} == arguments


def test_fields_of_the_guard_are_its_arguments(levanter):
    signature = inspect.signature(spam_optax.skip_spikes)
    arguments = {x.name: x.default for x in signature.parameters.values()}
    del arguments["inner"], arguments["needs_loss"]
    assert dataclasses.asdict(levanter.SkipSpikesConfig()) == arguments


@pytest.mark.parametrize("name", ["spam", "sparse_spam", "stable_spam"])
def test_equals_the_chain(name):
    config = REGISTRY[name](learning_rate=0.1, max_grad_norm=2.0, b1=0.8)
    mask = config.build_weight_decay_mask()
    schedule = config.lr_scheduler(10)
    make = getattr(spam_optax, name)
    chain = optax.chain(
        optax.clip_by_global_norm(2.0),
        make(schedule, b1=0.8, weight_decay=0.1, mask=mask),
    )
    params, state = run(config.build(10))
    jax.tree.map(np.testing.assert_allclose, params, run(chain)[0])
    np.testing.assert_allclose(state.hyperparams["learning_rate"], schedule(2))


def test_no_clipping_of_the_norm():
    config = REGISTRY["spam"](learning_rate=0.1, max_grad_norm=None, weight_decay=0.0)
    _, state = run(config.build(10), steps=1, scale=100.0)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"], 10.0, rtol=1e-6)


@pytest.mark.parametrize("guard", [True, "config"])
def test_guard_skips_by_the_loss_and_logs(guard, levanter):
    if guard == "config":
        guard = levanter.SkipSpikesConfig(window=4, min_history=2)
    config = REGISTRY["spam"](skip_spikes=guard)
    _, state = run(config.build(10), steps=1, loss=jnp.nan)
    assert optax.tree.get(state, "skip_reason") == spam_optax.SkipReason.LOSS_NONFINITE
    assert np.all(optax.tree.get(state, "mu")["kernel"] == 0)
    assert optax.tree.get(state, "skip_losses").shape == (128 if guard is True else 4,)
    assert LOGGED == {"optim/skip_reason": 4, "optim/skipped_total": 1}


def test_statistics_are_logged():
    config = REGISTRY["spam"](track_spikes=True, skip_spikes=True)
    _, state = run(config.build(10), steps=2)
    scores = optax.tree.get(state, "tensor_spike_score")
    assert LOGGED["optim/max_spike_score"] == scores.max() > 1
    assert LOGGED["optim/spike_steps"] == 0
    assert LOGGED["optim/skipped_total"] == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("spam", {"grace_steps": 600}),
        ("sparse_spam", {"density": 2.0}),
        ("spam", {"max_grad_norm": -1.0}),
        ("spam", {"max_grad_norm": float("nan")}),
    ],
)
def test_bad_arguments_are_found_when_the_optimizer_is_built(name, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        REGISTRY[name](**fields).build(10)


def test_a_guard_must_be_its_config(levanter):
    guard = levanter.SkipSpikesConfig(window=-1)
    with pytest.raises(ValueError, match="window"):
        REGISTRY["spam"](skip_spikes=guard).build(10)
    with pytest.raises(TypeError):
        REGISTRY["spam"](skip_spikes={"window": 8}).build(10)
