"""Linen: the initializers in Flax's layers, ScaledEmbed and NormedEmbed."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import spam_optax
from spam_optax import initializers, linen

VOCABULARY, WIDTH, NUM_LAYERS = 512, 160, 8
# A variance of 2 / (5 * 160) is 1 / 400, and sqrt(2 * 8) is 4.
STD, RESIDUAL_STD = 0.05, 0.0125
IDS = jnp.arange(VOCABULARY).reshape(16, 32)

each_embed = pytest.mark.parametrize("module", [linen.ScaledEmbed, linen.NormedEmbed])


def init_embed(module, **kwargs):
    """An embedding and its variables."""
    embed = module(VOCABULARY, WIDTH, **kwargs)
    return embed, embed.init(jax.random.key(0), IDS)


def test_initializers_work_in_flax_layers():
    """Guards positional calls and flattened kernels: the std of real parameters."""
    init = initializers.stable(WIDTH, NUM_LAYERS)
    head = (4, WIDTH // 4)
    layers = {
        "dense": (nn.Dense(WIDTH, kernel_init=init.kernel), STD),
        "general": (nn.DenseGeneral(head, kernel_init=init.kernel), STD),
        "output": (nn.Dense(WIDTH, kernel_init=init.residual), RESIDUAL_STD),
    }
    for name, (layer, std) in layers.items():
        kernel = layer.init(jax.random.key(0), jnp.ones((1, WIDTH)))["params"]["kernel"]
        assert kernel.std() == pytest.approx(std, rel=0.02), name
    embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=init.embedding)
    table = embed.init(jax.random.key(0), IDS)["params"]["embedding"]
    assert table.std() == pytest.approx(STD, rel=0.02)


def test_initializers_work_in_attention():
    """Guards that the residual initializer reaches attention-out and only that."""
    init = initializers.stable(WIDTH, NUM_LAYERS)
    attention = nn.MultiHeadDotProductAttention(
        num_heads=4, kernel_init=init.kernel, out_kernel_init=init.residual
    )
    params = attention.init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))["params"]
    stds = {"query": STD, "key": STD, "value": STD, "out": RESIDUAL_STD}
    for name, std in stds.items():
        assert params[name]["kernel"].std() == pytest.approx(std, rel=0.02), name


@pytest.mark.parametrize(
    ("module", "std"), [(linen.ScaledEmbed, 0.4**0.5), (linen.NormedEmbed, 1.0)]
)
def test_output_has_the_std_of_condition_2(module, std):
    """Guards the default initializer: Flax's own gives ScaledEmbed 1, not 0.632."""
    embed, variables = init_embed(module)
    output = embed.apply(variables, IDS)
    assert output.shape == (*IDS.shape, WIDTH)
    assert output.std() == pytest.approx(std, rel=0.02)
    assert variables["params"]["embedding"].std() == pytest.approx(STD, rel=0.02)


def test_scaled_embed_is_the_table_times_root_width():
    """Guards the factor itself, and its gradient with respect to the table."""
    embed, variables = init_embed(linen.ScaledEmbed)
    table = variables["params"]["embedding"]
    np.testing.assert_allclose(
        embed.apply(variables, IDS),
        160**0.5 * table.reshape(*IDS.shape, WIDTH),
        rtol=1e-6,
    )
    total = jax.jit(lambda v: embed.apply(v, jnp.array([3, 3, 5])).sum())
    rows = jax.grad(total)(variables)["params"]["embedding"].mean(axis=1)
    np.testing.assert_allclose(rows[jnp.array([3, 4, 5])], [2 * 160**0.5, 0, 160**0.5])


def test_normed_embed_is_the_table_after_a_layer_norm():
    """Guards that the norm follows the lookup and that its parameters are used."""
    embed, variables = init_embed(linen.NormedEmbed)
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params["norm"]) == {
        "bias": (WIDTH,),
        "scale": (WIDTH,),
    }
    changed = params | {"norm": {"bias": jnp.ones(WIDTH), "scale": jnp.full(WIDTH, 3)}}
    want = 1 + 3 * jax.nn.standardize(params["embedding"], epsilon=1e-6)
    got = embed.apply({"params": changed}, IDS)
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-4, atol=1e-4)


@each_embed
def test_attend_uses_the_raw_table(module):
    """Guards tied heads: neither the factor nor the norm enters the logits."""
    embed, variables = init_embed(module)
    query = jax.random.normal(jax.random.key(1), (VOCABULARY, WIDTH))
    logits = embed.apply(variables, query, method="attend")
    want = query @ variables["params"]["embedding"].T
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    assert logits.std() == pytest.approx(0.4**0.5, rel=0.02)


@each_embed
def test_bfloat16_computation_keeps_float32_parameters(module):
    """Guards mixed precision: no float32 sneaks out, and the values are right."""
    embed, variables = init_embed(module, dtype=jnp.bfloat16)
    exact, _ = init_embed(module)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    output = jax.jit(embed.apply)(variables, IDS)
    assert output.dtype == jnp.bfloat16
    # The rounded table, the rounded factor and the product: three times 2**-9.
    want = exact.apply(variables, IDS)
    np.testing.assert_allclose(output.astype("f4"), want, rtol=2**-7, atol=2**-7)


@each_embed
def test_param_dtype_holds_for_every_parameter(module):
    """Guards the norm's parameters, which Flax would make float32."""
    embed, variables = init_embed(module, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
    assert embed.apply(variables, IDS).dtype == jnp.bfloat16


def test_numpy_width_does_not_widen_bfloat16():
    """Guards the factor's type: a NumPy scalar would promote the output to float32."""
    embed = linen.ScaledEmbed(VOCABULARY, np.int64(WIDTH), dtype=jnp.bfloat16)
    output, _ = embed.init_with_output(jax.random.key(0), IDS)
    assert output.dtype == jnp.bfloat16


@each_embed
def test_partitioning_metadata_reaches_the_table(module):
    """Guards Linen's way to shard: an initializer wrapped in with_partitioning."""
    init = nn.with_partitioning(initializers.stable_embedding(WIDTH), ("x", None))
    embed = module(VOCABULARY, WIDTH, embedding_init=init)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        variables = jax.jit(embed.init)(jax.random.key(0), IDS)
        specs = nn.get_partition_spec(variables)["params"]
        assert specs["embedding"] == jax.P("x", None)
        table = nn.unbox(variables)["params"]["embedding"]
        assert table.sharding.shard_shape(table.shape) == (VOCABULARY // 8, WIDTH)
        got = jax.jit(embed.apply)(variables, IDS)
    want = embed.apply({"params": jax.device_get(nn.unbox(variables)["params"])}, IDS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@each_embed
@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_explicit_mesh(module, spec):
    """Lookups in a sharded table work as the docstring describes."""
    embed, variables = init_embed(module)
    want = embed.apply(variables, IDS)
    sharding = jax.P(None, None, "x")
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        params = jax.device_get(variables["params"])
        table = jax.device_put(params["embedding"], jax.P(*spec))
        apply = jax.sharding.auto_axes(embed.apply, out_sharding=sharding)
        got = jax.jit(apply)({"params": params | {"embedding": table}}, IDS)
        assert jax.typeof(got).sharding.spec == sharding
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_adam_mini_of_partitioned_parameters():
    """The second moments of heads do not take over the sharding of their outputs."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=auto)
    draw = nn.with_partitioning(nn.initializers.lecun_normal(), ("x", "y"))
    query = nn.Dense(16, name="query", kernel_init=draw)
    tx = spam_optax.adam_mini(0.1, partition=spam_optax.adam_mini_partition(1))

    def init():
        variables = query.init(jax.random.key(0), jnp.ones((2, 16)))
        return variables, tx.init({"query": variables})

    def update(variables, state):
        return tx.update({"query": variables}, state, {"query": variables})

    specs = nn.get_partition_spec(jax.eval_shape(init))
    is_spec = lambda x: isinstance(x, jax.P)  # noqa: E731
    place = lambda spec: jax.NamedSharding(mesh, spec)  # noqa: E731
    expected, _ = jax.jit(update)(*jax.jit(init)())
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(place, specs, is_leaf=is_spec)
        updates, _ = jax.jit(update)(*jax.jit(init, out_shardings=shardings)())
    close_to = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    jax.tree.map(close_to, jax.device_get(updates), expected)


def test_error_without_flax_names_what_to_install(monkeypatch):
    """Guards the message of an installation without the extra."""
    monkeypatch.delitem(sys.modules, "spam_optax.linen")
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"pip install spam_optax\[flax\]"):
        importlib.import_module("spam_optax.linen")
