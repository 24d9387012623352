"""`reset_moments` around other transformations, compared with resets by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import spam_optax
from spam_optax import functional

pytestmark = pytest.mark.one_python

FIELDS = ("mu", "nu", "trace")
INTERVAL, STEPS = 5, 14


def make_params():
    return {"w": jnp.ones((4, 3)), "b": {"x": jnp.zeros(3)}, "none": None}


def make_gradients(step, like=None):
    """Returns the gradients of one step, the same on every call."""
    leaves, structure = jax.tree.flatten(make_params() if like is None else like)
    rng = np.random.default_rng(step)
    drawn = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, drawn)


def reset_by_hand(state, fields=FIELDS):
    """Sets the named fields of named tuples at any depth to 0."""
    if hasattr(state, "_fields"):
        values = {
            name: optax.tree.zeros_like(value)
            if name in fields
            else reset_by_hand(value, fields)
            for name, value in state._asdict().items()
        }
        return state._replace(**values)
    if isinstance(state, dict):
        return {name: reset_by_hand(value, fields) for name, value in state.items()}
    if isinstance(state, tuple):
        return tuple(reset_by_hand(value, fields) for value in state)
    return state


def run(
    tx, params, steps=STEPS, interval_by_hand=None, pass_params=True, fields=FIELDS
):
    """Returns all updates and the last state, with resets by hand or without."""
    state, history = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(1, steps + 1):
        if interval_by_hand and step % interval_by_hand == 0:
            state = reset_by_hand(state, fields)
        gradients = make_gradients(step, params)
        updates, state = update(gradients, state, params if pass_params else None)
        history.append(updates)
    return history, state


def assert_close(got, want, rtol=1e-6):
    """Asserts equal structures and dtypes, and values up to the compiler's rounding."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=1e-7
        )


SCHEDULE = optax.cosine_decay_schedule(0.1, 12)
INNER = {
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_lion": optax.scale_by_lion(),
    "trace": optax.trace(0.9, nesterov=True),
    "contrib.muon": optax.contrib.muon(SCHEDULE),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.add_decayed_weights(0.1),
        optax.trace(0.5),
        optax.scale_by_schedule(SCHEDULE),
    ),
}


@pytest.mark.parametrize("name", INNER)
def test_equals_the_inner_transformation_with_its_state_reset_by_hand(name):
    """Only momentum is reset. Counters, schedules and decay continue."""
    inner, params = INNER[name], make_params()
    wrapped = spam_optax.reset_moments(inner, INTERVAL)
    got, state = run(wrapped, params)
    want, want_state = run(inner, params, interval_by_hand=INTERVAL)
    assert_close(got, want)
    assert_close(state.inner_state, want_state)
    assert state.reset_step == STEPS
    for _, count in optax.tree.get_all_with_path(state.inner_state, "count"):
        assert count == STEPS
    unreset, _ = run(inner, params)
    assert_close(got[: INTERVAL - 1], unreset[: INTERVAL - 1])
    assert not np.allclose(got[INTERVAL - 1]["w"], unreset[INTERVAL - 1]["w"])


def test_reset_comes_before_the_gradient_of_that_step():
    """The numbers of a trace are written out, with resets in steps 3 and 6."""
    tx = spam_optax.reset_moments(optax.trace(0.5), 3)
    state, got = tx.init(jnp.zeros(())), []
    for _ in range(7):
        update, state = tx.update(jnp.ones(()), state)
        got.append(float(update))
    assert got == [1, 1.5, 1, 1.5, 1.75, 1, 1.5]


def test_without_interval_it_is_the_inner_transformation_bit_for_bit():
    inner, params = INNER["chain"], make_params()
    got, state = run(spam_optax.reset_moments(inner, None), params)
    want, want_state = run(inner, params)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, want_state)


@pytest.mark.parametrize("name", ["scale_by_adam", "trace"])
def test_needs_no_parameters(name):
    """Moments whose dtype differs from the gradients' keep it in a reset."""
    wrapped = spam_optax.reset_moments(INNER[name], INTERVAL)
    got, state = run(wrapped, make_params(), pass_params=False)
    want, want_state = run(
        INNER[name], make_params(), interval_by_hand=INTERVAL, pass_params=False
    )
    assert_close(got, want)
    assert_close(state.inner_state, want_state)
    params = jnp.zeros(3)
    tx = spam_optax.reset_moments(optax.scale_by_adam(), 1)
    _, state = tx.update(params.astype("bfloat16"), tx.init(params))
    assert state.inner_state.mu.dtype == jnp.float32


@pytest.mark.parametrize("fields", [("mu",), ["nu"], {"mu", "count"}, ("mu", "absent")])
def test_only_the_named_fields_are_reset(fields):
    inner, params = optax.scale_by_adam(), make_params()
    got, state = run(spam_optax.reset_moments(inner, INTERVAL, fields=fields), params)
    want, want_state = run(inner, params, interval_by_hand=INTERVAL, fields=fields)
    assert_close(got, want)
    assert_close(state.inner_state, want_state)
    assert state.inner_state.count == (
        STEPS % INTERVAL + 1 if "count" in fields else STEPS
    )


def test_a_parameter_called_like_a_field_is_not_mistaken_for_it():
    """``nu["mu"]`` is a second moment, so ``fields=("mu",)`` does not reset it."""
    params = {"mu": jnp.ones(3), "trace": {"mu": jnp.ones(2)}}
    inner = optax.chain(optax.scale_by_adam(), optax.trace(0.5))
    tx = spam_optax.reset_moments(inner, INTERVAL, fields=("mu",))
    got, state = run(tx, params)
    want, want_state = run(inner, params, interval_by_hand=INTERVAL, fields=("mu",))
    assert_close(got, want)
    assert_close(state.inner_state, want_state)


@pytest.mark.parametrize(
    ("inner", "fields"),
    [
        (optax.scale_by_adam(), ("momentum",)),
        (optax.scale_by_rms(), ("mu", "trace")),  # Only a parameter is called mu.
        (optax.scale_by_adam(), ("ScaleByAdamState",)),  # A class, not a field.
        (optax.sgd(0.1), FIELDS),  # No momentum at all.
    ],
)
def test_fields_that_no_state_has_are_refused(inner, fields):
    """Without the error the wrapper would silently never reset anything."""
    tx = spam_optax.reset_moments(inner, INTERVAL, fields=fields)
    with pytest.raises(ValueError, match="^reset_moments: fields must .*got") as error:
        tx.init({"mu": jnp.ones(2)})
    assert repr(fields) in str(error.value)


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.trace(0.9).init, update)
    tx = spam_optax.reset_moments(inner, 3)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=7.0, other=None)
    np.testing.assert_array_equal(updates, [7, 7])
    # And an inner transformation without extra arguments does not see them.
    tx = spam_optax.reset_moments(optax.trace(0.9), 3)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=7.0)
    np.testing.assert_array_equal(updates, [1, 1])


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_with_the_ramp_it_is_spams_reset(warmup_steps):
    """eps is negligible here, because it stands in different places of the formulas.

    Optax's bias correction ``1 - 0.999**1`` is off by 1e-5 in float32.
    """
    params, eps = make_params(), 1e-20
    got, _ = run(spam_optax.reset_moments(optax.scale_by_adam(eps=eps), 5), params)
    want, _ = run(
        spam_optax.scale_by_spam_adam(
            eps=eps, reset_interval=5, warmup_steps=warmup_steps
        ),
        params,
    )
    ramps = functional.reset_ramp(jnp.arange(1, STEPS + 1), 5, warmup_steps)
    assert (ramps < 1).any() == (warmup_steps > 0)
    got = [
        jax.tree.map(lambda u, r=r: r * u, g) for g, r in zip(got, ramps, strict=True)
    ]
    assert_close(got, want, rtol=3e-5)


def test_interval_as_an_injected_hyperparameter():
    """The interval is traced, and it changes in the state between two steps."""
    make = spam_optax.inject_hyperparams(spam_optax.reset_moments)
    tx, params = make(optax.trace(0.5), interval=3), jnp.zeros(())
    state, got = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(1, 9):
        if step == 5:
            state.hyperparams["interval"] = jnp.asarray(4)
        updates, state = update(jnp.ones(()), state, params)
        got.append(float(updates))
    assert got == [1, 1.5, 1, 1.5, 1.75, 1.875, 1.9375, 1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_state_keeps_its_structure_and_dtypes_in_a_scan(dtype):
    """A scan raises if a type changes. Its values are those of a loop."""
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda p: p.astype(dtype), make_params())
        tx = spam_optax.reset_moments(optax.adam(0.1), INTERVAL)
        gradients = [make_gradients(t, params) for t in range(1, STEPS + 1)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)

        @jax.jit
        def scan(state):
            def step(state, g):
                updates, state = tx.update(g, state, params)
                return state, updates

            return jax.lax.scan(step, state, stacked)

        state, updates = scan(tx.init(params))
        want, want_state = run(tx, params)
    want = jax.tree.map(lambda *x: jnp.stack(x), *want)
    rtol = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-5)
    assert_close(updates, want, rtol)
    assert_close(state, want_state, rtol)


def test_does_not_recompile():
    tx, params, traces = spam_optax.reset_moments(optax.adam(0.1), 2), jnp.ones(3), 0

    @jax.jit
    def update(gradients, state):
        nonlocal traces
        traces += 1
        return tx.update(gradients, state, params)

    state = tx.init(params)
    for _ in range(5):
        _, state = update(params, state)
    assert traces == 1


def test_initial_moments_need_not_be_zero():
    """The fields go back to what the inner `init` makes."""
    rms = optax.scale_by_rms(decay=0.5, initial_scale=4.0)
    tx = spam_optax.reset_moments(rms, 3)
    state = tx.init(jnp.ones(2))
    for want in (2.5, 1.75, 2.5):
        _, state = tx.update(jnp.ones(2), state)
        np.testing.assert_allclose(state.inner_state.nu, [want, want])


def test_sharded_like_on_one_device():
    """On a mesh of 8 devices values are equal and moments are sharded as parameters."""
    mesh = jax.make_mesh((8,), ("data",))
    params = {"w": jnp.ones((16, 4)), "b": jnp.zeros(8)}
    tx = spam_optax.reset_moments(optax.adam(SCHEDULE), 3)
    want, want_state = run(tx, params, steps=7)
    shard = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(shard, params)
        state, got = tx.init(sharded), []
        update = jax.jit(tx.update)
        for step in range(1, 8):
            gradients = jax.tree.map(shard, make_gradients(step, params))
            updates, state = update(gradients, state, sharded)
            got.append(updates)
    assert_close(got, want)
    assert_close(state, want_state)
    for moments in (state.inner_state[0].mu, state.inner_state[0].nu, got[-1]):
        for x in jax.tree.leaves(moments):
            assert x.sharding.spec[0] == "data"


def test_inside_masked_and_partition():
    """Masked leaves pass, and only the labelled parameters' momentum is reset."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    adam = optax.scale_by_adam()
    wrapped = spam_optax.reset_moments(adam, INTERVAL)
    got_a, _ = run(wrapped, {"a": params["a"]})
    masked, _ = run(optax.masked(wrapped, {"a": True, "b": False}), params)
    labels = {"a": "reset", "b": "plain"}
    partition, state = run(
        optax.partition({"reset": wrapped, "plain": adam}, labels), params
    )
    plain, _ = run(adam, params)
    for step, (m, p) in enumerate(zip(masked, partition, strict=True)):
        np.testing.assert_allclose(m["a"], p["a"], rtol=1e-6)
        np.testing.assert_allclose(m["a"], got_a[step]["a"], rtol=1e-6)
        np.testing.assert_array_equal(m["b"], make_gradients(step + 1, params)["b"])
        np.testing.assert_allclose(p["b"], plain[step]["b"], rtol=1e-6)
    assert optax.tree.get(state, "reset_step") == STEPS
    # The other way round, the wrapper sees masked leaves in the inner state.
    outside, _ = run(
        spam_optax.reset_moments(optax.masked(adam, {"a": True, "b": False}), INTERVAL),
        params,
    )
    assert_close(outside, masked)


def test_interval_counts_optimizer_steps_in_multi_steps():
    tx = optax.MultiSteps(
        spam_optax.reset_moments(optax.trace(0.5), 3), every_k_schedule=2
    )
    state, got = tx.init(jnp.zeros(())), []
    update = jax.jit(tx.update)
    for _ in range(8):
        updates, state = update(jnp.ones(()), state, jnp.zeros(()))
        got.append(float(updates))
    assert got == [0, 1, 0, 1.5, 0, 1, 0, 1.5]


def test_map_params_reaches_the_inner_moments_alone():
    """`optax.tree.map_params` calls init on a placeholder."""
    tx, params = spam_optax.reset_moments(optax.scale_by_adam(), 3), make_params()
    mapped = optax.tree.map_params(tx, lambda x: "moment", tx.init(params))
    assert set(jax.tree.leaves(mapped.inner_state[1:])) == {"moment"}
    assert mapped.reset_step == 0 and mapped.inner_state.count == 0


def test_adams_step_after_a_reset():
    """The docstring and docs/optimizers.md state 2.6 times on average, 6.6 at most."""
    tx = spam_optax.reset_moments(optax.adam(1.0), 500)
    update = lambda state, g: tx.update(g, state)[::-1]  # noqa: E731
    _, updates = jax.lax.scan(update, tx.init(jnp.zeros(())), jnp.ones(9999))
    late = -np.asarray(updates)[-500:]
    assert abs(late.mean() - 2.6) < 0.05
    assert abs(late.max() - 6.57) < 0.05
    assert late.argmax() == 11


def test_errors_of_the_inner_init_are_passed_on():
    """If parameters are invalid, the error is that of `inner`."""

    def init(params):
        if params != 1.0:
            raise ValueError("one is wanted")
        return optax.TraceState(params)

    inner = optax.GradientTransformation(init, lambda g, state, params: (g, state))
    tx = spam_optax.reset_moments(inner, 5)
    with pytest.raises(ValueError, match="trees like init.s parameters") as error:
        tx.update(2.0, tx.init(1.0), 2.0)
    assert str(error.value.__cause__) == "one is wanted"
