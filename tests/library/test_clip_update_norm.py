"""`clip_update_norm` gives the same updates as a version in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spam_optax
from numpy_guards import SpikeHistory

pytestmark = pytest.mark.one_python

SETTINGS = {
    "defaults": {},
    "Levanter's": dict(robust=False, sigma=3.0),
    "short": dict(window=9, min_history=3, sigma=1.0),
    "share": dict(window=20, min_history=5, share=0.5),
}


def norms(steps=300, seed=0):
    rng = np.random.default_rng(seed)
    values = 1 + 0.1 * rng.standard_normal(steps)
    values[rng.random(steps) < 0.05] *= 5
    values[[200, 201]] = np.inf, np.nan
    return values.astype(np.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_marches_beside_the_numpy_reference(name):
    tx = spam_optax.clip_update_norm(**SETTINGS[name])
    defaults = dict(window=128, sigma=2.0, share=0.0, min_history=32)
    reference = SpikeHistory(**(defaults | SETTINGS[name]))
    params = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    state, update = tx.init(params), jax.jit(tx.update)
    clipped = 0
    for norm in norms():
        updates = jax.tree.map(lambda p, n=norm: jnp.full_like(p, n / 4), params)
        updates, state = update(updates, state)
        limit = min(norm, reference.limit()) if np.isfinite(norm) else 0
        np.testing.assert_allclose(updates["b"], limit / 4, rtol=1e-5)
        clipped += limit < norm
        if np.isfinite(norm):
            reference.values.append(norm)
            np.testing.assert_allclose(state.update_norm, norm, rtol=1e-6)
    assert 5 < clipped < 150


def test_updates_of_zero_are_no_history():
    """`MultiSteps` and a learning rate of 0 give many: they would clip all others."""
    tx = spam_optax.clip_update_norm(window=8, min_history=2)
    state = tx.init(jnp.zeros(1))
    for size in (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0):
        update = jnp.full(1, size)
        clipped, state = tx.update(update, state)
        np.testing.assert_array_equal(clipped, update)
    clipped, state = tx.update(jnp.full(1, 9.0), state)
    np.testing.assert_array_equal(clipped, 1)


def test_the_first_step_computes_no_nan():
    with jax.debug_nans(True):
        for robust in (True, False):
            tx = spam_optax.clip_update_norm(window=8, min_history=2, robust=robust)
            tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


def test_a_gradient_through_the_clip_is_finite():
    """That of the deviation of equal norms is 0, not 0 times infinity."""

    def last(x):
        tx = spam_optax.clip_update_norm(window=4, min_history=2, robust=False)
        state = tx.init(x)
        for _ in range(3):
            clipped, state = tx.update(x, state)
        return clipped.sum()

    np.testing.assert_allclose(jax.grad(last)(jnp.ones(2)), 1)


def test_an_update_within_the_limit_keeps_its_bits():
    tx = spam_optax.clip_update_norm(window=8, min_history=2, sigma=10.0)
    rng = np.random.default_rng(0)
    state = tx.init(jnp.zeros(8))
    for dtype in ("float32", "bfloat16", "float32"):
        update = jnp.asarray(rng.standard_normal(8), dtype)
        clipped, state = tx.update(update, state)
        np.testing.assert_array_equal(clipped, update)
        assert clipped.dtype == dtype


def test_after_an_optimizer_it_limits_what_moves_the_parameters():
    """Gradients that turn to one direction make SPAM's updates grow."""
    tx = optax.chain(
        spam_optax.scale_by_spam(),
        spam_optax.clip_update_norm(window=16, min_history=4),
        optax.scale_by_learning_rate(0.1),
    )
    params = jnp.zeros(4)
    state, update = tx.init(params), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    scales = []
    for step in range(30):
        noise = rng.standard_normal(4) if step < 20 else np.full(4, 3.0)
        updates, state = update(jnp.asarray(noise, jnp.float32), state, params)
        norm, scale = (
            float(optax.tree.get(state, name))
            for name in ("update_norm", "update_norm_scale")
        )
        np.testing.assert_allclose(
            jnp.linalg.norm(updates), 0.1 * scale * norm, rtol=1e-5
        )
        scales.append(scale)
    assert min(scales[20:]) < 0.9
