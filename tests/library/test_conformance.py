"""The rules that every transformation must keep."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import spam_optax
from spam_optax import linen
from spam_optax import nnx as flax_nnx
from trainer import hlo

# Of tensors whose names say nothing, as a and b.
pytestmark = pytest.mark.filterwarnings("ignore:adam_mini_partition. the names")

QUICK = dict(reset_interval=5, grace_steps=2)
TRANSFORMATIONS = {
    "spam_clip": lambda: spam_optax.spam_clip(count=True, **QUICK),
    "spam_adam": lambda: spam_optax.spam_adam(
        0.1, reset_interval=5, weight_decay=0.1, count=True
    ),
    "spam": lambda: spam_optax.spam(0.1, count=True, **QUICK),
    "spam_uncounted": lambda: spam_optax.spam(0.1, **QUICK),
    "sparse_spam": lambda: spam_optax.sparse_spam(
        0.1, weight_decay=0.1, count=True, **QUICK
    ),
    "reset_moments": lambda: spam_optax.reset_moments(optax.adam(0.1), 5),
    "track_spikes": lambda: spam_optax.track_spikes(spam_optax.spam(0.1, **QUICK)),
    "skip_spikes": lambda: spam_optax.skip_spikes(
        spam_optax.spam(0.1, **QUICK), window=8, min_history=4
    ),
    "clip_update_norm": lambda: spam_optax.clip_update_norm(window=8, min_history=4),
    "inject_spikes": lambda: spam_optax.testing.inject_spikes(0, 0.5, 10.0, steps=[3]),
    "adaclip": lambda: spam_optax.adaclip(count=True),
    "adagn": lambda: spam_optax.adagn(total_steps=5, count=True),
    "gradient_stabilizer": lambda: spam_optax.gradient_stabilizer(count=True),
    "stable_spam": lambda: spam_optax.stable_spam(
        0.1, reset_interval=5, total_steps=6, weight_decay=0.1, count=True
    ),
    "zclip": lambda: spam_optax.zclip(warmup_steps=3, count=True),
    "adagc": lambda: spam_optax.adagc(warmup_steps=3, count=True),
    "stable_adamw": lambda: spam_optax.stable_adamw(0.1, weight_decay=0.1),
    "adam_mini": lambda: spam_optax.adam_mini(0.1, weight_decay=0.1),
}
OPTIMIZERS = {
    "spam_adam": functools.partial(spam_optax.spam_adam, reset_interval=5),
    "spam": functools.partial(spam_optax.spam, **QUICK),
    "sparse_spam": functools.partial(spam_optax.sparse_spam, **QUICK),
    "stable_spam": functools.partial(
        spam_optax.stable_spam, reset_interval=5, total_steps=6
    ),
    "stable_adamw": functools.partial(spam_optax.stable_adamw),
    "adam_mini": functools.partial(spam_optax.adam_mini),
}
REFUSE_COMPLEX = ("sparse", "adam_mini")
# Built of the same parts as the others, so that CI tests them on one Python only.
RELATIVES = ("adaclip", "adagn", "gradient_stabilizer", "zclip", "adagc")
RELATIVES += ("stable_adamw", "adam_mini")
EVERY = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in RELATIVES else name
        for name in TRANSFORMATIONS
    ],
)
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]


def make_params(dtype="float32"):
    return {
        "layer": {"kernel": jnp.ones((4, 8), dtype), "bias": jnp.zeros(8, dtype)},
        "scale": jnp.ones((), dtype),
        "absent": None,
    }


def make_gradients(params, step):
    key = jax.random.key(step)
    return optax.tree.random_like(key, params)


@functools.cache
def compiled(name):
    """The transformation, with its update compiled once for all tests of it."""
    tx = TRANSFORMATIONS[name]()
    return tx, jax.jit(tx.update)


@functools.cache
def run_of(name):
    """Returns parameters and state after a plain run, for comparison."""
    tx, update = compiled(name)
    return run(tx, make_params(), update=update)


def run(tx, params, steps=8, update=None):
    state = tx.init(params)
    update = update or jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(make_gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_close(ours, theirs, rtol=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6),
        ours,
        theirs,
    )


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_structure_shapes_and_dtypes_are_stable(name, dtype):
    """The state keeps its structure. Updates have the parameters' shapes and dtypes."""
    with jax.enable_x64(dtype == "float64"):
        tx = TRANSFORMATIONS[name]()
        params = make_params(dtype)
        if any(x in name for x in REFUSE_COMPLEX) and dtype == "complex64":
            with pytest.raises(TypeError, match="must have a floating dtype"):
                tx.init(params)
            return
        state = tx.init(params)
        gradients = make_gradients(params, 0)
        updates, new_state = jax.eval_shape(tx.update, gradients, state, params)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert types(new_state) == types(state)
        assert types(updates) == types(params)


@pytest.mark.one_python
@EVERY
def test_numbers_and_numpy_arrays(name):
    """A Python float is a float32 scalar; a float64 array is float32 without x64."""
    tx = TRANSFORMATIONS[name]()
    plain = {"number": 1.0, "array": np.ones(3)}
    params = jax.tree.map(lambda x: jnp.asarray(x, "float32"), plain)
    state, want_state = tx.init(plain), tx.init(params)
    assert types(state) == types(want_state)
    for _ in range(2):
        updates, state = tx.update(plain, state, plain)
        want, want_state = tx.update(params, want_state, params)
        assert_close((updates, state), (want, want_state))


@pytest.mark.one_python
@EVERY
def test_jit_equals_eager(name):
    tx, update = compiled(name)
    ours = run(tx, make_params(), steps=3, update=update)
    assert_close(ours, run(tx, make_params(), steps=3, update=tx.update))


@pytest.mark.one_python
@EVERY
def test_scan_and_cond(name):
    """A step inside `lax.cond` and `lax.scan` gives the same results."""
    tx = TRANSFORMATIONS[name]()
    params = make_params()
    gradients = [make_gradients(params, step) for step in range(8)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *gradients)

    def step(carry, g):
        def take(carry):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.cond(True, take, lambda carry: carry, carry), None

    scanned, _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
    assert_close(scanned, run_of(name))


@pytest.mark.one_python
@EVERY
def test_vmap(name):
    """`vmap` over two runs gives the same results as the two runs."""
    tx, update = compiled(name)
    params = make_params()
    pair = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    batched, _ = run_vmapped(tx, pair)
    for i in range(2):
        alone = jax.tree.map(lambda x: x[i], pair)  # noqa: B023
        state = tx.init(alone)
        for step in range(8):
            g = jax.tree.map(lambda x: x[i], make_gradients(pair, step))  # noqa: B023
            updates, state = update(g, state, alone)
            alone = optax.apply_updates(alone, updates)
        assert_close(jax.tree.map(lambda x: x[i], batched), alone)  # noqa: B023


def run_vmapped(tx, params):
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(tx.update))
    for step in range(8):
        updates, state = update(make_gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@EVERY
def test_no_recompilation(name):
    """One trace serves every step. Resets, ramps and faults do not trace again."""
    run_of(name)
    assert compiled(name)[1]._cache_size() == 1


@pytest.mark.one_python
@EVERY
def test_init_state_can_be_donated(name):
    """No two leaves of a new state share a buffer, compiled or not."""
    tx = TRANSFORMATIONS[name]()
    params = make_params()
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
        assert len(set(pointers)) == len(pointers)
        jax.jit(tx.update, donate_argnums=1)(make_gradients(params, 0), state, params)


@pytest.mark.one_python
@EVERY
def test_masked(name):
    """Masked leaves pass unchanged. The others move as without the mask."""
    tx, alone_update = compiled(name)
    params = make_params()
    mask = {"layer": {"kernel": True, "bias": False}, "scale": False, "absent": False}
    masked = optax.masked(tx, mask)
    alone = {"layer": {"kernel": params["layer"]["kernel"]}}
    state, alone_state = masked.init(params), tx.init(alone)
    update = jax.jit(masked.update)
    for step in range(6):
        g = make_gradients(params, step)
        updates, state = update(g, state, params)
        only = {"layer": {"kernel": g["layer"]["kernel"]}}
        alone_updates, alone_state = alone_update(only, alone_state, alone)
        assert_close(updates["layer"]["kernel"], alone_updates["layer"]["kernel"])
        assert_same_bits(updates["layer"]["bias"], g["layer"]["bias"])


@pytest.mark.one_python
@EVERY
def test_partition(name):
    tx, update = compiled(name)
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    labels = {"a": "ours", "b": "sgd"}
    both = optax.partition({"ours": tx, "sgd": optax.sgd(1.0)}, labels)
    updates, _ = jax.jit(both.update)(
        jax.tree.map(jnp.ones_like, params), both.init(params), params
    )
    np.testing.assert_array_equal(updates["b"], -jnp.ones(3))
    alone = {"a": params["a"]}
    alone, _ = update(alone, tx.init(alone), alone)
    assert_close(updates["a"], alone["a"])


@pytest.mark.one_python
@EVERY
def test_multi_steps(name):
    """Two equal accumulated gradients give the same step as one."""
    tx, update = compiled(name)
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    params = accumulated = make_params()
    state, multi_state = tx.init(params), multi.init(params)
    multi_update = jax.jit(multi.update)
    for step in range(6):
        g = make_gradients(params, step)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        for _ in range(2):
            updates, multi_state = multi_update(g, multi_state, accumulated)
            accumulated = optax.apply_updates(accumulated, updates)
    assert_close(accumulated, params, rtol=1e-5)


@pytest.mark.one_python
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_inject_hyperparams(name, dtype):
    """Every number may be a traced hyper-parameter, and a learning rate a schedule."""
    params = make_params(dtype)
    inject = spam_optax.inject_hyperparams(OPTIMIZERS[name])
    injected = inject(learning_rate=optax.constant_schedule(0.1))
    ours, state = run(injected, params)
    assert state.hyperparams["b2"].dtype == jnp.float32
    # A bfloat16 learning rate is rounded by Optax when it is not injected.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    plain, _ = run(OPTIMIZERS[name](0.1), params)
    assert_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), ours),
        jax.tree.map(lambda x: x.astype(jnp.float32), plain),
        rtol=tolerance,
    )
    updates, _ = jax.jit(injected.update)(make_gradients(params, 0), state, params)
    assert types(updates) == types(params)


@pytest.mark.one_python
@EVERY
def test_apply_if_finite(name):
    wrapped = optax.apply_if_finite(TRANSFORMATIONS[name](), max_consecutive_errors=3)
    assert_close(run(wrapped, make_params())[0], run_of(name)[0])


@pytest.mark.one_python
@EVERY
def test_extra_arguments_pass(name):
    """A chain ignores unknown arguments. Wrappers pass them on to what they wrap."""
    tx = optax.chain(TRANSFORMATIONS[name]())
    params = make_params()
    tx.update(make_gradients(params, 0), tx.init(params), params, value=1.0)


@pytest.mark.parametrize(
    "name", ["spam_adam", "stable_spam", "stable_adamw", "adam_mini"]
)
def test_names_in_a_chain_are_unique(name):
    """In a chain of all clips each statistic is found by its name."""
    clips = ("spam_clip", "zclip", "adagc", "adaclip", "adagn", "gradient_stabilizer")
    tx = spam_optax.track_spikes(
        optax.chain(*(getattr(spam_optax, x)() for x in (*clips, name)))
    )
    state = tx.init(make_params())
    states = [*state.inner_state[: len(clips)], state.inner_state[-1][0], state]
    for part in states:
        for field in part._fields:
            optax.tree.get(state, field)  # raises if there are two


@pytest.mark.one_python
@pytest.mark.parametrize(
    "name",
    ["spam_clip", "spam_adam", "spam", "stable_spam", "stable_adamw", "adam_mini"],
)
def test_a_parameter_without_a_gradient_stays_untouched(name):
    """A gradient that is None gives no update, and the moments do not change."""
    tx = getattr(spam_optax, name)()
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    update = jax.jit(tx.update)
    _, state = update({"a": jnp.ones(2), "b": jnp.ones(2)}, tx.init(params), params)
    updates, new_state = update({"a": jnp.ones(2), "b": None}, state, params)
    assert updates["b"] is None
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    moment = "clip_nu" if name == "spam_clip" else "nu"
    before, after = (optax.tree.get(s, moment) for s in (state, new_state))
    assert_same_bits(before["b"], after["b"])
    assert np.all(before["a"] != after["a"])


@EVERY
def test_map_params_makes_shardings(name):
    """`optax.tree.map_params` finds exactly the parts shaped like parameters."""
    tx = TRANSFORMATIONS[name]()
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    specs = {"a": P("x"), "b": P()}
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx,
        lambda x, spec: None if x is None else spec,
        state,
        specs,
        transform_non_params=lambda _: "other",
        is_leaf=lambda x: x is None,  # Masks chosen by size are not those of all.
    )
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    for leaf, found in zip(
        jax.tree.leaves(state), jax.tree.leaves(mapped, is_leaf=is_spec), strict=True
    ):
        shapes = {(2, 3): P("x"), (1, 3): P("x"), (3,): P()}
        if "adam_mini" in name:  # One value a block, with the rank of its parameter.
            shapes |= {(1, 1): P("x"), (1,): P()}
        expected = shapes.get(leaf.shape, "other")
        assert found == expected


@EVERY
def test_explicit_mesh(name):
    """On eight devices numbers are the same and moments are sharded as parameters."""
    tx = TRANSFORMATIONS[name]()
    params = {"kernel": jnp.ones((4, 16)), "bias": jnp.ones(16)}
    gradients = [
        {
            "kernel": jnp.cos(step + jnp.arange(64.0)).reshape(4, 16),
            "bias": jnp.ones(16),
        }
        for step in range(6)
    ]
    shardings = {"kernel": P(None, "x"), "bias": P("x")}

    def steps(params, put=lambda tree: tree):
        state = jax.jit(tx.init)(params)
        update = jax.jit(tx.update)
        for g in gradients:
            updates, state = update(put(g), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected = steps(params)
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        put = lambda tree: jax.tree.map(jax.device_put, tree, shardings)  # noqa: E731
        sharded_params, state = steps(put(params), put)
        for leaf in jax.tree.leaves(state):
            specs = {(4, 16): P(None, "x"), (1, 16): P(None, "x"), (16,): P("x")}
            spec = specs.get(leaf.shape, P())
            wanted = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        assert_close(jax.device_get((sharded_params, state)), expected, rtol=1e-5)


@pytest.mark.one_python
@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize(
    "name",
    ["spam_clip", "spam_adam", "spam", "track_spikes", "zclip", "adagc"]
    + ["skip_spikes", "clip_update_norm"]
    + ["stable_adamw", "adaclip", "adagn", "gradient_stabilizer", "stable_spam"],
)
def test_update_on_a_mesh_adds_only_scalar_all_reduces(name):
    tx = TRANSFORMATIONS[name]()
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"))):
        params = jax.device_put(jnp.ones((16, 64)), P("x", "y"))
        state = tx.init(params)
        text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    found = hlo.collectives(text)
    assert found
    for collective in found:
        assert collective.kind == "all-reduce", collective
        assert all(array.shape == () for array in collective.results), collective


@pytest.mark.parametrize("name", ["spam_adam", "spam", "reset_moments"])
def test_moments_sharded_unlike_the_parameters(name):
    """Replicated parameters with sharded moments, as in ZeRO's first stage."""
    tx = TRANSFORMATIONS[name]()
    params, gradients = jnp.ones(16), jnp.linspace(-1.0, 1.0, 16)
    expected, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        params, gradients = (jax.device_put(x, P()) for x in (params, gradients))
        state = jax.tree.map(
            lambda x: jax.device_put(x, P("x") if x.ndim else P()), tx.init(params)
        )
        gradients = jax.device_put(gradients, P("x"))
        updates, state = jax.jit(tx.update)(gradients, state, params)
    assert_close(np.asarray(updates), np.asarray(expected), rtol=1e-5)


@pytest.mark.parametrize("name", ["spam", "spam_adam"])
def test_shard_map(name):
    """Elementwise updates run on the part of each device if nothing is counted."""
    tx = {
        "spam": spam_optax.spam(0.1),
        "spam_adam": spam_optax.spam_adam(0.1),
    }[name]
    params = jnp.linspace(-1.0, 1.0, 16)
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), state)
    mapped = jax.shard_map(
        tx.update,
        mesh=jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(P("x"), specs, P("x")),
        out_specs=(P("x"), specs),
    )
    ours = jax.jit(mapped)(params, state, params)
    assert_close(jax.device_get(ours), tx.update(params, state, params))


@pytest.mark.one_python
@EVERY
def test_pure_under_strict_modes(name):
    """Updates leak no tracers and make no implicit transfers."""
    tx, update = compiled(name)
    params = make_params()
    state, g = tx.init(params), make_gradients(params, 0)
    update(g, state, params)
    with jax.transfer_guard("disallow"):
        update(g, state, params)
    # The search for leaks goes through all objects, except the frozen ones.
    gc.freeze()
    try:
        with jax.checking_leaks():
            jax.jit(lambda *args: tx.update(*args))(g, state, params)
    finally:
        gc.unfreeze()


@pytest.mark.slow
@EVERY
def test_updates_are_differentiable(name):
    """Derivatives exist with resets, unused parameters and gradients that are 0.

    Where the gradient is 0, Optax's Adam has no derivative: it takes the root of 0.
    """
    tx = TRANSFORMATIONS[name]()

    def objective(scale):
        params = {"a": 1 + jnp.arange(8.0).reshape(4, 2), "b": jnp.ones(3)}
        params["c"] = jnp.zeros(3)

        def loss(p):
            return scale * (jnp.sum(p["a"] ** 2) + jnp.sum(p["c"] ** 2))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            updates = jax.tree.map(lambda u: 0.01 * u, updates)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=7)
        is_adam = name == "reset_moments"
        return jnp.sum(params["a"]) + (0 if is_adam else jnp.sum(params["c"]))

    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(objective))(1.3)
        value = jax.jit(objective)
        difference = (value(1.3 + 1e-4) - value(1.3 - 1e-4)) / 2e-4
    # Statistics of whole tensors are float32, which the difference is as exact as.
    np.testing.assert_allclose(slope, difference, rtol=1e-3, atol=1e-3)


@pytest.mark.one_python
def test_strict_promotion():
    """All work under JAX's strict promotion of dtypes. `optax.adam` does not."""
    makers = TRANSFORMATIONS | {
        kind: functools.partial(spam_optax.testing.inject_spikes, 0, 0.5, kind=kind)
        for kind in ("noise", "nan", "inf")
    }
    makers["reset_moments"] = lambda: spam_optax.reset_moments(optax.trace(0.9), 5)
    makers["short slabs"] = lambda: spam_optax.sparse_spam(0.1, 0.3, weight_decay=0.1)
    whole = jnp.array(5)  # As injected.
    makers["ramp"] = lambda: spam_optax.scale_by_spam_adam(warmup_steps=whole)
    makers["cosine"] = lambda: spam_optax.adagn(total_steps=whole)
    key = jax.random.key(0)
    initial = spam_optax.initializers.stable(width=8, num_layers=2)
    x, steps = jnp.ones((8, 8)), jnp.ones(30)
    with jax.numpy_dtype_promotion("strict"):
        for make in makers.values():
            for dtype in ("float16", "bfloat16", "float32"):
                tx, params = make(), make_params(dtype)
                state = jax.eval_shape(tx.init, params)
                jax.eval_shape(tx.update, params, state, params)
        for draw in (initial.kernel, initial.residual, initial.embedding):
            draw(key, (8, 8), jnp.bfloat16)
        functional = spam_optax.functional
        functional.spike_score(steps, window=5)
        functional.gradient_spike_score(x)
        functional.online_spike_score(x, x)
        functional.spike_mask(x, x), functional.clip_spikes(x, x)
        functional.clip_spikes(x.astype(jnp.complex64), x)
        functional.reset_ramp(jnp.arange(1, 9), 5, 2)
        functional.bias_correction(0.9, jnp.arange(1, 9))
        functional.token_embedding_variability(x)
        functional.layer_gradient_norms({"blocks": {"kernel": x}}, ["blocks"])
        functional.jacobian_norm(lambda t: t, {"a": x, "b": steps.astype(jnp.bfloat16)})
        functional.ffn_jacobian_bound(8, 32, 0.1, 0.1, 1.0)
        functional.attention_jacobian_bound(8, 0.1, 1.0, 1.0)
        for layer in (
            flax_nnx.ScaledEmbed(8, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
            flax_nnx.NormedEmbed(8, 4, rngs=nnx.Rngs(0)),
        ):
            layer.attend(layer(jnp.arange(3)))
        flax_nnx.WesarLinear(8, 4, rngs=nnx.Rngs(0))(x)
        for layer in (linen.ScaledEmbed(8, 4), linen.NormedEmbed(8, 4)):
            layer.init_with_output(key, jnp.arange(3))
        linen.WesarDense(4).init_with_output(key, x)
