"""Stable-SPAM, its parts and its successor: NumPy and the authors' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spam_optax
from golden_files import GOLDEN_HINT, load_golden, trajectory
from numpy_stable_spam import AdaClip, AdaGN, GradientStabilizer, StableSpam

pytestmark = pytest.mark.one_python

STEPS = 130
GOLDEN_SETTINGS = {
    "stable_spam": dict(gamma1=0.7, gamma2=0.9, gamma3=0.999),
    "stable_spam_decayed": dict(
        gamma1=0.85, gamma2=0.99999, gamma3=0.999, total_steps=STEPS
    ),
}
PIECES = {
    "adaclip": (
        functools.partial(spam_optax.adaclip, gamma3=0.9, count=True),
        AdaClip(0.9),
    ),
    "adagn": (functools.partial(spam_optax.adagn, count=True), AdaGN()),
    "gradient_stabilizer": (
        functools.partial(spam_optax.gradient_stabilizer, count=True),
        GradientStabilizer(),
    ),
}
EVERY_PIECE = pytest.mark.parametrize("name", PIECES)


def make_pieces(name):
    """Returns the transformation and a NumPy version of it for each of `n` tensors."""
    make, twin = PIECES[name]
    return make(), lambda n: [type(twin)(**vars_of(twin)) for _ in range(n)]


def vars_of(twin):
    return {name: getattr(twin, name) for name in twin.__dataclass_fields__}


def spiky_gradients(steps=STEPS, shape=(5, 7), seed=0):
    """Returns gradients with spikes of 1000 x, zeros and non-finite steps."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((steps, *shape)) * np.exp(
        np.cumsum(0.05 * rng.standard_normal((steps, 1, 1)), axis=0)
    )
    gradients[rng.random((steps, *shape)) < 0.005] *= 1000
    gradients[::17] *= 300
    gradients[40:43] = 0
    gradients[60:62, 1] = np.nan
    gradients[77, -1, -1] = np.inf
    gradients[78:80] = np.nan
    gradients[81, 0] = 3e38
    return gradients.astype(np.float32)


# ----------------------------------------------------------------------------- golden


def check_against_golden(name, step, params, expected):
    for ours, theirs in zip(params, expected, strict=True):
        size = np.maximum(1, np.abs(theirs[step]))
        error = np.max(np.abs(ours - theirs[step]) / size)
        # Two units in the last place of a float32 near 1, which the files hold.
        hint = GOLDEN_HINT.format(name=name, error=error, step=step + 1)
        assert error <= 2**-22, hint


@pytest.mark.parametrize("name", GOLDEN_SETTINGS)
def test_numpy_reference_equals_golden(name):
    start, gradients, expected = load_golden(name)
    settings = dict(GOLDEN_SETTINGS[name])
    total = settings.pop("total_steps", None)
    references = [
        StableSpam(p, interval=50, total=total, reference_resets=True, **settings)
        for p in start
    ]
    for t in range(STEPS):
        params = [r.step(g[t]) for r, g in zip(references, gradients, strict=True)]
        check_against_golden(name, t, params, expected)


def test_default_resets_differ_from_the_reference_only_from_the_first_reset_on():
    start, gradients, expected = load_golden("stable_spam")
    params, _ = trajectory(
        spam_optax.stable_spam(reset_interval=50),
        [jnp.asarray(p) for p in start],
        gradients,
    )
    for t in range(49):
        check_against_golden(
            "stable_spam", t, [np.asarray(p[t]) for p in params], expected
        )
    assert np.max(np.abs(np.asarray(params[0][49]) - expected[0][49])) > 1e-4


# ------------------------------------------------------------------------------ NumPy

MARCHES = {
    "defaults": dict(),
    "resets": dict(reset_interval=30),
    "decayed past its end": dict(reset_interval=50, total_steps=90),
    "no resets": dict(reset_interval=None, gamma1=0.85, gamma2=0.99999),
    "weight decay": dict(reset_interval=40, weight_decay=0.1),
    "other decays": dict(b1=0.0, b2=0.95, eps=1e-3, gamma3=0.5, reset_interval=45),
}
RENAMED = {
    "b1": "beta1",
    "b2": "beta2",
    "reset_interval": "interval",
    "total_steps": "total",
    "weight_decay": "decay",
}


@pytest.mark.parametrize("case", MARCHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_numpy(case, dtype):
    """The run has resets, spikes, zeros and non-finite gradients."""
    settings = MARCHES[case]
    gradients = jnp.asarray(spiky_gradients(), dtype)
    rng = np.random.default_rng(1)
    start = jnp.asarray(rng.standard_normal((5, 7)), dtype)
    tx = spam_optax.stable_spam(1e-2, **settings)
    twin_settings = {RENAMED.get(k, k): v for k, v in settings.items()}
    twin = StableSpam(np.asarray(start, np.float64), eta=1e-2, **twin_settings)
    params, updates = march(tx, start, gradients)
    # An update, of about the learning rate, is rounded three times on its way.
    tolerance = 2e-5 if dtype == "float32" else 3 * 2**-8
    for t, g in enumerate(np.asarray(gradients, np.float32)):
        before = twin.p = params[t]  # bfloat16 rounds it every step
        decayed = twin.eta * twin.decay * np.max(np.abs(before))
        np.testing.assert_allclose(
            updates[t],
            twin.step(g) - before,
            rtol=tolerance,
            atol=1e-6 + tolerance * decayed,  # what is added may cancel
            err_msg=f"step {t + 1}",
        )


def march(tx, params, gradients):
    """Returns the parameters before every step and its update, in float64."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), (params, updates)

    scan = jax.jit(lambda carry, gs: jax.lax.scan(step, carry, gs)[1])
    results = scan((params, tx.init(params)), gradients)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), results)


@EVERY_PIECE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_equal_numpy(name, dtype):
    tx, twins = make_pieces(name)
    tensors = {"a": spiky_gradients(seed=2), "b": spiky_gradients(shape=(3, 2), seed=3)}
    gradients = jax.tree.map(lambda x: jnp.asarray(x, dtype), tensors)
    references = dict(zip(tensors, twins(2), strict=True))
    _, ours = march(tx, jax.tree.map(lambda x: x[0], gradients), gradients)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    for key, reference in references.items():
        for t, g in enumerate(np.asarray(gradients[key], np.float32)):
            expected = reference.step(g)
            np.testing.assert_allclose(
                ours[key][t],
                expected,
                rtol=tolerance,
                atol=1e-9 * np.max(np.abs(expected), initial=1),
                err_msg=f"{key}, step {t + 1}",
            )


def test_pieces_chained_are_stable_spam():
    """They agree until the first reset, where `stable_spam` restarts Adam's counter."""
    params = {"a": jnp.ones((5, 7)), "b": jnp.zeros((3, 2))}
    chain = optax.chain(
        spam_optax.adaclip(count=True), spam_optax.adagn(), optax.adam(1e-3, eps=1e-8)
    )
    fused = spam_optax.stable_spam(1e-3)
    gradients = {
        "a": spiky_gradients(seed=2)[:40],
        "b": spiky_gradients(shape=(3, 2), seed=3)[:40],
    }
    ours, _ = trajectory(fused, params, gradients)
    theirs, state = trajectory(chain, params, gradients)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        ours,
        theirs,
    )
    assert int(optax.tree.get(state, "adaclip_clipped_total")[-1]) > 0


# ------------------------------------------------------------------------ what is rare


def statistics(state):
    """Returns the float vectors of a state."""
    return [x for x in jax.tree.leaves(state) if x.ndim == 1]


ALL = {name: make for name, (make, _) in PIECES.items()} | {
    "scale_by_stable_spam": lambda: spam_optax.scale_by_stable_spam(count=True)
}


@pytest.mark.parametrize("name", ALL)
def test_zero_gradients_give_zero_updates(name):
    tx = ALL[name]()
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(optax.tree.zeros_like(params), state, params)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), updates)
    updates, state = update(params, state, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("name", ALL)
def test_tiny_gradients_give_finite_updates(name):
    """Their means underflow, and the next gradient is of the usual size."""
    tx = ALL[name]()
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    update = jax.jit(tx.update)
    for size in np.logspace(-45, -20, 26):
        state = tx.init(params)
        for factor in (size, size, 1.0, size):
            g = jax.tree.map(lambda x, y=factor: np.float32(y) * x, params)
            updates, state = update(g, state, params)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("first", [True, False])
def test_a_tensor_without_a_finite_coordinate_leaves_its_statistics(name, fault, first):
    """The statistics of the other tensor change."""
    tx = ALL[name]()
    params = {"bad": jnp.ones((3, 1)), "good": jnp.ones((2, 1))}
    state, update = tx.init(params), jax.jit(tx.update)
    if not first:
        _, state = update(params, state, params)
    g = {"bad": jnp.full((3, 1), fault), "good": 2 * jnp.ones((2, 1))}
    updates, new_state = update(g, state, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, new_state)))
    assert np.all(updates["good"] != 0)
    for before, after in zip(statistics(state), statistics(new_state), strict=True):
        assert before[0] == after[0]
        assert before[1] != after[1]
    count = [k for k in new_state._fields if k.endswith("nonfinite_count")]
    assert int(getattr(new_state, count[0])) == 3


@pytest.mark.parametrize("name", ["adagn", "gradient_stabilizer"])
def test_norms_that_overflow(name):
    """If a sum of squares overflows, no coordinate is lost and no mean is infinite."""
    tx = ALL[name]()
    params = jnp.ones(100)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(5):
        usual, state = update(params, state)
    huge, new_state = update(1e19 * params, state)
    assert statistics(new_state)[-1] == statistics(state)[-1]
    np.testing.assert_allclose(optax.tree.norm(huge), optax.tree.norm(usual), rtol=1e-6)
    first, state = update(1e19 * params, tx.init(params))
    np.testing.assert_array_equal(first, 1e19 * params)  # no history yet
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_parameter_without_a_gradient_keeps_its_statistics():
    tx = spam_optax.stable_spam()
    params = {"a": jnp.ones((2, 1)), "b": jnp.ones((2, 1))}
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    updates, new_state = update({"a": jnp.ones((2, 1)), "b": None}, state, params)
    assert updates["b"] is None
    for before, after in zip(
        statistics(state[0]), statistics(new_state[0]), strict=True
    ):
        assert before[1] == after[1]


def test_a_burst_of_noise_moves_the_parameters_no_more_than_usual():
    """With Adam such a burst moves them 30 times as far as an ordinary step."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((60, 40)).astype(np.float32)
    gradients[50:53] *= 1000
    params = jnp.zeros(40)

    def moved(tx):
        path = np.asarray(trajectory(tx, params, gradients)[0])
        steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
        return steps[49:].sum() / steps[39:49].mean()

    # A usual step and ten after it.
    assert moved(spam_optax.stable_spam()) < 11 * 1.3
    assert moved(optax.adam(1e-3)) > 15


def test_the_number_of_tensors_may_not_change():
    tx = spam_optax.adaclip()
    state = tx.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="adaclip: .* 1 "):
        tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, state)
