"""`track_spikes`: its statistics, their names, and its use with other wrappers."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import spam_optax
from spam_optax import testing

pytestmark = pytest.mark.one_python

STATISTICS = [
    name for name in spam_optax.TrackSpikesState._fields if name != "inner_state"
]


def make_params():
    return {"w": jnp.ones((8, 3)), "b": {"x": jnp.zeros(8)}, "none": None}


def make_gradients(step, dtype=np.float32):
    """Returns noise around a unit gradient, the same on every call."""
    rng = np.random.default_rng(step)
    return {
        "w": jnp.asarray(1 + 0.1 * rng.normal(size=(8, 3)), dtype),
        "b": {"x": jnp.asarray(0.2 * rng.normal(size=8), dtype)},
        "none": None,
    }


def update(tx, *arguments, **extra):
    """Takes a compiled step, which is much faster than operation by operation."""
    return jax.jit(tx.update)(*arguments, **extra)


def statistics(state):
    return {name: np.asarray(optax.tree.get(state, name)) for name in STATISTICS}


def track_norms(norms, **arguments):
    """Returns the statistics of a tensor with one coordinate, one row per step."""
    padded = np.zeros(512, np.float32)  # One length, so that it is compiled once.
    padded[: len(norms)] = norms
    rows = scan_norms(padded, **arguments)
    return {name: np.asarray(rows[name])[: len(norms), 0] for name in STATISTICS}


@functools.partial(jax.jit, static_argnames=("threshold", "decay"))
def scan_norms(norms, threshold=10.0, decay=0.99):
    tx = spam_optax.track_spikes(optax.identity(), threshold=threshold, decay=decay)

    def step(state, g):
        _, state = tx.update({"x": g}, state)
        return state, {name: getattr(state, name) for name in STATISTICS}

    return jax.lax.scan(step, tx.init({"x": jnp.zeros(())}), norms)[1]


def statistics_by_hand(gradients, updates, threshold=10.0, decay=0.99):
    """Returns one tensor's statistics at every step, in float64 and plain Python."""
    mean, steps, spike_steps, rows = 0.0, 0, 0, []
    for gradient, update in zip(gradients, updates, strict=True):
        g = np.asarray(gradient, np.float64).ravel()
        norm = math.sqrt(sum(x * x for x in g if np.isfinite(x)))
        nonfinite = int((~np.isfinite(g)).sum())
        if nonfinite:
            score = math.inf
        else:
            score = norm / mean if mean else 0.0
            steps += 1
            window = min(steps, 1 / (1 - decay))
            mean += ((min(norm, threshold * mean) if mean else norm) - mean) / window
        spike_steps += score > threshold
        rows.append(
            {
                "tensor_grad_norm": norm,
                "tensor_update_norm": np.linalg.norm(np.asarray(update, np.float64)),
                "tensor_mean_norm": mean,
                "tensor_spike_score": score,
                "tensor_spike_steps": spike_steps,
                "tensor_nonfinite": nonfinite,
                "tensor_steps": steps,
            }
        )
    return rows


@pytest.mark.parametrize("arguments", [{}, {"threshold": 3.0, "decay": 0.8}])
def test_statistics_are_numpys_and_updates_the_inner_ones(arguments):
    """The 50 steps have spikes, NaN and infinities in either tensor."""
    inner = spam_optax.spam(0.1)
    tx, params = spam_optax.track_spikes(inner, **arguments), make_params()
    outer_update, inner_update = jax.jit(tx.update), jax.jit(inner.update)
    state, inner_state = tx.init(params), inner.init(params)
    history = []
    for step in range(1, 51):
        gradients = make_gradients(step)
        if step in (20, 21, 40):
            gradients["w"] *= 100.0
        if step in (1, 30, 31):
            gradients["b"]["x"] = gradients["b"]["x"].at[:step].set(jnp.nan)
        if step == 35:
            gradients["w"] = gradients["w"].at[0, 0].set(-jnp.inf)
        updates, state = outer_update(gradients, state, params)
        want, inner_state = inner_update(gradients, inner_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, want)
        history.append((gradients, updates, statistics(state)))
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, inner_state)
    for index, name in enumerate(("b/x", "w")):
        assert spam_optax.tensor_names(params)[index] == name
        leaves = [[jax.tree.leaves(t)[index] for t in h[:2]] for h in history]
        wants = statistics_by_hand(*zip(*leaves, strict=True), **arguments)
        for (_, _, got), want in zip(history, wants, strict=True):
            for key in STATISTICS:
                np.testing.assert_allclose(got[key][index], want[key], rtol=1e-5)
    assert wants[-1]["tensor_spike_steps"] == 4
    assert wants[-1]["tensor_steps"] == 49


def test_a_spike_does_not_hide_the_next():
    """If the first spike entered in full, the mean would be 1e4 for the second."""
    norms = np.ones(60)
    norms[[30, 31, 50]] = 1e6, 50, 50
    got = track_norms(norms)
    assert np.flatnonzero(got["tensor_spike_score"] > 10).tolist() == [30, 31, 50]
    assert got["tensor_spike_steps"][-1] == 3


@pytest.mark.parametrize(
    ("rise", "threshold", "decay"), [(1e3, 10, 0.99), (40, 3, 0.9)]
)
def test_a_permanent_rise_stops_being_a_spike_in_bounded_time(rise, threshold, decay):
    """In each step the mean grows by the factor 1 + (threshold - 1) * (1 - decay).

    So a rise of the norm by a factor R is a spike for
    ceil(log(R / threshold) / log(1 + (threshold - 1) * (1 - decay))) steps.
    """
    before = 150
    bound = math.log(rise / threshold) / math.log1p((threshold - 1) * (1 - decay))
    norms = np.concatenate([np.ones(before), np.full(300, rise)])
    got = track_norms(norms, threshold=float(threshold), decay=decay)
    spikes = np.flatnonzero(got["tensor_spike_score"] > threshold)
    want = np.arange(before, before + math.ceil(bound))
    np.testing.assert_array_equal(spikes, want)
    np.testing.assert_allclose(got["tensor_mean_norm"][-1], rise, rtol=0.1)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("at", [0, 40])
def test_a_nonfinite_step_does_not_change_later_scores(odd, at):
    """Only the non-finite step counts as a spike, and a later true spike is found."""
    norms = np.ones(80)
    norms[at], norms[70] = odd, 11
    got = track_norms(norms)
    assert np.flatnonzero(got["tensor_spike_score"] > 10).tolist() == [at, 70]
    assert np.flatnonzero(got["tensor_nonfinite"]).tolist() == [at]
    assert got["tensor_spike_score"][at] == np.inf and got["tensor_grad_norm"][at] == 0
    clean = track_norms(np.delete(norms, at))
    np.testing.assert_array_equal(
        np.delete(got["tensor_mean_norm"], at), clean["tensor_mean_norm"]
    )


@pytest.mark.parametrize("asleep", [1, 20, 300])
def test_first_gradient_after_steps_without_one_is_no_spike(asleep):
    """A tensor that had no gradient so far has no history."""
    got = track_norms(np.concatenate([np.zeros(asleep), np.ones(200), [11.0]]))
    spikes = np.flatnonzero(got["tensor_spike_score"] > 10)
    assert spikes.tolist() == [asleep + 200]


def test_steps_before_the_first_gradient_do_not_slow_the_mean():
    norms = np.concatenate([[0.01], np.ones(50)])
    late = track_norms(np.concatenate([np.zeros(200), norms]))
    for name, values in track_norms(norms).items():
        np.testing.assert_array_equal(late[name][200:], values, err_msg=name)


def test_a_norm_whose_squares_overflow_is_a_spike_like_any_other():
    """The norm is measured, and the mean gets it cut to the threshold."""
    tx, params = spam_optax.track_spikes(optax.scale(1e15)), jnp.zeros(100)
    state, step = tx.init(params), jax.jit(tx.update)
    for gradient in (1.0, 1e19):
        _, state = step(jnp.full(100, gradient), state)
    assert state.tensor_nonfinite == 0
    np.testing.assert_allclose(state.tensor_grad_norm, [1e20], rtol=1e-6)
    np.testing.assert_allclose(state.tensor_update_norm, [1e35], rtol=1e-6)
    np.testing.assert_allclose(state.tensor_spike_score, [1e19], rtol=1e-6)
    np.testing.assert_allclose(state.tensor_mean_norm, [(10 + 100) / 2], rtol=1e-6)


def test_a_float64_norm_beyond_float32_enters_no_mean():
    with jax.enable_x64(True):
        tx, params = spam_optax.track_spikes(optax.identity()), jnp.zeros(100)
        state, step = tx.init(params), jax.jit(tx.update)
        for gradient in (1.0, 1e40):
            _, state = step(jnp.full(100, gradient), state)
        assert np.isinf(state.tensor_spike_score).all()
        np.testing.assert_allclose(state.tensor_mean_norm, [10])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_any_dtype_gives_float32_statistics(dtype):
    """Guards norms against narrow sums: 4096 ones in bfloat16 stop at 256."""
    with jax.enable_x64(dtype == "float64"):
        params = [jnp.full(4096, 3, dtype), jnp.full((2, 2), 3, "float32")]
        tx = spam_optax.track_spikes(optax.identity())
        updates, state = update(tx, params, tx.init(params))
        assert [u.dtype for u in updates] == [dtype, "float32"]
        got = statistics(state)
    np.testing.assert_allclose(got["tensor_grad_norm"], [192, 6], rtol=1e-6)
    np.testing.assert_allclose(got["tensor_update_norm"], [192, 6], rtol=1e-6)
    for name in STATISTICS:
        whole = name in ("tensor_spike_steps", "tensor_nonfinite", "tensor_steps")
        assert got[name].dtype == (np.int32 if whole else np.float32)


def test_names_are_in_the_order_of_the_entries():
    """In this test each tensor's gradient norm is its index in the list of names."""
    params = {
        "b": [jnp.zeros(2), jnp.zeros(())],
        "a": {"z": jnp.zeros(3), "a": None, "kernel": jnp.zeros((2, 2))},
    }
    names = spam_optax.tensor_names(params)
    assert names == ("a/kernel", "a/z", "b/0", "b/1")
    gradients = jax.tree.map(jnp.zeros_like, params)
    gradients["b"][0] = jnp.array([0.0, 5.0])
    tx = spam_optax.track_spikes(optax.identity())
    _, state = update(tx, gradients, tx.init(params))
    assert names[state.tensor_grad_norm.argmax()] == "b/0"
    assert spam_optax.tensor_names(jnp.zeros(2)) == ("",)
    assert spam_optax.tensor_names({}) == ()


def test_only_the_value_of_a_box_is_left_out_of_names():
    """A key or a field called `value` is part of the name. All names are different."""
    x = jnp.zeros((2, 2))
    assert spam_optax.tensor_names({"attn": {"key": x, "value": x}}) == (
        "attn/key",
        "attn/value",
    )
    assert spam_optax.tensor_names({"attn/value": x, "attn": x}) == (
        "attn",
        "attn/value",
    )
    scale = optax.EmaState(count=x, ema=nnx.Param({"a": x, "value": x}))
    assert spam_optax.tensor_names(scale) == ("count", "ema/a", "ema/value")
    boxed = {"critic": {"value": linen.Partitioned(x, ("in", "out"))}}
    assert spam_optax.tensor_names(boxed) == ("critic/value",)
    field = collections.namedtuple("Critic", "value")(x)
    assert spam_optax.tensor_names(field) == ("value",)
    with pytest.raises(ValueError, match=r"got 'a/b' for both \['a'\]\['b'\] and"):
        spam_optax.tensor_names({"a/b": x, "a": {"b": x}})


def test_every_statistic_has_a_name_of_its_own_in_a_long_chain():
    """`optax.tree.get` raises where a name occurs twice."""
    schedule = optax.constant_schedule(0.1)
    tx = spam_optax.track_spikes(
        optax.chain(
            testing.inject_spikes(0),
            spam_optax.spam_clip(count=True),
            spam_optax.spam_adam(schedule, count=True),
        )
    )
    params = make_params()
    _, state = update(tx, make_gradients(0), tx.init(params), params)
    adam = {"mu", "nu", "nonfinite_count", "nonfinite_total"}
    names = {
        *STATISTICS,
        *spam_optax.SpamClipState._fields,
        *testing.InjectSpikesState._fields,
        *adam,
    }
    for name in names:
        assert optax.tree.get(state, name) is not None
    # In spam the names are the clip's; only the schedule has a counter beside it.
    tx = spam_optax.track_spikes(spam_optax.spam(schedule, count=True))
    state = tx.init(params)
    for name in (*STATISTICS, *spam_optax.ScaleBySpamState._fields[1:]):
        assert optax.tree.get(state, name) is not None


def test_statistics_are_vectors_that_map_params_leaves_alone():
    """Scalars in a tree like the parameters would get the parameters' shardings."""
    tx, params = spam_optax.track_spikes(optax.scale_by_adam()), make_params()
    state = tx.init(params)
    for name in STATISTICS:
        assert optax.tree.get(state, name).shape == (2,)
    mapped = optax.tree.map_params(tx, lambda x: "moment", state)
    assert set(jax.tree.leaves(mapped.inner_state[1:])) == {"moment"}
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(mapped, name), getattr(state, name))


def test_a_scan_equals_the_loop_and_nothing_recompiles():
    tx, params, traces = spam_optax.track_spikes(spam_optax.spam(0.1)), make_params(), 0

    @jax.jit
    def step(gradients, state):
        nonlocal traces
        traces += 1
        return tx.update(gradients, state, params)

    state, gradients = tx.init(params), [make_gradients(t) for t in range(12)]
    for g in gradients:
        _, new_state = step(g, state)
        assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
        state = new_state
    assert traces == 1
    stacked = jax.tree.map(lambda *x: np.stack(x), *gradients)
    scanned, _ = jax.lax.scan(
        lambda s, g: (tx.update(g, s, params)[1], None), tx.init(params), stacked
    )
    for name, want in statistics(state).items():
        np.testing.assert_allclose(statistics(scanned)[name], want, rtol=1e-6)


def test_on_a_mesh_the_statistics_are_those_of_one_device():
    """The mesh has 8 devices. Each device has all statistics."""
    mesh = jax.make_mesh((8,), ("data",))
    tx, params = spam_optax.track_spikes(optax.sgd(0.1)), make_params()

    def run(place):
        state, step = tx.init(jax.tree.map(place, params)), jax.jit(tx.update)
        for i in range(4):
            gradients = make_gradients(i)
            if i == 2:
                gradients["w"] = gradients["w"].at[5].set(jnp.array([1e9, -1, jnp.nan]))
            _, state = step(
                jax.tree.map(place, gradients), state, jax.tree.map(place, params)
            )
        return state

    want = statistics(run(lambda x: x))
    with jax.set_mesh(mesh):
        state = run(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))))
    for name, value in statistics(state).items():
        assert getattr(state, name).sharding.is_fully_replicated
        np.testing.assert_allclose(value, want[name], rtol=1e-6)


def test_inside_masked_and_partition_it_measures_its_own_tensors_only():
    params = {"a": jnp.ones(4), "b": jnp.ones(9), "c": jnp.ones(16)}
    tracked = spam_optax.track_spikes(optax.sgd(0.5))
    masked = optax.masked(tracked, {"a": True, "b": False, "c": True})
    labels = {"a": "tracked", "b": "plain", "c": "tracked"}
    partition = optax.partition({"tracked": tracked, "plain": optax.sgd(0.5)}, labels)
    for tx in (masked, partition):
        _, state = update(tx, params, tx.init(params), params)
        got = statistics(state)
        np.testing.assert_allclose(got["tensor_grad_norm"], [2, 4])
        np.testing.assert_allclose(got["tensor_update_norm"], [1, 2])
    everything = spam_optax.track_spikes(masked)
    _, state = update(everything, params, everything.init(params), params)
    np.testing.assert_allclose(state.tensor_grad_norm, [2, 3, 4])


def test_in_multi_steps_it_measures_the_accumulated_gradient():
    """Around `MultiSteps` it measures every micro-batch."""
    tracked = spam_optax.track_spikes(optax.sgd(1.0))
    inside = optax.MultiSteps(tracked, every_k_schedule=2)
    outside = spam_optax.track_spikes(optax.MultiSteps(optax.sgd(1.0), 2))
    params = jnp.zeros(())

    def run(tx):
        state, step = tx.init(params), jax.jit(tx.update)
        for gradient in (1.0, 3.0, 2.0, 100.0):
            _, state = step(jnp.asarray(gradient), state, params)
        return statistics(state)

    got_inside, got_outside = run(inside), run(outside)
    np.testing.assert_allclose(got_inside["tensor_grad_norm"], [51])
    np.testing.assert_allclose(got_inside["tensor_spike_score"], [25.5])
    assert got_inside["tensor_steps"] == 2
    np.testing.assert_allclose(got_outside["tensor_spike_score"], [50])
    assert got_outside["tensor_steps"] == 4


def test_extra_arguments_reach_the_inner_transformation():
    def inner_update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.identity().init, inner_update)
    tx = spam_optax.track_spikes(inner)
    updates, _ = update(tx, jnp.ones(2), tx.init(jnp.ones(2)), value=7.0, other=None)
    np.testing.assert_array_equal(updates, [7, 7])


def test_a_tree_without_tensors():
    tx = spam_optax.track_spikes(optax.sgd(0.1))
    _, state = tx.update({}, tx.init({}))
    assert all(value.shape == (0,) for value in statistics(state).values())


@pytest.mark.parametrize("given", [None, 7.0])
@pytest.mark.parametrize("broken", [False, True])
def test_the_transformation_inside_gets_the_global_norm(given, broken):
    """Without it a guard inside would read the gradient once more."""
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args["grad_norm"])
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = spam_optax.track_spikes(inner)
    gradients = {"a": jnp.full(4, 3.0), "b": jnp.full(16, 2.0)}
    gradients["b"] = gradients["b"].at[3].set(jnp.nan if broken else 2.0)
    extra = {} if given is None else {"grad_norm": given}
    tx.update(gradients, tx.init(gradients), gradients, **extra)
    expected = given or (math.inf if broken else 10.0)
    assert float(seen[0]) == expected
