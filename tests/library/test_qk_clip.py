"""QK-clip: every head's logits are scaled by exactly its factor."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import spam_optax
from spam_optax import functional

pytestmark = pytest.mark.one_python

WIDTH, HEADS, HEAD = 12, 4, 6
LOGITS = np.array([50.0, 400.0, 1600.0, 100.0])


def rotate(x):
    """Rotary embedding of (tokens, heads, width)."""
    angle = np.arange(len(x))[:, None, None] / 10.0 ** np.arange(HEAD // 2)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def attention_logits(query, key, query_bias, key_bias, heads, kv_heads):
    """(heads, tokens, tokens), from kernels (in, heads * width)."""
    x = jnp.asarray(np.random.default_rng(7).normal(size=(5, WIDTH)), jnp.float32)
    q = rotate((x @ query + query_bias[None]).reshape(5, heads, HEAD))
    k = rotate((x @ key + key_bias[None]).reshape(5, kv_heads, HEAD))
    return jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, heads // kv_heads, axis=1))


# How the kernels (layers, in, heads * width) are stored, and back.
LAYOUTS = {
    "flat": (lambda x, _: x, {}),
    "heads": (lambda x, n: x.reshape(*x.shape[:-1], n, HEAD), {}),
    "outputs first": (lambda x, _: jnp.swapaxes(x, -1, -2), {"outputs_first": True}),
    "MaxText": (
        lambda x, n: jnp.moveaxis(x.reshape(*x.shape[:-1], n, HEAD), 0, 1),
        {"layer_axis": 1},
    ),
}


@pytest.mark.parametrize(("kv_heads", "balance"), [(4, 0.5), (2, 0.2), (1, 0.5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_every_head_are_scaled_by_its_factor(layout, kv_heads, balance):
    store, options = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    heads, layers = {"query": HEADS, "key": kv_heads}, 3

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def stored(tensors):
        kernels = {
            k: {"kernel": store(tensors[k], n), "bias": tensors[k + " bias"]}
            for k, n in heads.items()
        }
        for k, n in heads.items():
            if layout in ("heads", "MaxText"):
                bias = kernels[k]["bias"].reshape(layers, n, HEAD)
                moved = jnp.moveaxis(bias, 0, options.get("layer_axis", 0))
                kernels[k]["bias"] = moved
        return {"blocks": {"attention": kernels}}

    def drawn():
        kernels = {k: draw(layers, WIDTH, n * HEAD) for k, n in heads.items()}
        biases = {f"{k} bias": draw(layers, n * HEAD) for k, n in heads.items()}
        return kernels | biases

    flat_params, flat_updates = drawn(), drawn()
    params, updates = stored(flat_params), stored(flat_updates)
    logits = jnp.asarray(np.stack([LOGITS, LOGITS[::-1], np.full(4, 3.0)]))
    tx = spam_optax.qk_clip(
        100.0, balance=balance, find=spam_optax.query_key_tensors(**options)
    )
    clipped, state = jax.jit(tx.update)(
        updates, tx.init(params), params, attention_logits=logits
    )
    # The layout is undone by autodiff: storing is linear, and a permutation.
    back = jax.linear_transpose(stored, flat_params)
    (flat_new,) = back(optax.apply_updates(params, clipped))
    for layer in range(layers):
        before, after = (
            attention_logits(
                *(tree[name][layer] for name in ("query", "key")),
                *(tree[f"{name} bias"][layer] for name in ("query", "key")),
                HEADS,
                kv_heads,
            )
            for tree in (optax.apply_updates(flat_params, flat_updates), flat_new)
        )
        factor = np.minimum(1, 100 / logits[layer])[:, None, None]
        np.testing.assert_allclose(after, before * factor, rtol=2e-5, atol=2e-3)
    assert state.qk_clip_clipped_count == 4
    assert state.max_attention_logit == 1600


def test_heads_within_the_threshold_keep_every_bit():
    params = {"q": jnp.linspace(-1, 1, 24).reshape(3, 8), "k": jnp.ones((3, 8))}
    updates = jax.tree.map(lambda p: p / 3, params)
    tx = spam_optax.qk_clip()
    logits = jnp.array([100.0, 250.0])
    clipped, _ = tx.update(updates, tx.init(params), params, attention_logits=logits)
    for name in params:
        np.testing.assert_array_equal(clipped[name][:, :4], updates[name][:, :4])
        assert not np.array_equal(clipped[name][:, 4:], updates[name][:, 4:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -5.0])
def test_a_logit_that_is_not_finite_or_negative_clips_nothing(bad):
    params = {"q": jnp.ones((3, 8)), "k": jnp.ones((3, 8))}
    tx = spam_optax.qk_clip()
    logits = jnp.array([bad, 1.0])
    clipped, state = tx.update(params, tx.init(params), params, attention_logits=logits)
    jax.tree.map(np.testing.assert_array_equal, clipped, params)
    assert state.qk_clip_clipped_count == 0


def test_recording_alone_reads_no_parameter():
    params = {"query": jnp.full((4, 8), jnp.nan), "key": jnp.full((4, 8), jnp.inf)}
    updates = jax.tree.map(jnp.ones_like, params)
    tx = spam_optax.qk_clip(None)
    got, state = tx.update(
        updates, tx.init(params), params, attention_logits=jnp.array([3.0, 5.0])
    )
    jax.tree.map(np.testing.assert_array_equal, got, updates)
    assert state.max_attention_logit == 5


def test_without_a_threshold_logits_are_only_recorded():
    params = {"q": jnp.ones((3, 8)), "k": jnp.ones((3, 8))}
    tx = spam_optax.qk_clip(None)
    logits = jnp.array([1e6, 1.0])
    clipped, state = tx.update(params, tx.init(params), params, attention_logits=logits)
    jax.tree.map(np.testing.assert_array_equal, clipped, params)
    assert (state.max_attention_logit, state.qk_clip_clipped_count) == (1e6, 0)


def test_a_skipped_step_clips_nothing_and_drops_its_logits():
    params = {"q": jnp.ones((3, 8)), "k": jnp.ones((3, 8))}
    chain = optax.chain(optax.adam(0.1), spam_optax.qk_clip())
    tx = spam_optax.skip_spikes(chain)
    logits = jnp.array([1e3, 1.0])
    state = tx.init(params)
    updates, new = tx.update(
        params, state, params, value=jnp.nan, attention_logits=logits
    )
    assert not any(map(np.any, jax.tree.leaves(updates)))
    jax.tree.map(np.testing.assert_array_equal, new.inner_state, state.inner_state)
    updates, new = tx.update(params, new, params, value=1.0, attention_logits=logits)
    assert optax.tree.get(new, "qk_clip_clipped_total") == 1


def test_repeated_clipping_holds_logits_that_would_grow():
    """An optimizer that makes queries and keys grow by 5 % in every step."""
    x = np.random.default_rng(0).normal(size=(9, WIDTH)).astype(np.float32)

    def logits_of(params):
        q, k = ((x @ params[name]).reshape(len(x), HEADS, HEAD) for name in ("q", "k"))
        return jnp.einsum("qhd,khd->hqk", q, k).max((1, 2))

    params = {
        name: jnp.asarray(np.random.default_rng(i).normal(size=(WIDTH, HEADS * HEAD)))
        for i, name in enumerate(("q", "k"))
    }
    for threshold, low, high in ((None, 1e3, np.inf), (100.0, 99, 111)):
        tx = spam_optax.qk_clip(threshold)
        p, state, update = params, tx.init(params), jax.jit(tx.update)
        for _ in range(40):
            updates = jax.tree.map(lambda x: 0.05 * x, p)
            updates, state = update(updates, state, p, attention_logits=logits_of(p))
            p = optax.apply_updates(p, updates)
        assert low < logits_of(p).max() < high


def test_tensors_of_flax_are_found():
    linen = nn.MultiHeadDotProductAttention(num_heads=2)
    params = linen.init(jax.random.key(0), jnp.ones((1, 3, 8)))["params"]
    found = spam_optax.query_key_tensors()(params)
    assert found["query"]["kernel"] == ("", "query", 1, 0)
    assert found["key"]["bias"] == ("", "key", 0, 0)
    assert found["value"]["kernel"] is None and found["out"]["kernel"] is None

    module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    found = spam_optax.query_key_tensors()(state)
    names = {leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, str) and leaf}
    assert names == {"query", "key"}
    tx = spam_optax.qk_clip()
    updates, _ = tx.update(
        state, tx.init(state), state, attention_logits=jnp.array([1.0, 400.0])
    )
    kernel = jax.tree.leaves(updates["query"]["kernel"])[0]
    whole = jax.tree.leaves(state["query"]["kernel"])[0]
    # Half of twice the kernel, less the kernel: 0.
    np.testing.assert_allclose(kernel[:, 1], 0 * whole[:, 1], atol=1e-6)
    np.testing.assert_array_equal(kernel[:, 0], whole[:, 0])


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("decoder/layers/self_attention/query/kernel", "decoder/layers/self_attention"),
        ("model/layers/0/self_attn/q_proj/kernel", "model/layers/0/self_attn"),
        ("layers/3/attention/wq/kernel", "layers/3/attention"),
        ("layer_0/attn/q_einsum/w", "layer_0/attn"),
        ("model.layers.0.self_attn.q_proj.kernel", "model/layers/0/self_attn"),
    ],
)
def test_attention_layers_are_named_by_the_path_before_the_query(name, attention):
    (found,) = spam_optax.query_key_tensors()({name: jnp.ones((2, 4, 8))}).values()
    assert found.attention == attention
    assert found.head_axis == (0 if "einsum" in name else 1)


def test_several_layers_take_a_dictionary():
    params = {
        f"layers_{i}": {"attention": {k: jnp.ones((3, 8)) for k in ("query", "key")}}
        for i in range(2)
    }
    tx = spam_optax.qk_clip()
    logits = {
        "layers_0/attention": jnp.array([1.0, 1.0]),
        "layers_1/attention": jnp.array([1.0, 400.0]),
    }
    update = jax.tree.map(jnp.zeros_like, params)
    clipped, state = tx.update(update, tx.init(params), params, attention_logits=logits)
    assert state.qk_clip_clipped_count == 1
    assert not np.any(clipped["layers_0"]["attention"]["query"])
    np.testing.assert_allclose(clipped["layers_1"]["attention"]["key"][:, 4:], -0.5)


GOOD = {"query": np.ones((3, 8)), "key": np.ones((3, 8))}
FUSED = {"qkv": np.ones((3, 24))}
NORMED = {"attention": GOOD | {"query_norm": {"scale": np.ones(4)}}}
MISTAKES = {
    "no logits": (GOOD, None, "attention_logits must have the largest logits of"),
    "wrong number of heads": (GOOD, np.ones(3), "multiples of 3"),
    "wrong rank": (GOOD, np.ones((1, 1, 2)), r"shape \(heads,\)"),
    "no such stack": (GOOD, np.ones((5, 2)), "for a stack"),
    "wrong name": (GOOD, {"other": np.ones(2)}, "got those of other"),
    "no heads": (GOOD, np.ones(0), r"shape \(heads,\)"),
    "no layer": (GOOD, {}, "got those of no layer"),
    "number as a name": (GOOD, {1: np.ones(2)}, "got those of 1"),
    "fused": (FUSED, np.ones(2), "fused tensor qkv"),
    "nothing found": ({"mlp": np.ones((3, 8))}, np.ones(2), "pass find="),
    "no key": ({"query": np.ones((3, 8))}, np.ones(2), "no key"),
    "normalized": (NORMED, np.ones(2), "query_norm"),
    "either order": (
        {"query": {"weight": np.ones((8, 8))}},
        np.ones(2),
        "outputs_first must be given",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake):
    params, logits, words = MISTAKES[mistake]
    tx = spam_optax.qk_clip()
    with pytest.raises(ValueError, match=words) as error:
        tx.update(params, tx.init(params), params, attention_logits=logits)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(("qk_clip: ", "query_key_tensors: "))


@pytest.mark.parametrize("logits", ["high", None, [[1, 2], [3]], np.ones(2) * 1j])
def test_logits_must_be_real_numbers(logits):
    tx = spam_optax.qk_clip()
    words = r"^qk_clip: attention_logits of  must be an array of real numbers, got .*$"
    with pytest.raises(TypeError, match=words):
        tx.update(GOOD, tx.init(GOOD), GOOD, attention_logits={"": logits})


def test_parameters_and_updates_must_fit():
    tx, logits = spam_optax.qk_clip(), np.ones(2)
    whole = jax.tree.map(lambda x: x.astype(int), GOOD)
    for updates, params, words in (
        (GOOD, None, "update needs the parameters, got None"),
        ({"key": GOOD["key"]}, GOOD, "updates must be a tree like the parameters"),
        (GOOD | {"key": np.ones(8)}, GOOD, r"must have the shape \(3, 8\)"),
        (whole, GOOD, "the update at .* must have a floating"),
        (GOOD, whole, "the parameter at .* must have a floating"),
        (GOOD | {"key": None}, GOOD, "the update at .*key.* must be an array"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^qk_clip: .*{words}.*$"):
            tx.update(updates, tx.init(GOOD), params, attention_logits=logits)
    for found in (None, {}, {"query": 1, "key": 2}, {"query": None, "key": None}):
        with pytest.raises(ValueError, match="^qk_clip: find must return a tree"):
            spam_optax.qk_clip(find=lambda params, found=found: found).update(
                GOOD, tx.init(GOOD), GOOD, attention_logits=logits
            )


@pytest.mark.parametrize(
    "wrong", [{"kind": "q"}, {"head_axis": -1}, {"layer_axis": -3}]
)
def test_tensors_that_find_describes_must_be_possible(wrong):
    tensors = {x: spam_optax.HeadTensor("", x, 1)._replace(**wrong) for x in GOOD}
    tx = spam_optax.qk_clip(find=lambda params: tensors)
    with pytest.raises(
        ValueError, match="^qk_clip: find must .* query or key and axes"
    ):
        tx.update(GOOD, tx.init(GOOD), GOOD, attention_logits=np.ones(2))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_kernels_send_nothing(kind):
    axis_type = getattr(jax.sharding.AxisType, kind.capitalize())
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P("data", "model"))
        params = {
            name: jax.device_put(jnp.ones((8, 16)), spec) for name in ("query", "key")
        }
        logits = jax.device_put(
            jnp.array([1.0, 400.0, 1.0, 1.0]), NamedSharding(mesh, P())
        )
        tx = spam_optax.qk_clip()
        update = jax.jit(tx.update)
        state = tx.init(params)
        compiled = update.lower(
            params, state, params, attention_logits=logits
        ).compile()
        updates, _ = compiled(params, state, params, attention_logits=logits)
        for kind_of_collective in ("all-reduce", "all-gather", "collective-permute"):
            assert kind_of_collective not in compiled.as_text()
    np.testing.assert_allclose(np.asarray(updates["query"])[:, 4:8], 0, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(updates["query"])[:, :4], 1)
    assert updates["key"].sharding.spec == P("data", "model")


def test_functions_refuse_what_they_cannot_use():
    kernel, ones = jnp.ones((2, 4)), jnp.ones(2)
    for number in ({"num_kv_heads": 0}, {"threshold": -1.0}, {"balance": 2.0}):
        with pytest.raises(ValueError, match=f"qk_clip_factors: {next(iter(number))}"):
            functional.qk_clip_factors(ones, **number)
    with pytest.raises(AssertionError, match="logits must have real numbers"):
        functional.qk_clip_factors(ones * 1j)
    with pytest.raises(AssertionError, match="losses must have real numbers"):
        functional.spike_steps(ones * 1j)
    for factors, axes in ((ones, (2, None)), (ones, (-1, None)), (kernel, (0, 0))):
        with pytest.raises(AssertionError, match="scale_heads: head_axis and layer_"):
            functional.scale_heads(kernel, factors, *axes)
    for factors, axes in ((jnp.ones(3), (1, None)), (ones, (1, 0)), (ones[:0], (1,))):
        with pytest.raises(AssertionError, match="scale_heads: factors must have the"):
            functional.scale_heads(kernel, factors, *axes)
    with pytest.raises(AssertionError, match="num_kv_heads must divide .* 2, got 3"):
        functional.qk_clip_factors(ones, 3)
    with pytest.raises(
        AssertionError, match=r"logits must have the shape \(..., heads"
    ):
        functional.qk_clip_factors(1.0)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_factors_of_the_largest_logits_are_finite(balance):
    factors = functional.qk_clip_factors(jnp.array([3e38]), None, 1e-5, balance)
    assert all(np.isfinite(x) and 0 < x <= 1 for x in np.concatenate(factors))


def test_factors_beside_numpy():
    rng = np.random.default_rng(1)
    for kv_heads in (1, 2, 3, 6):
        logits = np.exp(rng.normal(4, 2, size=(50, 6)))
        queries, keys = functional.qk_clip_factors(jnp.asarray(logits), kv_heads, 60.0)
        for row in range(50):
            gamma = [min(1.0, 60.0 / s) for s in logits[row]]
            for h in range(6):
                group = h // (6 // kv_heads)
                product = queries[row, h] * keys[row, group]
                np.testing.assert_allclose(product, gamma[h], rtol=1e-5)
        assert queries.max() <= 1 and keys.max() <= 1
