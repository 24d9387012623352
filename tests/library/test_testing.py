"""`inject_spikes`: which coordinates it hits, how many, and how."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import spam_optax
from spam_optax import testing

pytestmark = pytest.mark.one_python

KINDS = ("scale", "noise", "nan", "inf")
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64")


def gradients_of(seed=0, shape=(40, 50), names="a"):
    """Returns tensors of the same shape, without zeros."""
    rng = np.random.default_rng(seed)
    draws = (rng.choice([-1, 1], shape) * rng.uniform(1, 2, shape) for _ in names)
    return {n: jnp.asarray(x, jnp.float32) for n, x in zip(names, draws, strict=True)}


def run(tx, steps=4, gradients=None, jitted=False):
    """Returns updates and counts of the first steps, which have the same gradients.

    Compiling the random bits takes seconds, so most tests do without.
    """
    gradients = gradients_of() if gradients is None else gradients
    update = jax.jit(tx.update) if jitted else tx.update
    state, history = tx.init(gradients), []
    with jax.disable_jit(not jitted):
        for _ in range(steps):
            updates, state = update(gradients, state)
            history.append((updates, int(optax.tree.get(state, "injected_count"))))
    return history


def assert_same(got, want):
    for (x, x_count), (y, y_count) in zip(got, want, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)
        assert x_count == y_count


def hits(updates, gradients=None):
    gradients = gradients_of() if gradients is None else gradients
    return jax.tree.map(lambda u, g: np.asarray(u != g), updates, gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_gives_the_same_faults(kind):
    """A second run is equal, and so is one with a key in place of a number."""
    want = run(testing.inject_spikes(3, 0.1, kind=kind))
    assert_same(run(testing.inject_spikes(3, 0.1, kind=kind)), want)
    assert_same(run(testing.inject_spikes(jax.random.key(3), 0.1, kind=kind)), want)


@pytest.mark.parametrize("kind", ["scale", "noise"])
def test_compiled_or_in_a_scan_the_faults_are_the_same(kind):
    """The same coordinates are hit. Values agree up to the rounding of a fused sum."""
    tx = testing.inject_spikes(3, 0.1, kind=kind)
    want, gradients = run(tx), gradients_of()

    @jax.jit
    def scan(state):
        def step(state, _):
            updates, state = tx.update(gradients, state)
            return state, (updates, state.injected_count)

        return jax.lax.scan(step, state, length=4)[1]

    scanned, counts = scan(tx.init(gradients))
    compiled = run(tx, jitted=True)
    for i, (updates, count) in enumerate(want):
        assert count == counts[i] == compiled[i][1]
        for got in (scanned["a"][i], compiled[i][0]["a"]):
            np.testing.assert_array_equal(got != gradients["a"], hits(updates)["a"])
            np.testing.assert_allclose(got, updates["a"], rtol=1e-4)


def test_key_step_and_tensor_decide_what_is_hit():
    """No two masks agree more often than by chance."""
    masks = []
    for key in (0, 1):
        gradients = gradients_of(names="ab")
        for updates, _ in run(testing.inject_spikes(key, 0.5), 2, gradients):
            masks += [mask.ravel() for mask in hits(updates, gradients).values()]
    assert len(masks) == 8
    for i in range(8):
        for j in range(i):
            # 2000 fair coins: the standard deviation of the share is 0.011.
            assert abs((masks[i] == masks[j]).mean() - 0.5) < 0.06


def test_gradient_values_do_not_change_which_coordinates_are_hit():
    """The same coordinates are hit whatever the gradients are."""
    tx = testing.inject_spikes(0, 0.3)
    for (one, _), (two, _) in zip(
        run(tx), run(tx, gradients=gradients_of(9)), strict=True
    ):
        jax.tree.map(
            np.testing.assert_array_equal, hits(one), hits(two, gradients_of(9))
        )


@pytest.mark.parametrize("rate", [0.001, 0.03, 0.5])
def test_the_share_hit_is_the_rate(rate):
    """The share over 8 steps is within 4 standard deviations of the binomial."""
    gradients = gradients_of(shape=(200, 250))
    history = run(testing.inject_spikes(1, rate), 8, gradients)
    total = 8 * 200 * 250
    deviation = (total * rate * (1 - rate)) ** 0.5
    assert abs(sum(count for _, count in history) - total * rate) < 4 * deviation


@pytest.mark.parametrize(("rate", "want"), [(0.0, 0), (0, 0), (1.0, 2000), (1, 2000)])
def test_rates_of_0_and_1(rate, want):
    """The rates may be whole numbers."""
    for updates, count in run(testing.inject_spikes(1, rate), 1):
        assert count == want == sum(mask.sum() for mask in hits(updates).values())


def test_a_rate_of_one_draws_no_mask_and_hits_with_the_same_noise():
    """A rate of 1 as a number needs no mask. An array may be a tracer and needs one."""
    tx = testing.inject_spikes(3, 1.0, kind="noise")
    drawn = testing.inject_spikes(3, jnp.float32(1), kind="noise")
    assert_same(run(tx, jitted=True), run(drawn, jitted=True))
    sizes = [
        len(jax.jit(x.update).lower(gradients_of(), x.init(None)).as_text())
        for x in (tx, drawn)
    ]
    assert sizes[0] < sizes[1]


@functools.cache
def mask_of_float32():
    """Returns the coordinates hit in the first step with key 5 and rate 0.25."""
    ones = jnp.ones((40, 50), jnp.float32)
    return hits(run(testing.inject_spikes(5, 0.25), 1, ones)[0][0], ones)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_in_every_dtype(kind, dtype):
    """The dtype and the other coordinates stay. The count is that of the hits.

    What is hit does not depend on the kind or the dtype.
    """
    with jax.enable_x64(dtype == "float64"):
        gradient = gradients_of()["a"].at[:, :5].set(0).astype(dtype)
        tx = testing.inject_spikes(5, 0.25, 100.0, kind=kind)
        updates, count = run(tx, 1, gradient)[0]
    mask = mask_of_float32()
    assert count == mask.sum()
    assert updates.dtype == dtype
    wide = np.complex128 if dtype == "complex64" else np.float64
    got, g = np.asarray(updates).astype(wide), np.asarray(gradient).astype(wide)
    np.testing.assert_array_equal(got[~mask], g[~mask])
    rms = np.sqrt(np.mean(np.abs(g) ** 2))
    got, g = got[mask], g[mask]
    if kind == "scale":
        np.testing.assert_allclose(got, 100 * g, rtol=5e-3)
    elif kind == "noise":
        # 500 normal draws; the root mean square of |noise| has an error of 3 %.
        noise = (got - g) / (100 * rms)
        assert abs(np.sqrt(np.mean(np.abs(noise) ** 2)) - 1) < 0.15
        assert abs(noise.mean()) < 0.2
    elif kind == "nan":
        assert np.isnan(got).all()
    else:
        np.testing.assert_array_equal(got.real, np.where(g.real < 0, -np.inf, np.inf))


@pytest.mark.parametrize(
    ("gradient", "want"),
    [
        (3 + 4j, complex(np.inf, np.inf)),
        (-3 + 4j, complex(-np.inf, np.inf)),
        (2 + 0j, complex(np.inf, 0)),
        (-2j, complex(0, -np.inf)),
        (0j, complex(np.inf, 0)),
    ],
)
def test_infinities_of_complex_numbers_have_no_nan_part(gradient, want):
    """0 times infinity would be NaN, and clipping would treat the coordinate as NaN."""
    tx = testing.inject_spikes(0, 1.0, kind="inf")
    g = jnp.full(3, gradient, jnp.complex64)
    updates, _ = run(tx, 1, g)[0]
    np.testing.assert_array_equal(updates, np.full(3, want, np.complex64))


def test_noise_and_scale_are_in_units_of_the_tensors_own_gradient():
    """One tensor is 1000 times the other, and the relative fault is the same."""
    g = gradients_of(shape=(100, 100), names="ab")
    gradients = {"a": g["a"], "b": 1000 * g["b"]}
    updates, _ = run(testing.inject_spikes(0, 1.0, 7.0, kind="noise"), 1, gradients)[0]
    for name, gradient in gradients.items():
        noise = np.asarray(updates[name], np.float64) - np.asarray(gradient)
        rms = np.sqrt(np.mean(np.square(np.asarray(gradient, np.float64))))
        np.testing.assert_allclose(noise.std() / rms, 7, rtol=0.03)
    updates, _ = run(testing.inject_spikes(0, 1.0, -7.0), 1, gradients)[0]
    for name, gradient in gradients.items():
        np.testing.assert_allclose(updates[name], -7 * gradient, rtol=1e-6)


@functools.cache
def hit_everywhere():
    return run(testing.inject_spikes(0, 0.3), steps=5)


@pytest.mark.parametrize(
    "steps",
    [
        [2, 4],
        (4, 2, 2),
        {2, 4},
        range(2, 5, 2),
        np.array([2, 4]),
        jnp.array([2, 4]),
        lambda step: step % 2 == 0,
        lambda step: jnp.isin(step, jnp.array([2, 4])),
    ],
)
def test_only_the_given_steps_are_hit(steps):
    """Steps count from 1. In other steps gradients keep all bits and the count is 0.

    Which coordinates are hit in a step does not depend on which steps there are.
    """
    everywhere = hit_everywhere()
    for i, (updates, count) in enumerate(
        run(testing.inject_spikes(0, 0.3, steps=steps), steps=5)
    ):
        if i + 1 in (2, 4):
            assert_same([(updates, count)], [everywhere[i]])
            assert count > 0
        else:
            jax.tree.map(np.testing.assert_array_equal, updates, gradients_of())
            assert count == 0


def test_an_empty_list_of_steps_corrupts_nothing():
    assert [count for _, count in run(testing.inject_spikes(0, 1.0, steps=[]))] == [
        0
    ] * 4


def test_in_a_chain_spam_gets_the_fault_and_counts_it():
    """In the third step SPAM clips exactly what was injected before it."""
    tx = optax.chain(
        testing.inject_spikes(0, 0.1, 1e6, steps=[3]),
        spam_optax.spam_clip(grace_steps=2, reset_interval=None, count=True),
    )
    gradients, update = gradients_of(), jax.jit(tx.update)
    state = tx.init(gradients)
    for step in range(1, 5):
        updates, state = update(gradients, state)
        injected = optax.tree.get(state, "injected_count")
        assert optax.tree.get(state, "spam_clip_clipped_count") == injected
        assert (injected > 100) == (step == 3)
        assert max(abs(u).max() for u in updates.values()) < 1000


def test_in_multi_steps_steps_are_optimizer_steps():
    """With 3 micro-batches per step the second accumulated gradient is hit."""
    tx = optax.MultiSteps(testing.inject_spikes(0, 1.0, 10.0, steps=[2]), 3)
    state, got = tx.init(jnp.zeros(2)), []
    update = jax.jit(tx.update)
    for _ in range(9):
        updates, state = update(jnp.ones(2), state)
        got.append(float(updates[0]))
    assert got == [0, 0, 1, 0, 0, 10, 0, 0, 1]


@pytest.mark.parametrize(("kind", "rate"), [("noise", 0.2), ("noise", 1), ("inf", 0.2)])
def test_on_a_mesh_the_faults_are_those_of_one_device(kind, rate):
    """The mesh has 8 devices. The updates keep the gradients' shardings."""
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    tx = testing.inject_spikes(0, rate, kind=kind, steps=[2])
    want = run(tx, 3)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data", "model"))
        gradients = jax.device_put(gradients_of(), sharding)
        got = run(tx, 3, gradients, jitted=True)
    for (updates, count), (want_updates, want_count) in zip(got, want, strict=True):
        assert count == want_count
        for name, update in updates.items():
            assert update.sharding == sharding
            np.testing.assert_allclose(update, want_updates[name], rtol=1e-5)


def test_missing_leaves_pass_and_state_keeps_its_types():
    tx, gradients = testing.inject_spikes(0, 1.0), {"a": jnp.ones(2), "b": None}
    state = tx.init(gradients)
    assert state == testing.InjectSpikesState(0, 0)
    with jax.disable_jit():
        updates, new_state = tx.update(gradients, state)
    assert updates["b"] is None
    assert [x.dtype for x in (*state, *new_state)] == [jnp.int32] * 4


def test_rate_and_scale_may_be_injected():
    """Rate and scale are traced, and the key is static."""
    make = spam_optax.inject_hyperparams(testing.inject_spikes)
    got = run(make(0, rate=0.3, scale=50.0), jitted=True)
    assert_same(got, run(testing.inject_spikes(0, 0.3, 50.0)))
