"""Gradients with NaN, infinities and overflows at random places and steps."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import spam_optax

# Of tensors whose names say nothing, as a and b.
pytestmark = [
    pytest.mark.one_python,
    pytest.mark.filterwarnings("ignore:adam_mini_partition. the names"),
]

STEPS, SHAPE = 30, (3, 4)
# Resets in steps 12 and 24; clipping is active in steps 5 to 11, 17 to 23, 29 and 30.
SETTINGS = dict(reset_interval=12, grace_steps=5)
RAMP = dict(warmup_steps=3)
MAKERS = {
    "spam": lambda: spam_optax.spam(
        0.01, threshold=100.0, count=True, **SETTINGS, **RAMP
    ),
    "spam_unseen": lambda: spam_optax.spam(
        0.01, threshold=100.0, clip_unseen=True, count=True, **SETTINGS, **RAMP
    ),
    "spam_bfloat16_moments": lambda: spam_optax.spam(
        0.01, mu_dtype="bfloat16", nu_dtype="bfloat16", count=True, **SETTINGS, **RAMP
    ),
    "chain": lambda: optax.chain(
        spam_optax.spam_clip(100.0, count=True, **SETTINGS),
        spam_optax.spam_adam(0.01, reset_interval=12, **RAMP),
    ),
    "spam_adam": lambda: spam_optax.spam_adam(
        0.01, reset_interval=12, count=True, **RAMP
    ),
}
# Coordinates share a norm or a second moment here, so one fault touches the others.
COUPLED = {
    "zclip": lambda: optax.chain(spam_optax.zclip(count=True), optax.adam(0.01)),
    "adagc": lambda: optax.chain(spam_optax.adagc(count=True), optax.adam(0.01)),
    # What it lets through in float16, optax.adam would square in float16.
    "adaclip": lambda: optax.chain(
        spam_optax.adaclip(0.9, count=True),
        spam_optax.spam_adam(0.01, reset_interval=None),
    ),
    "adagn": lambda: optax.chain(spam_optax.adagn(count=True), optax.adam(0.01)),
    "stabilizer": lambda: optax.chain(
        spam_optax.gradient_stabilizer(count=True), optax.adam(0.01)
    ),
    "stable_spam": lambda: spam_optax.stable_spam(0.01, reset_interval=12, count=True),
    "stable_adamw": lambda: spam_optax.stable_adamw(0.01, count=True),
    "adam_mini": lambda: spam_optax.adam_mini(0.01, count=True),
}
PREFIXES = {
    "chain": "spam_clip_nonfinite",
    "adaclip": "adaclip_nonfinite",
    "adagn": "adagn_nonfinite",
    "stabilizer": "stabilizer_nonfinite",
    "zclip": "zclip_nonfinite",
    "adagc": "adagc_nonfinite",
}
FAULTS = st.sampled_from(
    [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 2e19, -2e19, 1.84e19, 1e-45]
)
POSITIONS = st.tuples(
    st.integers(0, STEPS - 1),
    st.integers(0, SHAPE[0] - 1),
    st.integers(0, SHAPE[1] - 1),
)
SCATTERED = st.dictionaries(POSITIONS, FAULTS, min_size=1, max_size=40)


@functools.cache
def runner(name):
    tx = (MAKERS | COUPLED)[name]()

    @jax.jit
    def run(gradients):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            carry = optax.apply_updates(params, updates), state
            return carry, carry

        params = jnp.ones(SHAPE)
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    return run


def clean_gradients():
    rng = np.random.default_rng(0)
    return rng.standard_normal((STEPS, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("name", MAKERS)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(faults=SCATTERED)
def test_scattered_faults(name, faults):
    """Results are finite, other coordinates keep every bit, all faults are counted."""
    gradients = clean_gradients()
    touched = np.zeros(SHAPE, bool)
    for position, fault in faults.items():
        gradients[position] = fault
        touched[position[1:]] = True
    params, states = runner(name)(gradients)
    clean_params, clean_states = runner(name)(clean_gradients())

    for moment in ("mu", "nu"):
        ours, clean = (
            np.asarray(optax.tree.get(s, moment)).astype(np.float32)
            for s in (states, clean_states)
        )
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours[:, ~touched], clean[:, ~touched])
    assert np.isfinite(params).all()
    np.testing.assert_array_equal(
        np.asarray(params)[:, ~touched], np.asarray(clean_params)[:, ~touched]
    )

    with np.errstate(over="ignore"):
        expected = (~np.isfinite(np.square(gradients))).sum(axis=(1, 2))
    prefix = PREFIXES.get(name, "nonfinite")
    np.testing.assert_array_equal(optax.tree.get(states, f"{prefix}_count"), expected)
    np.testing.assert_array_equal(
        optax.tree.get(states, f"{prefix}_total"), expected.cumsum()
    )


@pytest.mark.parametrize("name", MAKERS | COUPLED)
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, 3e38])
def test_whole_gradient_not_finite_for_ten_steps(name, fault):
    """The ten steps include a reset and grace steps. Afterwards the run goes on."""
    gradients = clean_gradients()
    gradients[9:19] = fault
    params, states = runner(name)(gradients)
    assert np.isfinite(params).all()
    assert np.isfinite(np.asarray(optax.tree.get(states, "nu"), np.float32)).all()
    assert np.all(np.asarray(params[-1]) != np.asarray(params[18]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_gradients(dtype):
    """An infinite float16 gradient leaves `spam_clip` finite in float16."""
    tx = spam_optax.spam_clip(count=True, **SETTINGS)
    state = tx.init(jnp.zeros(2, dtype))
    update = jax.jit(tx.update)
    largest = jnp.finfo(dtype).max if dtype == "float16" else jnp.asarray(1e19, dtype)
    for t in range(8):
        g = jnp.array([1.0 if t < 7 else jnp.inf, largest if t < 7 else -jnp.inf])
        clipped, state = update(g.astype(dtype), state)
    assert np.isfinite(np.asarray(clipped, np.float32)).all()
    assert np.isfinite(np.asarray(state.clip_nu)).all()
    assert clipped[0] > 0 > clipped[1]
    assert int(state.spam_clip_nonfinite_count) == 2


def test_a_moment_stored_narrowly_saturates():
    """A gradient that float32 holds must not become an infinite float16 moment."""
    tx = spam_optax.spam(0.1, mu_dtype="float16")
    params = jnp.ones(2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(jnp.array([1.0, 1e7]), state, params)
        assert np.isfinite(np.asarray(updates)).all()
    assert optax.tree.get(state, "mu")[1] == jnp.finfo(jnp.float16).max


@pytest.mark.parametrize("name", ["spam", "chain", "spam_adam", *COUPLED])
def test_what_the_state_cannot_hold_counts_as_infinite(name):
    """A float64 gradient beside float32 parameters."""
    with jax.enable_x64(True):
        tx = (MAKERS | COUPLED)[name]()
        params = jnp.ones(2, jnp.float32)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(jnp.array([1.0, 1e100]), state, params)
        assert np.isfinite(updates).all()
        assert np.isfinite(optax.tree.get(state, "nu")).all()
        prefix = PREFIXES.get(name, "nonfinite")
        assert int(optax.tree.get(state, f"{prefix}_total")) == 3


@pytest.mark.parametrize("name", MAKERS | COUPLED)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scattered_faults_in_narrow_gradients(name, dtype):
    rng = np.random.default_rng(1)
    gradients = clean_gradients()
    hit = rng.random(gradients.shape) < 0.1
    gradients[hit] = rng.choice([np.nan, np.inf, -np.inf, 1.8e19, 6e4], hit.sum())
    with np.errstate(over="ignore"):
        narrow = gradients.astype(jnp.dtype(dtype))
        expected = (~np.isfinite(np.square(narrow.astype(np.float32)))).sum()
    params, states = runner(name)(jnp.asarray(narrow))
    assert np.isfinite(params).all()
    for moment in ("mu", "nu"):
        values = np.asarray(optax.tree.get(states, moment)).astype(np.float32)
        assert np.isfinite(values).all()
    prefix = PREFIXES.get(name, "nonfinite")
    assert int(optax.tree.get(states, f"{prefix}_total")[-1]) == expected


@pytest.mark.parametrize("name", ["spam", "stable_adamw", "adam_mini"])
def test_what_a_narrow_second_moment_cannot_hold_counts_as_infinite(name):
    """A float64 gradient of a float64 parameter, whose square float32 has not."""
    with jax.enable_x64(True):
        tx = getattr(spam_optax, name)(0.1, count=True, nu_dtype="float32")
        params = jnp.ones(2, jnp.float64)
        updates, state = tx.update(jnp.array([1.0, 1e30]), tx.init(params), params)
        assert updates[0] < -0.05 and updates[1] == 0
        assert (optax.tree.get(state, "nu") < 1).all()
        prefix = PREFIXES.get(name, "nonfinite")
        assert int(optax.tree.get(state, f"{prefix}_count")) == 1


def test_apply_if_finite_skips_the_whole_step():
    """`apply_if_finite` tests the gradients. One NaN leaves the state unchanged."""
    tx = optax.apply_if_finite(spam_optax.spam(0.1), max_consecutive_errors=2)
    params = jnp.ones(3)
    update = jax.jit(tx.update)
    _, state = update(jnp.ones(3), tx.init(params), params)
    updates, new_state = update(jnp.array([1.0, jnp.nan, 1.0]), state, params)
    np.testing.assert_array_equal(updates, jnp.zeros(3))
    jax.tree.map(
        np.testing.assert_array_equal, new_state.inner_state, state.inner_state
    )
