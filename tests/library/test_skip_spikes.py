"""Skipped steps: the rule compared with NumPy, and mistakes of similar programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spam_optax
from numpy_guards import SkipSpikes
from spam_optax import SkipReason, functional

pytestmark = pytest.mark.one_python

QUICK = dict(window=16, min_history=4, max_consecutive=3)


def run(tx, losses, norms, params=None, **extra):
    """Runs over the losses and norms. Returns the states and the parameters."""
    params = jnp.ones(2) if params is None else params
    state = tx.init(params)

    def step(carry, now):
        params, state = carry
        loss, norm = now
        given = {} if losses is None else {"value": loss}
        gradient = jax.tree.map(lambda p: norm * jnp.ones_like(p), params)
        gradient = jax.tree.map(lambda g: g / jnp.sqrt(1.0 * g.size), gradient)
        updates, state = tx.update(gradient, state, params, **given, **extra)
        return (optax.apply_updates(params, updates), state), (state, params)

    pairs = jnp.asarray(norms if losses is None else losses), jnp.asarray(norms)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, pairs))
    return scan((params, state))[1]


def series(steps, seed=0):
    """Returns falling losses and heavy-tailed norms, some of them not finite."""
    rng = np.random.default_rng(seed)
    losses = 3 * np.exp(-np.arange(steps) / steps) + 0.02 * rng.standard_normal(steps)
    norms = np.exp(0.4 * rng.standard_t(4, steps))
    losses[rng.random(steps) < 0.02] += 1.5
    norms[rng.random(steps) < 0.02] *= 30
    losses[steps // 2 : steps // 2 + 20] += 4  # a level of its own
    losses[[steps // 3, steps // 3 + 1]] = np.nan
    norms[[steps // 4, steps // 4 + 7]] = np.inf, np.nan
    return losses.astype(np.float32), norms.astype(np.float32)


SETTINGS = {
    "defaults": {},
    "quick": QUICK,
    "published": dict(robust=False, window=32, min_history=16),
    "odd window": dict(window=7, min_history=2, sigma=2.0, max_consecutive=1),
    "no shares": dict(loss_share=0.0, norm_share=0.0, window=50),
}


@pytest.mark.parametrize("watch_loss", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_marches_beside_the_numpy_reference(name, watch_loss):
    losses, norms = series(400)
    tx = spam_optax.skip_spikes(optax.adam(0.01), **SETTINGS[name])
    states, _ = run(tx, losses if watch_loss else None, norms)
    reference = SkipSpikes(**SETTINGS[name])
    expected = [
        reference.step(float(loss) if watch_loss else None, float(norm))
        for loss, norm in zip(losses, norms, strict=True)
    ]
    np.testing.assert_array_equal(states.skip_reason, expected)
    assert int(states.skipped_total[-1]) == np.count_nonzero(expected) > 0
    logs = (losses, norms) if watch_loss else (None, norms)
    np.testing.assert_array_equal(
        functional.spike_steps(*logs, **SETTINGS[name]), expected
    )
    assert len(set(expected)) > (3 if watch_loss else 2)


def test_a_skipped_step_leaves_every_bit_of_the_inner_state():
    tx = spam_optax.skip_spikes(spam_optax.spam(0.1, reset_interval=30), **QUICK)
    losses, norms = np.full(40, 3.0), np.ones(40)
    losses[20], norms[25], losses[30], norms[35] = 9.0, 50.0, np.nan, np.inf
    states, params = run(tx, losses, norms)
    kept = [i for i in range(40) if i not in (20, 25, 30, 35)]
    plain = spam_optax.skip_spikes(spam_optax.spam(0.1, reset_interval=30), **QUICK)
    expected, _ = run(plain, losses[kept], norms[kept])
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x[-1], y[-1]),
        states.inner_state,
        expected.inner_state,
    )
    reasons = np.asarray(states.skip_reason)[[20, 25, 30, 35]]
    np.testing.assert_array_equal(reasons, [1, 2, 4, 8])


def test_a_skipped_gradient_that_is_not_finite_reaches_no_parameter():
    """Multiplying a skipped update by 0 would not help, because 0 times NaN is NaN."""
    tx = spam_optax.skip_spikes(optax.adam(0.1), **QUICK)
    params = jnp.ones(3)
    state, update = tx.init(params), jax.jit(tx.update)
    bad = jnp.array([jnp.nan, jnp.inf, 1.0])
    updates, new = update(bad, state, params, value=1.0)
    np.testing.assert_array_equal(updates, 0)
    jax.tree.map(np.testing.assert_array_equal, new.inner_state, state.inner_state)
    assert int(new.skip_reason) == SkipReason.NORM_NONFINITE


def test_one_loss_that_is_not_finite_costs_one_step():
    """A program that stores the NaN would skip every step of the next window."""
    losses, norms = np.full(200, 3.0), np.ones(200)
    losses[50] = np.nan
    states, _ = run(spam_optax.skip_spikes(optax.sgd(0.1)), losses, norms)
    assert int(states.skipped_total[-1]) == 1


def test_a_spike_does_not_hide_the_next_one():
    """By mean and standard deviation a loss of 9 would hide one of 5 soon after it."""
    rng = np.random.default_rng(0)
    losses = 3 + 0.02 * rng.standard_normal(100)
    losses[60], losses[65] = 9.0, 5.0
    skipped = {}
    for robust in (True, False):
        tx = spam_optax.skip_spikes(optax.sgd(0.1), window=32, robust=robust)
        states, _ = run(tx, losses, np.ones(100))
        skipped[robust] = np.flatnonzero(states.skip_reason).tolist()
    assert skipped == {True: [60, 65], False: [60]}


def test_low_values_are_no_spikes():
    losses, norms = np.full(100, 3.0), np.ones(100)
    losses[60:], norms[60:] = 0.1, 1e-3
    states, _ = run(spam_optax.skip_spikes(optax.sgd(0.1)), losses, norms)
    assert int(states.skipped_total[-1]) == 0


def test_a_permanent_rise_skips_only_a_few_steps():
    losses = np.r_[np.full(60, 2.0), np.full(60, 4.0)]
    tx = spam_optax.skip_spikes(optax.sgd(0.1), **QUICK)
    states, _ = run(tx, losses, np.ones(120))
    np.testing.assert_array_equal(np.flatnonzero(states.skip_reason), [60, 61, 62])
    assert int(states.history.skip_loss_count[-1]) == 57
    np.testing.assert_array_equal(
        states.history.skipped_in_a_row[59:64], [0, 1, 2, 3, 0]
    )


def test_steps_that_are_not_finite_are_never_accepted():
    losses = np.r_[np.full(20, 2.0), np.full(50, np.nan)]
    tx = spam_optax.skip_spikes(optax.sgd(0.1), **QUICK)
    states, _ = run(tx, losses, np.ones(70))
    assert int(states.skipped_total[-1]) == 50


def test_the_names_under_which_trainers_pass_the_loss():
    """MaxText and Levanter pass `loss` and more. Optax's own wrappers take `value`."""
    tx = spam_optax.skip_spikes(optax.adam(0.1), **QUICK)
    params = jnp.ones(2)
    state = tx.init(params)
    _, by_value = tx.update(params, state, params, value=2.0)
    _, by_loss = tx.update(
        params, state, params, loss=2.0, grad_norm=7.0, obj_fn=len, grams=None
    )
    assert by_value.history.skip_losses[0] == by_loss.history.skip_losses[0] == 2
    assert by_loss.history.skip_norms[0] == 7
    np.testing.assert_allclose(by_value.history.skip_norms[0], np.sqrt(2), rtol=1e-6)
    with pytest.raises(ValueError, match="skip_spikes: .* got both"):
        tx.update(params, state, params, value=1.0, loss=1.0)
    with pytest.raises(TypeError, match="skip_spikes: value must be a real scalar"):
        tx.update(params, state, params, value=jnp.ones(2))
    with pytest.raises(TypeError, match="skip_spikes: value must be a real scalar"):
        tx.update(params, state, params, value=jax.random.key(0))
    strict = spam_optax.skip_spikes(optax.adam(0.1), needs_loss=True, **QUICK)
    with pytest.raises(ValueError, match="skip_spikes: update needs the loss"):
        strict.update(params, state, params)


def test_the_inner_transformation_gets_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = spam_optax.skip_spikes(inner)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=1.0, other=3)
    assert seen == {"value": 1.0, "other": 3}


def test_nnx_optimizer_passes_the_loss_on():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = spam_optax.skip_spikes(optax.adam(0.1), **QUICK)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = nnx.grad(lambda m: m(jnp.ones(2)).sum())(model)
    optimizer.update(model, gradients, value=jnp.asarray(2.5))
    assert optimizer.opt_state.history.skip_losses[0] == 2.5


def test_the_wrapper_can_be_added_and_removed_at_any_step():
    inner, params = optax.adam(0.1), jnp.ones(2)
    _, old = inner.update(params, inner.init(params), params)
    tx = spam_optax.skip_spikes(inner)
    state = tx.init(params)._replace(inner_state=old)
    updates, state = tx.update(params, state, params, value=1.0)
    expected, after = inner.update(params, old, params)
    np.testing.assert_array_equal(updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, after)


def test_multi_steps_gives_it_the_accumulated_gradient_and_the_last_loss():
    tx = optax.MultiSteps(spam_optax.skip_spikes(optax.sgd(0.1)), every_k_schedule=2)
    params = jnp.zeros(1)
    state = tx.init(params)
    for loss, g in ((1.0, 3.0), (2.0, 5.0)):
        _, state = tx.update(jnp.array([g]), state, params, value=loss)
    inner = state.inner_opt_state
    assert inner.history.skip_losses[0] == 2 and inner.history.skip_norms[0] == 4


def test_multi_steps_needs_to_leave_out_gradients_that_are_not_finite():
    """Otherwise they stay in its sum, and every later step is skipped."""
    params = jnp.zeros(1)
    for skip, reason in (
        ({}, 8),
        ({"should_skip_update_fn": optax.skip_not_finite}, 0),
    ):
        tx = optax.MultiSteps(spam_optax.skip_spikes(optax.sgd(0.1)), 2, **skip)
        state = tx.init(params)
        for g in (1.0, 1.0, jnp.nan, 1.0, 1.0, 1.0, 1.0, 1.0):
            _, state = tx.update(jnp.array([g]), state, params)
        assert state.inner_opt_state.skip_reason == reason


def test_statistics_have_names_of_their_own():
    tx = spam_optax.skip_spikes(
        optax.chain(spam_optax.spam_clip(count=True), spam_optax.spam_adam(0.1))
    )
    state = tx.init(jnp.ones(2))
    fields = spam_optax.StepHistory._fields
    for name in (*fields, "skip_reason", "skipped_total"):
        assert optax.tree.get(state, name) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes_and_structure_stay(dtype):
    tx = spam_optax.skip_spikes(spam_optax.sparse_spam(0.1), **QUICK)
    params = {"kernel": jnp.ones((8, 4), dtype), "bias": None}
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state, params, value=jnp.float32(1))
    assert updates["kernel"].dtype == dtype
    same = lambda x, y: x.shape == y.shape and x.dtype == y.dtype  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, state, new))


@functools.cache
def update_of(window):
    tx = spam_optax.skip_spikes(optax.sgd(0.1), window)
    return tx, jax.jit(tx.update)


def test_the_window_keeps_the_last_values():
    tx, update = update_of(32)
    state = tx.init(jnp.ones(1))
    for i in range(40):
        _, state = update(jnp.ones(1), state, value=1.0 + i / 1000)
    newest = np.sort(np.asarray(state.history.skip_losses))
    np.testing.assert_allclose(newest, 1 + np.arange(8, 40) / 1000, rtol=1e-6)
