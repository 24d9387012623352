"""ZClip, AdaGC, StableAdamW and Adam-mini: compared with NumPy, and their rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import numpy_relatives
import spam_optax
from studies.spike_census import architectures
from trainer import model

# Of tensors whose names say nothing, as a and b.
pytestmark = [
    pytest.mark.filterwarnings("ignore:adam_mini_partition. the names"),
    pytest.mark.one_python,
]

SHAPES = {"a": (3, 4), "b": (6,), "c": (2, 2)}
SPIKES = {30: 50.0, 31: 50.0, 47: 300.0, 90: 1e6, 110: 40.0, 130: 1e-3}
STEPS = 160


def gradients_of(steps=STEPS, spikes=SPIKES, dtype=np.float32, seed=0):
    """Returns gradients whose norms drift, with spikes of all tensors and of one."""
    rng = np.random.default_rng(seed)
    for t in range(steps):
        size = 0.1 * (1 + 0.5 * np.sin(t / 9)) * spikes.get(t, 1.0)
        gradients = {k: size * rng.normal(size=shape) for k, shape in SHAPES.items()}
        if t % 17 == 16:
            gradients["b"] = gradients["b"] * 100
        yield jax.tree.map(lambda x: np.asarray(x, dtype), gradients)


def close(ours, theirs, rtol=2e-5):
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), theirs, rtol=rtol, atol=1e-7
    )


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def params_of(dtype="float32"):
    return {name: jnp.ones(shape, dtype) for name, shape in SHAPES.items()}


# ------------------------------------------------------------------- against NumPy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_norm": None, "warmup_steps": 10},
        {"threshold": 1.5, "decay": 0.8, "eps": 0.1, "max_norm": 0.7},
    ],
)
def test_zclip_is_the_papers(settings, dtype):
    ours = spam_optax.zclip(**settings)
    renamed = {"warmup_steps": "warmup", "threshold": "z_thres", "decay": "alpha"}
    theirs = numpy_relatives.ZClip(
        **{renamed.get(name, name): value for name, value in settings.items()}
    )
    state, update = ours.init(params_of(dtype)), jax.jit(ours.update)
    factors = []
    for g in gradients_of(dtype=jnp.dtype(dtype)):
        clipped, state = update(g, state)
        wanted, factor = theirs.step([np.float64(x) for x in g.values()])
        close(state.zclip_scale, factor)
        close(state.zclip_mean, theirs.mu)
        close(state.zclip_std, np.sqrt(theirs.var), rtol=1e-4)
        for x, y in zip(clipped.values(), wanted, strict=True):
            assert x.dtype == dtype
            close(x, y, rtol=2e-5 if dtype == "float32" else 1e-2)
        factors.append(factor)
    # The spikes were among what was clipped, and not everything was.
    assert all(factors[t] < 0.1 for t in (30, 47, 90, 110) if t >= theirs.warmup)
    assert 5 < sum(factor == 1 for factor in factors) < STEPS - 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"warmup_steps": 0},
        {"threshold": 1.2, "decay": 0.8, "max_norm": 0.5, "warmup_steps": 40},
    ],
)
def test_adagc_is_the_papers(settings, dtype):
    ours = spam_optax.adagc(**settings)
    renamed = {
        **{"threshold": "lambda_rel", "decay": "beta"},
        **{"max_norm": "lambda_abs", "warmup_steps": "t_start"},
    }
    theirs = numpy_relatives.AdaGC(
        len(SHAPES), **{renamed[name]: value for name, value in settings.items()}
    )
    state, update = ours.init(params_of(dtype)), jax.jit(ours.update)
    different = 0
    for g in gradients_of(dtype=jnp.dtype(dtype)):
        clipped, state = update(g, state)
        wanted, factors = theirs.step([np.float64(x) for x in g.values()])
        close(state.adagc_scale, factors, rtol=1e-4)
        close(state.adagc_norm, theirs.gamma, rtol=1e-4)
        for x, y in zip(clipped.values(), wanted, strict=True):
            assert x.dtype == dtype
            close(x, y, rtol=1e-4 if dtype == "float32" else 1e-2)
        different += len(set(factors)) > 1
    assert different > 20


# With an eps as large as the gradients it matters where it stands.
ADAM = {"defaults": (), "others": (0.5, 0.9, 0.1)}


@pytest.mark.parametrize("betas_and_eps", ADAM.values(), ids=ADAM)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_stable_adamw_is_the_papers(dtype, betas_and_eps):
    ours = spam_optax.stable_adamw(0.01, *betas_and_eps, weight_decay=0.1)
    params = params_of(dtype)
    theirs = {
        name: numpy_relatives.StableAdamW(p, 0.01, *betas_and_eps, decay=0.1)
        for name, p in params.items()
    }
    state, update = ours.init(params), jax.jit(ours.update)
    largest = 0
    for t, g in enumerate(gradients_of(dtype=dtype)):
        if dtype == "complex64":
            phase = np.exp(1j * np.float32(t)).astype(dtype)
            g = {name: x * phase for name, x in g.items()}
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        rms = optax.tree.get(state, "update_rms")
        for i, name in enumerate(SHAPES):
            wanted = theirs[name].step(g[name])
            close(np.real(params[name]), np.real(wanted), rtol=1e-4)
            close(np.imag(params[name]), np.imag(wanted), rtol=1e-4)
            close(rms[i], theirs[name].rms, rtol=1e-4)
        largest = max(largest, rms.max())
    assert largest > (3 if betas_and_eps else 5)


def test_stable_adamw_has_float32_moments_for_bfloat16_parameters():
    """The parameters move as in float32, up to their rounding."""
    ours = spam_optax.scale_by_stable_adamw()
    params = params_of("bfloat16")
    theirs = {
        name: numpy_relatives.StableAdamW(p * 0, eta=1) for name, p in params.items()
    }
    state, update = ours.init(params), jax.jit(ours.update)
    for g in gradients_of(dtype=jnp.bfloat16):
        updates, state = update(g, state, params)
        for name, reference in theirs.items():
            before = reference.p
            step = before - reference.step(np.float64(g[name]))
            assert updates[name].dtype == jnp.bfloat16
            close(updates[name], step, rtol=1e-2)
            close(state.mu[name], reference.m * (1 - 0.9**reference.t), rtol=1e-4)
            close(state.nu[name], reference.v * (1 - 0.99**reference.t), rtol=1e-4)


def blocks_by_number(shape, blocks):
    """Returns the number of each coordinate's block, by plain index arithmetic."""
    numbers = np.zeros(shape, int)
    for index in np.ndindex(*shape):
        for i, size, parts in zip(index, shape, blocks, strict=True):
            numbers[index] = numbers[index] * parts + i // (size // parts)
    return numbers


@pytest.mark.parametrize("betas_and_eps", ADAM.values(), ids=ADAM)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adam_mini_is_the_papers(dtype, betas_and_eps):
    """The blocks are heads, rows, columns, layers and whole tensors."""
    params = {
        "query": jnp.ones((2, 3, 8), dtype),
        "wv": jnp.ones((3, 4), dtype),
        "embedding": jnp.ones((5, 3), dtype),
        "scale": jnp.ones((2, 3), dtype),
        "other": jnp.ones((2, 3, 2), dtype),
        "scalar": jnp.ones((), dtype),
    }
    partition = spam_optax.adam_mini_partition(4)
    ours = spam_optax.scale_by_adam_mini(*betas_and_eps, partition=partition)
    blocks = {
        "query": (2, 1, 4),
        "wv": (1, 4),
        "embedding": (5, 1),
        "scale": (2, 1),
        "other": (2, 1, 2),
        "scalar": (),
    }
    assert partition(params) == blocks
    theirs = {
        name: numpy_relatives.AdamMini(
            np.zeros(p.shape),
            blocks_by_number(p.shape, blocks[name]),
            1,
            *betas_and_eps,
        )
        for name, p in params.items()
    }
    state, update = ours.init(params), jax.jit(ours.update)
    rng = np.random.default_rng(0)
    for t in range(120):
        g = {
            name: np.asarray(
                rng.normal(size=p.shape) * SPIKES.get(t, 1.0), jnp.dtype(dtype)
            )
            for name, p in params.items()
        }
        updates, state = update(g, state, params)
        for name, reference in theirs.items():
            before = reference.p
            step = before - reference.step(np.float64(g[name]))
            assert state.nu[name].shape == blocks[name]
            assert state.nu[name].dtype == jnp.float32
            close(state.nu[name].ravel(), list(reference.v.values()), rtol=1e-4)
            close(updates[name], step, rtol=1e-4 if dtype == "float32" else 1e-2)


def test_adam_mini_with_a_block_a_coordinate_is_adam():
    def every_coordinate(params):
        return jax.tree.map(lambda p: p.shape, params)

    ours = spam_optax.adam_mini(0.1, partition=every_coordinate, weight_decay=0.1)
    theirs = optax.adamw(0.1, weight_decay=0.1)
    params = params_of()
    states = ours.init(params), theirs.init(params)
    updates = jax.jit(ours.update), jax.jit(theirs.update)
    for g in gradients_of(40):
        got, mini = updates[0](g, states[0], params)
        want, adam = updates[1](g, states[1], params)
        states = mini, adam
        # Optax's bias corrections are less exact.
        jax.tree.map(functools.partial(close, rtol=1e-4), got, want)


# ---------------------------------------------------------------------- properties

CLIPS = {
    "zclip": lambda: spam_optax.zclip(warmup_steps=3, count=True),
    "adagc": lambda: spam_optax.adagc(warmup_steps=3, count=True),
}
OPTIMIZERS = {
    "stable_adamw": lambda: spam_optax.scale_by_stable_adamw(count=True),
    "adam_mini": lambda: spam_optax.scale_by_adam_mini(count=True),
}
RELATIVES = CLIPS | OPTIMIZERS
STATISTICS = ("steps", "mean", "std", "norm")


def statistics(name, state):
    """Returns the statistics that a gradient without information must not change."""
    fields = state._asdict()
    if name in OPTIMIZERS:
        return {"mu": fields["mu"], "nu": fields["nu"]}
    return {x: fields[f"{name}_{x}"] for x in STATISTICS if f"{name}_{x}" in fields}


@functools.cache
def compiled(name):
    tx = RELATIVES[name]()
    return tx.init(params_of()), jax.jit(tx.update)


def warmed(name, steps):
    """Returns the state after some ordinary steps, and the compiled update."""
    state, update = compiled(name)
    for g in gradients_of(steps, spikes={}):
        _, state = update(g, state)
    return state, update


def filled(value):
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("steps", [0, 1, 2, 10])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf, 1e30])
def test_a_gradient_without_information_leaves_clips_alone(name, steps, value):
    """Updates are 0 and statistics keep every bit, before, in and after the warm-up."""
    state, update = warmed(name, steps)
    for _ in range(5):
        updates, new = update(filled(value), state)
        assert_same_bits(updates, filled(0.0))
        assert_same_bits(statistics(name, new), statistics(name, state))
        bad = 0 if value == 0 else 22
        assert new._asdict()[f"{name}_nonfinite_count"] == bad
        state = new
    assert state._asdict()[f"{name}_nonfinite_total"] == 5 * bad
    # And what comes after is clipped as if nothing had been.
    fresh, _ = warmed(name, steps)
    for g in gradients_of(6, seed=1):
        (ours, state), (theirs, fresh) = update(g, state), update(g, fresh)
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["adagc", *OPTIMIZERS])
@pytest.mark.parametrize("steps", [0, 2, 10])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_tensor_without_a_finite_coordinate(name, steps, value):
    """Its statistics stay and it does not move. Other tensors are not affected."""
    state, update = warmed(name, steps)
    (good,) = gradients_of(1, spikes={}, seed=2)
    bad = good | {"b": np.full(SHAPES["b"], value, np.float32)}
    updates, after_bad = update(bad, state)
    good_updates, after_good = update(good, state)
    assert_same_bits(updates["b"], np.zeros(SHAPES["b"]))
    for x in statistics(name, after_bad):
        old, new, other = (
            statistics(name, s)[x] for s in (state, after_bad, after_good)
        )
        if isinstance(old, dict):
            old, new, other = ([t[k] for k in SHAPES] for t in (old, new, other))
        assert_same_bits(old[1], new[1])
        if name != "adagc" or steps >= 3:  # Its warm-up is global.
            assert_same_bits((new[0], new[2]), (other[0], other[2]))
    if name != "adagc" or steps >= 3:
        for k in ("a", "c"):
            assert_same_bits(updates[k], good_updates[k])
    counts = [
        v for k, v in after_bad._asdict().items() if k.endswith("nonfinite_count")
    ]
    assert counts == [6]


@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_a_nonfinite_coordinate_counts_as_zero(name, value):
    """The step is that of a gradient with 0 there, and one coordinate is counted."""
    state, update = warmed(name, 5)
    (g,) = gradients_of(1, spikes={}, seed=2)
    bad, zero = (jax.tree.map(np.copy, g) for _ in range(2))
    bad["a"][1, 2], zero["a"][1, 2] = value, 0
    (updates, new), (wanted, reference) = update(bad, state), update(zero, state)
    assert_same_bits(updates, wanted)
    assert_same_bits(statistics(name, new), statistics(name, reference))
    assert [v for k, v in new._asdict().items() if k.endswith("nonfinite_count")] == [1]
    assert [
        v for k, v in reference._asdict().items() if k.endswith("nonfinite_count")
    ] == [0]


@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.parametrize("steps", [0, 10])
def test_norms_that_overflow(name, steps):
    """In float32 the square of 1.8e19 is finite, and the sum of several overflows."""
    state, update = warmed(name, steps)
    for _ in range(3):
        updates, state = update(filled(1.8e19), state)
        for x in jax.tree.leaves((updates, state)):
            assert np.isfinite(x).all()
        assert all((u > 0).all() for u in updates.values())
    if name == "zclip" and steps == 10:
        assert optax.tree.norm(updates) < 1.0
    if name == "adam_mini" and steps == 0:
        close(updates["a"], np.ones(SHAPES["a"]), rtol=1e-4)


@pytest.mark.parametrize("name", ["adagn", "gradient_stabilizer", "stable_spam"])
@pytest.mark.parametrize("tiny", [1e-38, 1e-41])
def test_tiny_float64_gradients(name, tiny):
    """A quotient of their norm could overflow. A norm below 2**-100 counts as 0."""
    tx = getattr(spam_optax, name)()
    with jax.enable_x64(True):
        state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
        for value in (1.0, tiny, 1e-20):
            updates, state = update(jnp.full(2, value), state)
            for x in jax.tree.leaves((updates, state)):
                assert np.isfinite(x).all()
            if value == tiny and name != "stable_spam":
                np.testing.assert_array_equal(updates, tiny)
        assert (jnp.abs(updates) > 1e-4).all()  # The last gradient is rescaled.


@pytest.mark.parametrize("name", RELATIVES)
def test_zero_gradients_from_the_start(name):
    """Nothing moves and nothing is NaN. A later gradient counts as the first."""
    state, update = warmed(name, 0)
    for _ in range(30):
        updates, state = update(filled(0.0), state)
        assert_same_bits(updates, filled(0.0))
    updates, state = update(filled(0.01), state)
    assert all((u > 0).all() for u in updates.values())
    if name in CLIPS:
        assert_same_bits(updates, filled(0.01))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", CLIPS)
def test_unclipped_gradients_pass_bit_for_bit(name):
    state, update = warmed(name, 10)
    (g,) = gradients_of(1, spikes={0: 1e-2}, seed=3)
    assert_same_bits(update(g, state)[0], g)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", ["complex64", "float64"])
def test_clips_of_other_dtypes(name, dtype):
    """The phase is kept. A number whose square overflows float32 counts as infinite."""
    with jax.enable_x64(dtype == "float64"):
        tx = RELATIVES[name]()
        params = params_of(dtype)
        state, update = tx.init(params), jax.jit(tx.update)
        phase = np.exp(0.7j) if dtype == "complex64" else 1.0
        for size in (0.01, 0.011, 0.009, 0.01, 0.011, 1e6):
            g = jax.tree.map(lambda p: jnp.full_like(p, size * phase), params)  # noqa: B023
            updates, state = update(g, state)
        for u in jax.tree.leaves(updates):
            assert u.dtype == dtype
            assert (np.abs(u) < 0.02).all() and (np.abs(u) > 1e-3).all()
            np.testing.assert_allclose(np.angle(u), np.angle(phase), rtol=1e-5)
        if dtype == "float64":
            g["a"] = g["a"].at[0, 0].set(1e100)
            updates, state = update(g, state)
            assert updates["a"][0, 0] == 0
            assert state._asdict()[f"{name}_nonfinite_total"] == 1
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_an_idle_tensor_is_not_frozen_by_adagc():
    """Zero gradients, in the warm-up or for 10,000 steps later, make no history."""
    tx = spam_optax.adagc(warmup_steps=4)
    params = {"idle": jnp.zeros(2), "busy": jnp.zeros(2)}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(8):
        g = {"idle": jnp.full(2, 0.1 * (t in (0, 2))), "busy": jnp.full(2, 0.1)}
        _, state = update(g, state)
    np.testing.assert_array_equal(state.adagc_steps, [8, 2])
    for _ in range(3):
        updates, state = update({k: jnp.full(2, 0.1) for k in params}, state)
        assert_same_bits(updates["idle"], jnp.full(2, 0.1))


# -------------------------------------------------------------- blocks of Adam-mini


class Model(nnx.Module):
    """Flax's own attention, whose kernels have an axis of heads, and an FFN."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 12, rngs=rngs, decode=False)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.up = nnx.Linear(12, 20, rngs=rngs)
        self.head = nnx.Linear(12, 11, rngs=rngs)


def by_name(params, tree):
    blocks = jax.tree.structure(params).flatten_up_to(tree)
    return dict(zip(spam_optax.tensor_names(params), blocks, strict=True))


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("as_dict", [False, True])
def test_blocks_of_flax_attention(layers, as_dict):
    """The kernels come from an NNX state or a dictionary, and may be stacked."""
    state = nnx.eval_shape(lambda: nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*layers, *x.shape), x.dtype), state
    )
    params = nnx.to_pure_dict(state) if as_dict else state
    blocks = by_name(params, spam_optax.adam_mini_partition(4)(params))
    for name, expected in {
        "attention/query/kernel": (1, 4, 1),
        "attention/key/kernel": (1, 4, 1),
        "attention/value/kernel": (1, 4, 3),
        "attention/out/kernel": (1, 1, 12),
        "attention/query/bias": (4, 1),
        "embed/embedding": (11, 1),
        "norm/scale": (1,),
        "norm/bias": (1,),
        "up/kernel": (1, 20),
        "head/kernel": (1, 11),
    }.items():
        assert blocks[name] == (*layers, *expected), name


@pytest.mark.parametrize("name", ["out", "value", "key", "down", "wo"])
def test_blocks_of_a_feed_forward_layer_beside_kernels_with_heads(name):
    """A stacked kernel has the rank of attention's. Every layer has its own blocks."""
    params = {
        "attention": {"query": {"kernel": jnp.zeros((3, 12, 4, 3))}},
        "mlp": {name: {"kernel": jnp.zeros((3, 20, 12))}},
    }
    blocks = spam_optax.adam_mini_partition(4)(params)
    assert blocks["attention"]["query"]["kernel"] == (3, 1, 4, 1)
    assert blocks["mlp"][name]["kernel"] == (3, 1, 12)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_blocks_of_stacked_matrices(num_kv_heads):
    """These are the trainer's matrices, also with fewer heads for keys and values."""
    shapes = {
        "blocks/attention/query/kernel": ((3, 12, 12), (3, 1, 4)),
        "blocks/attention/key/kernel": ((3, 12, 6), (3, 1, num_kv_heads or 4)),
        "blocks/attention/value/kernel": ((3, 12, 6), (3, 1, 6)),
        "blocks/attention/out/kernel": ((3, 12, 12), (3, 1, 12)),
        "blocks/attention_norm/scale": ((3, 12), (3, 1)),
        "blocks/ffn/gate/kernel": ((3, 12, 20), (3, 1, 20)),
        "blocks/ffn/down/kernel": ((3, 20, 12), (3, 1, 12)),
        "blocks/ffn/down/alpha": ((3,), (3,)),
        "embed/embedding": ((11, 12), (11, 1)),
        "head/kernel": ((12, 11), (1, 11)),
        "head/alpha": ((), ()),
        "norm/scale": ((12,), (1,)),
        "cell/kernel": ((12, 7), (1, 7)),
        "temperature": ((), ()),
    }
    if num_kv_heads is None:
        shapes["blocks/attention/key/kernel"] = ((3, 12, 12), (3, 1, 4))
    params = {name: jnp.zeros(shape) for name, (shape, _) in shapes.items()}
    blocks = spam_optax.adam_mini_partition(4, num_kv_heads)(params)
    assert blocks == {name: expected for name, (_, expected) in shapes.items()}
    tx = spam_optax.scale_by_adam_mini(partition=lambda params: blocks)
    state = tx.init(params)
    values = sum(x.size for x in jax.tree.leaves(state.nu))
    assert values == sum(int(np.prod(x)) for x in blocks.values())
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    jax.tree.map(lambda u: close(u, np.ones(u.shape)), updates)


# ------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_adam_mini_with_blocks_spread_over_devices(kind):
    """Heads or rows are spread over the devices, also with fewer heads than devices."""
    axis_type = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    tx = spam_optax.adam_mini(0.1, partition=spam_optax.adam_mini_partition(4, 2))
    params = {
        name: jnp.cos(jnp.arange(128.0)).reshape(8, 16)
        for name in ("query", "key", "embedding", "q_proj", "mlp")
    }
    specs = {"query": P(None, "x"), "key": P(None, ("x", "y")), "embedding": P("x")}
    specs |= {"q_proj": P("x", "y"), "mlp": P("y", "x")}

    def march(params):
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for _ in range(3):
            updates, new = update(params, state, params)
            assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
            state, params = new, optax.apply_updates(params, updates)
        return jax.device_get((params, state))

    expected = march(params)
    with jax.set_mesh(mesh):
        shardings = {k: jax.NamedSharding(mesh, spec) for k, spec in specs.items()}
        ours = march(jax.device_put(params, shardings))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), ours, expected
    )


def blocks_of(shapes, *args, **kwargs):
    partition = spam_optax.adam_mini_partition(*args, **kwargs)
    return partition({name: jnp.zeros(shape) for name, shape in shapes.items()})


def test_blocks_of_unknown_matrices():
    """Each output neuron has one block, and one warning lists the matrices."""
    shapes = {"cell/kernel": (3, 12, 7), "Dense_0/kernel": (12, 5), "mlp/w": (4, 6)}
    with pytest.warns(
        UserWarning, match="what they do: Dense_0/kernel, cell/kernel"
    ) as got:
        blocks = blocks_of(shapes)
    assert len(got) == 1
    expected = {"cell/kernel": (3, 1, 7), "Dense_0/kernel": (1, 5), "mlp/w": (1, 6)}
    assert blocks == expected


@pytest.mark.filterwarnings("error")
def test_blocks_of_names_of_other_trainers():
    """Fused and low-rank matrices are recognized and have no blocks of heads."""
    cases = {
        "h_0/attn/c_attn/kernel": ((12, 36), (1, 36)),
        "attn/kv_einsum/w": ((2, 4, 12, 3), (2, 4, 1, 3)),
        "attn/qkv/kernel": ((12, 3, 4, 5), (1, 3, 4, 5)),
        "attn/q_einsum/w": ((4, 12, 3), (4, 1, 1)),
        "attn/attn_vec_einsum/w": ((4, 3, 12), (1, 1, 12)),
        "attn/o_proj/kernel": ((12, 4, 3), (12, 1, 1)),
        "layers/query_proj/w": ((3, 12, 12), (3, 1, 4)),
        "q_proj/lora_a": ((12, 8), (1, 8)),
        "q_proj/lora_b": ((8, 4, 3), (1, 4, 3)),
        "layers/q_proj/lora_b": ((3, 8, 12), (3, 1, 12)),
        "self_attention/wq_a/kernel": ((12, 8), (1, 8)),
        "token_emb/weight": ((100, 12), (100, 1)),
        "patch_embed/proj/kernel": ((6, 12), (1, 12)),
        "logits_dense/kernel": ((12, 100), (1, 100)),
        "layers/self_attn/query/bias": ((3, 4, 3), (3, 4, 1)),
        # Names above attention say nothing of it, and the nearest name counts.
        "moe_layers/self_attention/query/kernel": ((12, 4, 3), (1, 4, 1)),
        "MAPHead_0/MultiHeadDotProductAttention_0/out/kernel": ((4, 3, 12), (1, 1, 12)),
        "self_attn/kv_a_proj_with_mqa/kernel": ((12, 8), (1, 8)),
        "posembed_output/pos_embedding": ((1, 9, 12), (1, 9, 1)),
        "unembed/embedding": ((100, 12), (100, 1)),
        "attn/c_proj/kernel": ((4, 3, 12), (1, 1, 12)),
        "attention_block/proj_q/kernel": ((12, 12), (1, 4)),
        "mixer/A_log": ((24, 16), (24, 1)),
    }
    blocks = blocks_of({name: shape for name, (shape, _) in cases.items()}, 4)
    assert blocks == {name: expected for name, (_, expected) in cases.items()}


def test_axes_are_those_of_the_tensor_itself():
    """The tensors are stacked experts and kernels with as many layers as heads."""
    shapes = {
        "attention/query/kernel": (12, 4, 3),
        "layers/query/kernel": (3, 12, 12),
        "layers/value/kernel": (3, 12, 12),
        "layers/out/kernel": (4, 12, 12),
        "attention/out/kernel": (4, 3, 12),
        "experts/out/kernel": (4, 8, 12),
    }
    assert blocks_of(shapes, 4) == {
        "attention/query/kernel": (1, 4, 1),
        "layers/query/kernel": (3, 1, 4),
        "layers/value/kernel": (3, 1, 12),
        "layers/out/kernel": (4, 1, 12),
        "attention/out/kernel": (1, 1, 12),
        "experts/out/kernel": (4, 1, 12),
    }


def test_blocks_with_layers_in_the_second_axis():
    """MaxText stacks so. An argument or the names of the axes give the axis."""
    cases = {
        "layers/mlp/wi_0/kernel": ((32, 2, 64), (1, 2, 64)),
        "layers/MoeBlock_0/wi_0": ((8, 2, 32, 64), (8, 2, 1, 64)),
        "layers/self_attention/query/kernel": ((32, 2, 4, 8), (1, 2, 4, 1)),
        "layers/self_attention/key/kernel": ((32, 2, 2, 8), (1, 2, 2, 1)),
        "layers/self_attention/value/kernel": ((32, 2, 2, 8), (1, 2, 2, 8)),
        "layers/self_attention/out/kernel": ((4, 2, 8, 32), (1, 2, 1, 32)),
        "layers/pre_norm/scale": ((32, 2), (1, 2)),
        "logits_dense/kernel": ((32, 100), (1, 100)),
        "token_embedder/embedding": ((100, 32), (100, 1)),
        "norm/scale": ((32,), (1,)),
    }
    shapes = {name: shape for name, (shape, _) in cases.items()}
    wanted = {name: blocks for name, (_, blocks) in cases.items()}
    assert blocks_of(shapes, 4, 2, layer_axis=1) == wanted
    assert blocks_of(shapes, 4, 2, layer_axis=1, stacked=["layers"]) == wanted
    with pytest.raises(ValueError, match="layer_axis must be given for the matrix"):
        blocks_of(shapes, 4, 2)
    names = {
        "mlp/wi": ("embed", "layers", "mlp"),
        "query": ("embed", "layers", "q_heads", "kv"),
        "scale": ("norm", "layers"),
    }
    arrays = {"mlp/wi": (32, 2, 64), "query": (32, 2, 4, 8), "scale": (32, 2)}
    partition = spam_optax.adam_mini_partition(4)
    arrays = {name: jnp.zeros(shape) for name, shape in arrays.items()}
    for box in (
        linen.Partitioned,
        lambda x, names: nnx.Param(x, out_sharding=names, eager_sharding=False),
    ):
        params = {name: box(x, names[name]) for name, x in arrays.items()}
        blocks = by_name(params, partition(params))
        assert blocks == {"mlp/wi": (1, 2, 64), "query": (1, 2, 4, 1), "scale": (1, 2)}


def test_blocks_of_weights_with_outputs_first():
    """Levanter, Equinox and PyTorch have such weights. Only the argument marks them."""
    cases = {
        "lm_head/weight": ((64, 32), (64, 1)),
        "embeddings/token_embeddings/weight": ((64, 32), (64, 1)),
        "mlp/gate_proj/weight": ((2, 128, 32), (2, 128, 1)),
        "self_attn/q_proj/weight/array": ((2, 2, 2, 8, 32), (2, 2, 2, 1, 1)),
        "self_attn/k_proj/weight/array": ((2, 2, 8, 32), (2, 2, 1, 1)),
        "self_attn/v_proj/weight/array": ((2, 2, 8, 32), (2, 2, 8, 1)),
        "self_attn/o_proj/weight/array": ((2, 32, 4, 8), (2, 32, 1, 1)),
        "attention/query_proj/weight": ((32, 32), (4, 1)),
        "attention/output_proj/weight": ((32, 48), (32, 1)),
        "norm/weight": ((2, 32), (2, 1)),
    }
    shapes = {name: shape for name, (shape, _) in cases.items()}
    wanted = {name: blocks for name, (_, blocks) in cases.items()}
    assert blocks_of(shapes, 4, 2, outputs_first=True) == wanted
    assert blocks_of(shapes, 4, 2, outputs_first=["weight"]) == wanted
    flat = {"lm_head/weight": (64, 32), "mlp/weight": (32, 128)}
    blocks = blocks_of(flat, outputs_first=["lm_head"])  # As in axlearn.
    assert blocks == {"lm_head/weight": (64, 1), "mlp/weight": (1, 128)}
    with pytest.raises(
        ValueError, match="outputs_first must be given for the matrix at"
    ):
        blocks_of(shapes, 4, 2)
    for name, shape, blocks in (
        ("attn/c_attn/kernel", (36, 12), (36, 1)),
        ("mlp/c_fc/kernel", (48, 12), (48, 1)),
        ("mlp/gating_einsum", (2, 48, 12), (2, 48, 1)),
    ):
        with pytest.raises(ValueError, match="outputs_first must be given"):
            blocks_of({name: shape})
        assert blocks_of({name: shape}, outputs_first=True) == {name: blocks}
        *layers, outputs, inputs = shape
        blocks = blocks_of({name: (*layers, inputs, outputs)})
        assert blocks == {name: (*layers, 1, outputs)}
    head = {
        "lm_head/weight": linen.Partitioned(jnp.zeros((64, 32)), ("vocab", "embed"))
    }
    blocks = spam_optax.adam_mini_partition()(head)
    assert by_name(head, blocks) == {"lm_head/weight": (64, 1)}


def test_ambiguous_shapes_are_refused():
    """The error names the argument to pass, and with it the shapes are accepted."""
    for name, shape, heads, argument, told, blocks in (
        ("out/kernel", (4, 8, 30), 4, "stacked", {"stacked": ["out"]}, (4, 1, 30)),
        ("out/kernel", (4, 8, 30), 4, "stacked", {"stacked": []}, (1, 1, 30)),
        (
            "value/kernel",
            (3, 8, 8),
            None,
            "num_heads",
            {"stacked": ["value"]},
            (3, 1, 8),
        ),
    ):
        with pytest.raises(ValueError, match=f"{argument} must be"):
            blocks_of({name: shape}, heads)
        assert blocks_of({name: shape}, heads, **told) == {name: blocks}
    with pytest.raises(
        ValueError, match="num_heads and num_kv_heads must be the length"
    ):
        blocks_of({"query/kernel": (8, 5, 3)}, 4, stacked=[])
    # Experts that are in no layer, among layers in the second axis.
    with pytest.raises(ValueError, match="stacked must be .* axis 1 is one of layers"):
        blocks_of({"mtp/experts/wi": (8, 16, 32)}, layer_axis=1)
    blocks = blocks_of(
        {"mtp/experts/wi": (8, 16, 32), "x/mlp": (4, 2, 6)}, layer_axis=1, stacked=["x"]
    )
    assert blocks == {"mtp/experts/wi": (8, 1, 32), "x/mlp": (1, 2, 6)}
    for told in ({"outputs_first": ["lm_haed"]}, {"stacked": ["lm_haed"]}):
        with pytest.warns(UserWarning, match="path of no tensor: lm_haed"):
            blocks_of({"lm_head/weight": (64, 32)}, **({"outputs_first": True} | told))
    for argument, value in (
        ("outputs_first", "a"),
        ("outputs_first", 1),
        ("stacked", 3),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be .* got {value!r}"):
            spam_optax.adam_mini_partition(**{argument: value})
    with pytest.raises(ValueError, match="layer_axis must be a whole number >= 0"):
        spam_optax.adam_mini_partition(layer_axis=-1)
    with pytest.raises(ValueError, match="layer_axis must be an axis of the stacked"):
        blocks_of({"mlp/kernel": (8, 5)}, layer_axis=2, stacked=["mlp"])


@pytest.mark.filterwarnings("error")
def test_no_model_of_the_trainer_has_an_unknown_matrix():
    config = model.ModelConfig(
        **{"layers": 2, "width": 8, "heads": 2, "ffn_width": 16, "vocabulary": 11},
        **{"untied_head": True, "gated_attention": True},
    )
    for decoder in (model.Decoder, architectures.GPT2, architectures.Hawk):
        params = nnx.eval_shape(
            lambda decoder=decoder: nnx.state(decoder(config, rngs=nnx.Rngs(0)))
        )
        spam_optax.adam_mini_partition(config.heads)(params)
