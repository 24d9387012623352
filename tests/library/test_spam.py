"""SPAM, compared with the authors' numbers and with the NumPy reference."""

import functools
import operator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import spam_optax
from golden_files import GOLDEN_HINT, load_golden, trajectory
from numpy_reference import Spam
from spam_optax._arithmetic import totals


def fused(learning_rate=1e-3, count=True, **kwargs):
    return spam_optax.spam(learning_rate, count=count, **kwargs)


def chained(learning_rate=1e-3, count=True, **kwargs):
    """Returns the chain, with each keyword passed to the half that takes it."""
    clip = {"threshold", "b2", "reset_interval", "grace_steps", "clip_unseen"}
    clip |= {"nu_dtype"}
    only_clip = clip - {"b2", "reset_interval", "nu_dtype"}
    return optax.chain(
        spam_optax.spam_clip(
            count=count, **{k: v for k, v in kwargs.items() if k in clip}
        ),
        spam_optax.spam_adam(
            learning_rate, **{k: v for k, v in kwargs.items() if k not in only_clip}
        ),
    )


def counter(state, name):
    """Returns a counter of `fused`, or of `chained`, where it has a prefix."""
    alone = optax.tree.get(state, f"spam_clip_{name}")
    return optax.tree.get(state, name) if alone is None else alone


BOTH = pytest.mark.parametrize("make", [fused, chained])


GOLDEN_CASES = pytest.mark.parametrize(
    ("name", "clip_unseen"),
    [
        ("spam_dense", False),
        ("spam_dense", True),
        ("spam_dense_rare_rows", True),
    ],
)


def check_against_golden(name, step, params, expected):
    for ours, theirs in zip(params, expected, strict=True):
        error = np.max(
            np.abs(ours - theirs[step]) / np.maximum(1, np.abs(theirs[step]))
        )
        hint = GOLDEN_HINT.format(name=name, error=error, step=step + 1)
        # Half a unit in the last place of a float32 near 1, which the files hold.
        assert error <= 2**-24, hint


@GOLDEN_CASES
def test_numpy_reference_equals_golden(name, clip_unseen):
    start, gradients, expected = load_golden(name)
    references = [
        Spam(p, theta=50.0, interval=50, warmup=15, grace=20, clip_unseen=clip_unseen)
        for p in start
    ]
    for t in range(130):
        params = [r.step(g[t]) for r, g in zip(references, gradients, strict=True)]
        check_against_golden(name, t, params, expected)


@BOTH
@GOLDEN_CASES
def test_equals_golden(make, name, clip_unseen):
    start, gradients, expected = load_golden(name)
    tx = make(
        threshold=50.0,
        reset_interval=50,
        warmup_steps=15,
        grace_steps=20,
        clip_unseen=clip_unseen,
    )
    params, _ = trajectory(tx, [jnp.asarray(p) for p in start], gradients)
    for t in range(130):
        check_against_golden(name, t, [np.asarray(p[t]) for p in params], expected)


def test_rows_with_late_first_gradients_are_trained():
    """The reference clips such rows to 0 until a reset, as `clip_unseen=True` does."""
    start, gradients, frozen = load_golden("spam_dense_rare_rows")
    tx = fused(threshold=50.0, reset_interval=50, warmup_steps=15)
    params, _ = trajectory(tx, [jnp.asarray(p) for p in start], gradients)
    seen_late = np.all(frozen[0][48] == start[0], axis=1)
    assert seen_late.sum() == 3
    moved = np.abs(np.asarray(params[0][48]) - start[0])
    assert np.all(moved[seen_late].max(axis=1) > 1e-3)


def spiky_gradients(steps, shape, seed, p_spike=0.01, scale=1000.0):
    """Returns gradients of drifting size with spikes and with rare coordinates."""
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(0.02 * rng.standard_normal((steps, 1, 1)), axis=0))
    gradients = rng.standard_normal((steps, *shape)) * drift
    gradients *= 1 + (scale - 1) * (rng.random((steps, *shape)) < p_spike)
    gradients[:, -1] *= (np.arange(steps) % 7 == 3)[:, None]
    return gradients.astype(np.float32)


MARCHES = {
    "defaults": dict(),
    "short window": dict(
        threshold=50.0, reset_interval=60, warmup_steps=25, grace_steps=10
    ),
    "window shorter than ramp": dict(
        threshold=100.0, reset_interval=40, warmup_steps=90, grace_steps=20
    ),
    "restarted correction": dict(
        threshold=500.0, reset_interval=100, restart_bias_correction=True
    ),
    "no reset": dict(threshold=200.0, reset_interval=None),
    "no grace": dict(threshold=5000.0, reset_interval=90, grace_steps=0),
    "unseen": dict(threshold=50.0, reset_interval=110, clip_unseen=True),
    "decay": dict(threshold=80.0, reset_interval=70, weight_decay=0.1),
    "other betas": dict(threshold=60.0, b1=0.0, b2=0.95, eps=1e-3, reset_interval=75),
}
PAPER_NAMES = {
    "threshold": "theta",
    "reset_interval": "interval",
    "warmup_steps": "warmup",
    "grace_steps": "grace",
    "restart_bias_correction": "restart",
    "weight_decay": "decay",
    "b1": "beta1",
    "b2": "beta2",
    "eps": "eps",
    "clip_unseen": "clip_unseen",
}
# The reference rounds in another order, so a moment may land on the neighbouring value
# of its dtype, and stay off by a few until the next reset; in bfloat16 that is 2**-8.
MOMENT_TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-5}


def march(make, settings, dtype="float32"):
    """Compares parameters, both moments and the counter in 620 steps with resets."""
    kwargs = MARCHES[settings]
    gradients = spiky_gradients(620, (6, 10), seed=len(settings))
    start = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    moment_dtype = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    reference = Spam(
        start,
        dtype=np.float32,
        moment_dtypes=(moment_dtype, moment_dtype),
        **{PAPER_NAMES[name]: value for name, value in kwargs.items()},
    )
    tx = make(mu_dtype=dtype, nu_dtype=dtype, **kwargs)
    params, states = trajectory(tx, jnp.asarray(start), gradients)
    mu, nu = (optax.tree.get(states, name) for name in ("mu", "nu"))
    assert mu.dtype == nu.dtype == jnp.dtype(dtype)
    ours = [np.asarray(x).astype(np.float64) for x in (mu, nu, params)]
    tolerance = MOMENT_TOLERANCE[dtype]
    spikes = []
    for t in range(620):
        reference.step(gradients[t])
        spikes.append(reference.spikes)
        expected_now = (reference.m, reference.v, reference.p)
        for x, expected in zip(ours, expected_now, strict=True):
            expected = np.asarray(expected).astype(np.float64)
            np.testing.assert_allclose(
                x[t],
                expected,
                rtol=tolerance,
                atol=tolerance * np.abs(expected).max(),
                err_msg=f"step {t + 1}",
            )
    assert sum(spikes) > 0
    if dtype == "float32":
        np.testing.assert_array_equal(counter(states, "clipped_count"), spikes)
    return params, states


@pytest.mark.one_python
@pytest.mark.parametrize("settings", MARCHES)
def test_marches_beside_the_numpy_reference(settings):
    """One second moment gives the same as two, to float32 rounding."""
    params, states = march(fused, settings)
    chain_params, chain_states = march(chained, settings)
    np.testing.assert_allclose(params, chain_params, rtol=1e-6, atol=1e-6)
    for name in ("mu", "nu", "clipped_count", "clipped_total"):
        ours, theirs = (counter(s, name) for s in (states, chain_states))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.one_python
@BOTH
@pytest.mark.parametrize("settings", ["short window", "restarted correction"])
def test_marches_with_bfloat16_moments(make, settings):
    march(make, settings, dtype="bfloat16")


def state_bytes(tx, params):
    return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))


def test_state_bytes():
    """`spam` keeps two moments and the chain three. Counters take 16 bytes."""
    params = {"kernel": jnp.zeros((256, 512)), "bias": jnp.zeros(512)}
    size = 4 * (256 * 512 + 512)
    assert state_bytes(spam_optax.spam(count=True), params) == 2 * size + 4 + 16
    assert state_bytes(spam_optax.spam(), params) == 2 * size + 4
    assert state_bytes(chained(), params) == 3 * size + 4 + 16 + 4
    half = spam_optax.spam(mu_dtype="bfloat16", nu_dtype=jnp.bfloat16)
    assert state_bytes(half, params) == size + 4


def test_state_of_bfloat16_parameters_is_float32():
    """In bfloat16 a second moment stalls, because 0.999 * v rounds back to v."""
    params = jnp.ones(8, jnp.bfloat16)
    for make in (fused, chained):
        gradients = jnp.zeros((201, 8), jnp.bfloat16).at[0].set(1)
        _, states = trajectory(make(reset_interval=None), params, gradients)
        nu = optax.tree.get(states, "nu")
        assert nu.dtype == jnp.float32
        np.testing.assert_allclose(nu[-1], 1e-3 * 0.999**200, rtol=1e-5)


@BOTH
def test_default_arguments(make):
    params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
    tx = (
        make()
        if make is fused
        else optax.chain(spam_optax.spam_clip(), spam_optax.spam_adam())
    )
    gradients = jax.tree.map(jnp.ones_like, params)
    updates = tx.update(gradients, tx.init(params))[0]
    new_params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new_params["w"], 1 - 1e-3, rtol=1e-6)


@BOTH
def test_first_steps_are_adams(make):
    """Until the first reset and without spikes, SPAM is Adam with its eps inside."""
    gradients = np.random.default_rng(1).standard_normal((200, 50)).astype(np.float32)
    ours, _ = trajectory(make(1e-2, eps=1e-12), jnp.ones(50), gradients)
    adams, _ = trajectory(optax.adam(1e-2, eps=1e-12), jnp.ones(50), gradients)
    np.testing.assert_allclose(ours, adams, atol=2e-5)


@pytest.mark.parametrize(
    ("restart", "mean", "peak"), [(False, 1.87, 2.73), (True, 1.0, 1.0)]
)
def test_effective_step_after_a_reset(restart, mean, peak):
    """The published step is 1.87 times Adam's on average and 2.73 times at most."""
    tx = spam_optax.spam_adam(
        1.0, eps=1e-12, warmup_steps=150, restart_bias_correction=restart
    )
    update = lambda state, g: tx.update(g, state)[::-1]  # noqa: E731
    # With a gradient of 1, Adam's step is 1.
    _, updates = jax.lax.scan(update, tx.init(jnp.zeros(())), jnp.ones(9999))
    late = -np.asarray(updates)[-500:]
    ramp = spam_optax.functional.reset_ramp(jnp.arange(500, 1000), 500, 150)
    if restart:
        np.testing.assert_allclose(late, ramp, rtol=1e-3)
    else:
        assert abs(late.mean() - mean) < 0.01
        assert abs(late.max() - peak) < 0.01
        assert late.argmax() == 135


# The table of design rules: what becomes of a coordinate, a dtype, a decay.


def states_around(make, step, gradient, **kwargs):
    """Returns the states before and after a step with `gradient`."""
    gradients = np.random.default_rng(5).standard_normal((step, 4))
    gradients[-1] = gradient
    tx = make(**kwargs)
    _, states = trajectory(tx, jnp.zeros(4), gradients.astype(np.float32))
    return tuple(jax.tree.map(operator.itemgetter(t), states) for t in (-2, -1))


@BOTH
@pytest.mark.parametrize("bad", [np.inf, -np.inf, 3e38, -1e20])
def test_overflow_is_clipped_to_the_limit(make, bad):
    """An infinite coordinate, or one whose square overflows, becomes the clip limit."""
    gradient = np.array([bad, 0.5, -0.5, 0.25])
    before, after = states_around(make, 50, gradient, threshold=100.0)
    nu = optax.tree.get(before, "nu")[0]
    limit = np.sign(bad) * np.sqrt(100.0 * nu)
    mu = optax.tree.get(before, "mu")[0]
    np.testing.assert_allclose(
        optax.tree.get(after, "mu")[0], 0.9 * mu + 0.1 * limit, rtol=1e-5
    )
    assert int(counter(after, "nonfinite_count")) == 1
    assert int(counter(after, "clipped_count")) == 0


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
def test_overflow_in_the_grace_window_is_dropped(make, bad):
    gradient = np.array([bad, 0.5, -0.5, 0.25])
    before, after = states_around(make, 10, gradient)
    mu = optax.tree.get(before, "mu")[0]
    np.testing.assert_allclose(optax.tree.get(after, "mu")[0], 0.9 * mu, rtol=1e-6)
    assert int(counter(after, "nonfinite_count")) == 1


@BOTH
def test_nan_is_dropped_where_clipping_is_active(make):
    gradient = np.array([np.nan, 0.5, -0.5, 0.25])
    before, after = states_around(make, 50, gradient)
    mu = optax.tree.get(before, "mu")[0]
    np.testing.assert_allclose(optax.tree.get(after, "mu")[0], 0.9 * mu, rtol=1e-6)
    assert int(counter(after, "nonfinite_count")) == 1


@BOTH
@pytest.mark.parametrize("clip_unseen", [False, True])
def test_coordinate_without_history(make, clip_unseen):
    """A coordinate with v == 0 passes unclipped, unless `clip_unseen`."""
    tx = make(clip_unseen=clip_unseen)
    gradients = np.ones((41, 3)) * [1.0, 0.0, 0.0]
    gradients[40] = [1.0, 1e6, np.inf]
    _, states = trajectory(tx, jnp.zeros(3), gradients.astype(np.float32))
    mu = optax.tree.get(states, "mu")[-1]
    np.testing.assert_allclose(mu[1], 0.0 if clip_unseen else 1e5, rtol=1e-6)
    assert mu[2] == 0
    assert int(counter(states, "clipped_count")[-1]) == int(clip_unseen)
    assert int(counter(states, "nonfinite_count")[-1]) == 1


@BOTH
def test_zero_gradients(make):
    """At the start the update is 0, and later that of the moments. It is never NaN."""
    gradients = jnp.array([[0.0], [1.0], [0.0], [0.0], [-2.0], [0.0]])
    ours, _ = trajectory(make(0.1, eps=1e-12), jnp.ones(1), gradients)
    adams, _ = trajectory(optax.adam(0.1, eps=1e-12), jnp.ones(1), gradients)
    assert ours[0] == 1
    np.testing.assert_allclose(ours, adams, rtol=1e-5)


@BOTH
def test_zero_gradients_over_a_reset(make):
    """Nothing moves when the moments are 0 too."""
    tx = make(0.1, reset_interval=5, grace_steps=2, warmup_steps=2)
    gradients = jnp.zeros((12, 1)).at[:4].set(1)
    params, _ = trajectory(tx, jnp.ones(1), gradients)
    assert params[3] < 0.7
    np.testing.assert_array_equal(params[4:], jnp.full((8, 1), params[3, 0]))


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_weight_decay_is_decoupled_and_not_ramped(make, masked):
    """With zero gradients p shrinks by lr * decay in every step, also in the ramp."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    mask = {"a": True, "b": False} if masked else None
    tx = make(
        0.1,
        weight_decay=0.5,
        mask=mask,
        reset_interval=4,
        warmup_steps=3,
        grace_steps=1,
    )
    params, _ = trajectory(tx, params, {"a": np.zeros((9, 2)), "b": np.zeros((9, 2))})
    expected = np.repeat(0.95 ** np.arange(1, 10)[:, None], 2, axis=1)
    np.testing.assert_allclose(params["a"], expected, rtol=1e-5)
    np.testing.assert_allclose(params["b"], np.where(masked, 1, expected), rtol=1e-5)


@BOTH
def test_weight_decay_needs_parameters_and_zero_does_not(make):
    tx = make(weight_decay=0.1)
    state = tx.init(jnp.ones(2))
    with pytest.raises(ValueError, match="params"):
        tx.update(jnp.ones(2), state)
    tx = make(weight_decay=0.0)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_update_dtype(make, dtype):
    """Updates have the parameter's dtype, or without parameters the gradient's."""
    params, gradients = jnp.ones(3, dtype), jnp.ones(3, jnp.float32)
    tx = make()
    state = tx.init(params)
    assert tx.update(gradients, state, params)[0].dtype == jnp.dtype(dtype)
    assert tx.update(gradients, state)[0].dtype == jnp.float32
    assert tx.update(gradients.astype(dtype), state)[0].dtype == jnp.dtype(dtype)


def test_clip_keeps_the_gradients_dtype():
    """float32 gradients of float16 parameters must not overflow in the clip."""
    params = jnp.ones(3, jnp.float16)
    tx = spam_optax.spam_clip()
    gradients = jnp.full(3, 1e6, jnp.float32)
    clipped, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_array_equal(clipped, gradients)


@BOTH
@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_complex(make, mu_dtype):
    """Clipping keeps the phase. The first moment is complex, and the second is real."""
    rng = np.random.default_rng(2)
    params = jnp.zeros(3, jnp.complex64)
    tx = make(threshold=100.0, mu_dtype=mu_dtype)
    gradients = rng.standard_normal((41, 3)) + 1j * rng.standard_normal((41, 3))
    gradients[40] = [3e4 + 4e4j, complex(np.nan, 1), complex(np.inf, 0)]
    params, states = trajectory(tx, params, gradients.astype(np.complex64))
    before, state = (jax.tree.map(operator.itemgetter(t), states) for t in (39, 40))
    limit = np.sqrt(100 * np.asarray(optax.tree.get(before, "nu")))
    mu_before, mu = (np.asarray(optax.tree.get(x, "mu")) for x in (before, state))
    entered = (mu - 0.9 * mu_before) / 0.1
    np.testing.assert_allclose(entered[0], limit[0] * (0.6 + 0.8j), rtol=1e-3)
    np.testing.assert_allclose(entered[1], 0, atol=1e-4)
    np.testing.assert_allclose(entered[2], limit[2], rtol=1e-3)
    assert int(counter(state, "clipped_count")) == 1
    assert int(counter(state, "nonfinite_count")) == 2
    assert mu.dtype == jnp.complex64
    assert optax.tree.get(state, "nu").dtype == jnp.float32
    assert np.isfinite(np.asarray(params)).all()


@BOTH
def test_multi_steps_counts_optimizer_steps(make):
    """Intervals count optimizer steps. Accumulation changes nothing else."""
    tx = make(0.1, reset_interval=6, warmup_steps=3, grace_steps=2)
    multi = optax.MultiSteps(tx, every_k_schedule=3)
    micro = spiky_gradients(60, (2, 3), seed=9)
    ours, _ = trajectory(tx, jnp.ones((2, 3)), micro.reshape(20, 3, 2, 3).mean(axis=1))
    accumulated, _ = trajectory(multi, jnp.ones((2, 3)), micro)
    np.testing.assert_allclose(accumulated[2::3], ours, rtol=2e-4, atol=1e-6)


@BOTH
def test_multi_steps_drops_a_coordinate_that_was_nan_once(make):
    multi = optax.MultiSteps(make(0.1), every_k_schedule=2)
    gradients = jnp.array([[1.0, jnp.nan], [1.0, 1.0]])
    params, states = trajectory(multi, jnp.ones(2), gradients)
    np.testing.assert_allclose(params[-1], [0.9, 1.0], rtol=1e-4)
    assert int(counter(states, "nonfinite_count")[-1]) == 1


def test_spam_adam_alone_drops_what_is_not_finite():
    tx = spam_optax.spam_adam(0.1, count=True)
    gradients = jnp.tile(jnp.array([1.0, jnp.nan, jnp.inf, 1e30]), (3, 1))
    params, states = trajectory(tx, jnp.ones(4), gradients)
    np.testing.assert_allclose(params[-1], [0.7, 1, 1, 1], rtol=1e-4)
    np.testing.assert_array_equal(optax.tree.get(states, "nonfinite_count"), [3, 3, 3])
    np.testing.assert_array_equal(optax.tree.get(states, "nonfinite_total"), [3, 6, 9])


def test_totals_saturate():
    tx = spam_optax.spam(count=True)
    params = jnp.ones(4)
    state = tx.init(params)
    largest = np.iinfo(np.int32).max
    state = optax.tree.set(state, nonfinite_total=jnp.int32(largest - 2))
    for _ in range(2):
        _, state = tx.update(jnp.full(4, jnp.nan), state, params)
        assert int(optax.tree.get(state, "nonfinite_total")) == largest


@pytest.mark.parametrize("devices", [1, 8])
def test_counts_of_many_coordinates(monkeypatch, devices):
    """Counts are exact up to 2**24, as in float32. Larger counts are at least 2**24."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    count = jax.jit(lambda *masks: totals(*masks))
    mask = jnp.ones((4096, 4096), bool)
    assert [int(n) for n in count(mask, ~mask)] == [2**24, 0]
    assert int(count(mask.at[17, 5].set(False))[0]) == 2**24 - 1
    assert int(count(jnp.ones((4097, 4096), bool))[0]) >= 2**24
    assert [int(n) for n in count(jnp.asarray(True), jnp.asarray(False))] == [1, 0]


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("counted", [True, False])
def test_a_step_is_made_in_place_on_a_cpu(monkeypatch, counted):
    """There are no temporaries, such as a copy of the second moment or its root."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    tx = spam_optax.spam(1e-3, count=counted, weight_decay=0.1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = {"a": jnp.ones((512, 512)), "b": jnp.ones((512, 512))}
    compiled = step.lower(params, tx.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096


def test_gradients_within_their_limit_pass_bit_for_bit():
    """The limit comes from the new moment and is rounded. It must not cut these."""
    tx = spam_optax.spam_clip(2500.0, grace_steps=1, count=True)
    history = jnp.linspace(1.0, 2.0, 4096)
    _, state = tx.update(history, tx.init(history))
    limit = np.sqrt(np.float32(2500) * np.asarray(state.clip_nu))
    gradient = np.nextafter(limit, 0) * np.float32(1 - 1e-7)
    clipped, state = jax.jit(tx.update)(gradient, state)
    assert int(state.spam_clip_clipped_count) == 0
    np.testing.assert_array_equal(clipped, gradient)


@BOTH
def test_every_statistic_is_found_by_name(make):
    """`optax.tree.get` raises when a name occurs twice."""
    tx = spam_optax.track_spikes(make(optax.constant_schedule(0.1)))
    state = tx.init({"w": jnp.ones(2)})
    names = ["mu", "nu"]
    names += ["tensor_spike_score", "tensor_nonfinite"]
    if make is chained:
        names += ["clip_step", "clip_nu"]
    for name in names:
        assert optax.tree.get(state, name) is not None, name


def test_reset_interval_none_never_resets():
    gradients = (np.arange(700.0) % 5)[:, None]
    never, late = (
        trajectory(spam_optax.spam_adam(0.1, reset_interval=d), jnp.ones(1), gradients)
        for d in (None, 10_000)
    )
    np.testing.assert_array_equal(never[0], late[0])


@pytest.mark.parametrize("make", [spam_optax.spam_clip, spam_optax.scale_by_spam])
def test_an_injected_threshold_may_be_infinite(make):
    """It clips nothing, as a very large one does."""

    def run(threshold):
        tx = spam_optax.inject_hyperparams(make)(grace_steps=2, count=True)
        state = tx.init(jnp.ones(2))
        state.hyperparams["threshold"] = jnp.asarray(threshold)
        for size in (1.0, 1.0, 1.0, 1e4, 1.0):
            updates, state = tx.update(jnp.full(2, size), state, jnp.ones(2))
            yield updates

    for infinite, large in zip(run(jnp.inf), run(1e30), strict=True):
        assert np.isfinite(infinite).all() and infinite.all()
        np.testing.assert_allclose(infinite, large, rtol=1e-6)
