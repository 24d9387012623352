"""NNX: the initializers in Flax's layers, ScaledEmbed and NormedEmbed."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import spam_optax
from spam_optax import initializers, nnx

VOCABULARY, WIDTH, NUM_LAYERS = 512, 160, 8
# A variance of 2 / (5 * 160) is 1 / 400, and sqrt(2 * 8) is 4.
STD, RESIDUAL_STD = 0.05, 0.0125
IDS = jnp.arange(VOCABULARY).reshape(16, 32)

each_embed = pytest.mark.parametrize("module", [nnx.ScaledEmbed, nnx.NormedEmbed])


def make_embed(module, **kwargs):
    """An embedding drawn from seed 0."""
    return module(VOCABULARY, WIDTH, rngs=flax_nnx.Rngs(0), **kwargs)


def param_dtypes(module):
    """The set of dtypes of a module's parameters."""
    return {x.dtype for x in jax.tree.leaves(flax_nnx.state(module, flax_nnx.Param))}


def test_initializers_work_in_flax_layers():
    """Guards positional calls and flattened kernels: the std of real parameters."""
    init = initializers.stable(WIDTH, NUM_LAYERS)
    head = (4, WIDTH // 4)
    layers = [
        (flax_nnx.Linear, WIDTH, init.kernel, STD),
        (flax_nnx.Linear, WIDTH, init.residual, RESIDUAL_STD),
        (flax_nnx.LinearGeneral, head, init.kernel, STD),
    ]
    for module, shape, kernel_init, std in layers:
        layer = module(WIDTH, shape, kernel_init=kernel_init, rngs=flax_nnx.Rngs(0))
        assert layer.kernel[...].std() == pytest.approx(std, rel=0.02), layer
    embed = make_embed(flax_nnx.Embed, embedding_init=init.embedding)
    assert embed.embedding[...].std() == pytest.approx(STD, rel=0.02)


def test_initializers_work_in_attention():
    """Guards that the residual initializer reaches attention-out and only that."""
    init = initializers.stable(WIDTH, NUM_LAYERS)
    attention = flax_nnx.MultiHeadAttention(
        num_heads=4,
        in_features=WIDTH,
        kernel_init=init.kernel,
        out_kernel_init=init.residual,
        decode=False,
        rngs=flax_nnx.Rngs(0),
    )
    stds = {"query": STD, "key": STD, "value": STD, "out": RESIDUAL_STD}
    for name, std in stds.items():
        kernel = getattr(attention, name).kernel[...]
        assert kernel.std() == pytest.approx(std, rel=0.02), name


@pytest.mark.parametrize(
    ("module", "std"), [(nnx.ScaledEmbed, 0.4**0.5), (nnx.NormedEmbed, 1.0)]
)
def test_output_has_the_std_of_condition_2(module, std):
    """Guards the default initializer: Flax's own gives ScaledEmbed 1, not 0.632."""
    embed = make_embed(module)
    output = embed(IDS)
    assert output.shape == (*IDS.shape, WIDTH)
    assert output.std() == pytest.approx(std, rel=0.02)
    assert embed.embedding[...].std() == pytest.approx(STD, rel=0.02)


def test_scaled_embed_is_the_table_times_root_width():
    """Guards the factor itself, and its gradient with respect to the table."""
    embed = make_embed(nnx.ScaledEmbed)
    want = 160**0.5 * embed.embedding[...].reshape(*IDS.shape, WIDTH)
    np.testing.assert_allclose(embed(IDS), want, rtol=1e-6)

    @flax_nnx.jit
    @flax_nnx.grad
    def gradient(embed):
        return embed(jnp.array([3, 3, 5])).sum()

    rows = gradient(embed).embedding[...].mean(axis=1)
    np.testing.assert_allclose(
        rows[3:6], [2 * 160**0.5, 0, 160**0.5], rtol=1e-6, atol=1e-6
    )


def test_normed_embed_is_the_table_after_a_layer_norm():
    """Guards that the norm follows the lookup and that its parameters are used."""
    embed = make_embed(nnx.NormedEmbed)
    embed.norm.scale[...] = jnp.full(WIDTH, 3.0)
    embed.norm.bias[...] = jnp.ones(WIDTH)
    want = 1 + 3 * jax.nn.standardize(embed.embedding[...], epsilon=1e-6)
    np.testing.assert_allclose(
        embed(IDS), want.reshape(*IDS.shape, WIDTH), rtol=1e-4, atol=1e-4
    )


@each_embed
def test_attend_uses_the_raw_table(module):
    """Guards tied heads: neither the factor nor the norm enters the logits."""
    embed = make_embed(module)
    query = jax.random.normal(jax.random.key(1), (VOCABULARY, WIDTH))
    logits = embed.attend(query)
    want = query @ embed.embedding[...].T
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    assert logits.std() == pytest.approx(0.4**0.5, rel=0.02)


@each_embed
def test_bfloat16_computation_keeps_float32_parameters(module):
    """Guards mixed precision: no float32 sneaks out, and the values are right."""
    embed = make_embed(module, dtype=jnp.bfloat16)
    assert param_dtypes(embed) == {jnp.dtype("float32")}
    output = flax_nnx.jit(lambda embed, ids: embed(ids))(embed, IDS)
    assert output.dtype == jnp.bfloat16
    assert embed.attend(output).dtype == jnp.bfloat16
    # The rounded table, the rounded factor and the product: three times 2**-9.
    want = make_embed(module)(IDS)
    np.testing.assert_allclose(output.astype("f4"), want, rtol=2**-7, atol=2**-7)


@each_embed
def test_param_dtype_holds_for_every_parameter(module):
    """Guards the norm's parameters, which Flax would make float32."""
    embed = make_embed(module, param_dtype=jnp.bfloat16)
    assert param_dtypes(embed) == {jnp.dtype("bfloat16")}
    assert embed(IDS).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nnx.ScaledEmbed, {(VOCABULARY, WIDTH)}),
        (nnx.NormedEmbed, {(VOCABULARY, WIDTH), (*IDS.shape, WIDTH), (WIDTH,)}),
    ],
)
def test_promote_dtype_is_used_throughout(module, shapes):
    """Guards that a promotion of the user's reaches the lookup and the norm."""
    seen = set()

    def promote(arrays, **kwargs):
        seen.update(x.shape for x in arrays)
        return flax_nnx.nn.dtypes.promote_dtype(arrays, **kwargs)

    make_embed(module, promote_dtype=promote)(IDS)
    assert seen == shapes


def test_numpy_width_does_not_widen_bfloat16():
    """Guards the factor's type: a NumPy scalar would promote the output to float32."""
    embed = nnx.ScaledEmbed(
        VOCABULARY, np.int64(WIDTH), dtype=jnp.bfloat16, rngs=flax_nnx.Rngs(0)
    )
    assert embed(IDS).dtype == jnp.bfloat16


@each_embed
@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_explicit_mesh(module, spec):
    """Guards metadata, out_sharding and values with the table in eight parts."""
    ids, out_sharding = IDS, jax.P(None, None, "x")
    plain = make_embed(module)
    want, want_logits = plain(ids), plain.attend(plain(ids))
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        embed = make_embed(module, embedding_metadata={"out_sharding": spec})
        assert jax.typeof(embed.embedding[...]).sharding.spec == jax.P(*spec)
        lookup = flax_nnx.jit(lambda embed, ids: embed(ids, out_sharding=out_sharding))
        output = lookup(embed, ids)
        assert jax.typeof(output).sharding.spec == out_sharding
        logits = embed.attend(want, out_sharding=out_sharding)
        assert jax.typeof(logits).sharding.spec == out_sharding
    np.testing.assert_allclose(output, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-4, atol=1e-4)


STATEFUL = {
    "sparse_spam": lambda: spam_optax.sparse_spam(0.1, row_blocks=4),
    "stable_spam": lambda: spam_optax.stable_spam(0.1),
    "track_spikes": lambda: spam_optax.track_spikes(spam_optax.spam(0.1)),
    "adam_mini": lambda: spam_optax.adam_mini(
        0.1, partition=spam_optax.adam_mini_partition(2)
    ),
}


@pytest.mark.one_python
@pytest.mark.parametrize("name", STATEFUL)
def test_optimizer_of_sharded_parameters(name):
    """States of other shapes than the parameters do not take over their sharding."""

    class Model(flax_nnx.Module):
        def __init__(self):
            draw = flax_nnx.initializers.normal()
            for name, spec in (("query", (None, "x")), ("mlp", ("x", "y"))):
                kernel_init = flax_nnx.with_partitioning(draw, spec)
                rngs = flax_nnx.Rngs(0)
                layer = flax_nnx.Linear(16, 16, kernel_init=kernel_init, rngs=rngs)
                setattr(self, name, layer)

    @flax_nnx.jit
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.cos, flax_nnx.state(model)))

    def march():
        model = Model()
        optimizer = flax_nnx.Optimizer(model, STATEFUL[name](), wrt=flax_nnx.Param)
        for _ in range(2):
            step(model, optimizer)
        return jax.device_get(flax_nnx.to_pure_dict(flax_nnx.state(model)))

    one_device = jax.make_mesh((1, 1), ("x", "y"), devices=jax.devices()[:1])
    with jax.set_mesh(one_device):
        params = flax_nnx.state(Model(), flax_nnx.Param)
        described = spam_optax.describe_tensors(STATEFUL[name]().init(params), params)
        assert [d.role for d in described][1::2] == ["feed-forward", "query"]
        expected = march()
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"))):
        ours = march()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        ours,
        expected,
    )


def test_error_without_flax_names_what_to_install(monkeypatch):
    """Guards the message of an installation without the extra."""
    monkeypatch.delitem(sys.modules, "spam_optax.nnx")
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"pip install spam_optax\[flax\]"):
        importlib.import_module("spam_optax.nnx")
