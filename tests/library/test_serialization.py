"""States in exported functions, and states restored without their types."""

from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import spam_optax

PARAMS = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}


def test_a_step_with_its_state_can_be_exported_and_loaded():
    pytest.importorskip("flatbuffers")
    mask = {"kernel": True, "bias": False}
    inner = spam_optax.inject_hyperparams(spam_optax.spam)(1e-3)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(inner, mask))
    state = tx.init(PARAMS)
    for _ in range(2):  # Again, with nothing left to register.
        spam_optax.register_serialization(jax.eval_shape(tx.init, PARAMS))
    update = jax.jit(tx.update)
    stored = jax.export.export(update)(PARAMS, state, PARAMS).serialize()
    for name in ("spam_optax.ScaleBySpamState", "optax.MaskedNode"):
        assert name.encode() in stored
    loaded = jax.export.deserialize(stored).call(PARAMS, state, PARAMS)
    want = update(PARAMS, state, PARAMS)
    assert jax.tree.structure(loaded) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)


class Registered(NamedTuple):
    inner: tuple


class Inside(NamedTuple):
    x: float


def test_types_that_are_already_registered_stay_as_they_are():
    """Types inside them are registered."""
    jax.export.register_namedtuple_serialization(Registered, serialized_name="mine")
    spam_optax.register_serialization({"a": [Registered((Inside(1.0),))]})
    for type_ in (Registered, Inside):
        with pytest.raises(ValueError, match="Duplicate") as error:
            jax.export.register_namedtuple_serialization(type_, serialized_name="new")
    name = f"{__name__.partition('.')[0]}.Inside"
    assert f"serialized_name `{name}`" in str(error.value)


def test_a_state_restored_without_a_template(tmp_path):
    """Orbax makes dictionaries of named tuples, whose order is not the fields'."""
    tx = optax.chain(spam_optax.spam_clip(), spam_optax.spam_adam(weight_decay=0.1))
    saved = jax.tree.map(lambda x: x + 1, tx.init(PARAMS))
    template = jax.eval_shape(tx.init, PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        with_template = checkpointer.restore(tmp_path / "state", template)
        restored = checkpointer.restore(tmp_path / "state")
    assert type(restored[0]) is dict
    # As in the docstring of `register_serialization`.
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    leaves = {name(p): x for p, x in jax.tree_util.tree_leaves_with_path(restored)}
    state = jax.tree_util.tree_map_with_path(lambda p, _: leaves[name(p)], template)
    for got in (with_template, state):
        assert jax.tree.structure(got) == jax.tree.structure(saved)
        jax.tree.map(np.testing.assert_array_equal, got, saved)


def test_types_with_the_same_name_are_refused():
    first, second = (NamedTuple("Twin", [("x", float)]) for _ in range(2))
    spam_optax.register_serialization(first(1.0))
    spam_optax.register_serialization(first(1.0))
    with pytest.raises(ValueError, match="different names, got .*Twin for both"):
        spam_optax.register_serialization(second(1.0))
