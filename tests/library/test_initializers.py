"""Initializers: distributions, dtypes, keys, meshes, and the bounds on Jacobians.

That Flax's layers take them is tested in test_linen.py and test_nnx.py.
"""

import functools
import inspect
import math

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spam_optax import functional, initializers, nnx

pytestmark = pytest.mark.one_python

WIDTH, NUM_LAYERS = 640, 12
# A variance of 2 / (5 * 640) is 1 / 1600, and sqrt(2 * 12) is 4.899.
CASES = {
    "kernel": (initializers.stable_kernel(WIDTH), 0.025),
    "residual": (initializers.stable_residual(WIDTH, NUM_LAYERS), 0.025 / 24**0.5),
    "embedding": (initializers.stable_embedding(WIDTH), 0.025),
    "stable.kernel": (initializers.stable(WIDTH, NUM_LAYERS).kernel, 0.025),
    "stable.residual": (
        initializers.stable(WIDTH, NUM_LAYERS).residual,
        0.025 / 24**0.5,
    ),
    "stable.embedding": (initializers.stable(WIDTH, NUM_LAYERS).embedding, 0.025),
}
each_case = pytest.mark.parametrize(
    ("init", "std"), list(CASES.values()), ids=list(CASES)
)


@each_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_draws_are_normal_with_the_papers_std(init, std, dtype):
    """Guards std against variance, truncation, and bfloat16's coarse normal draws."""
    draw = init(jax.random.key(0), (1000, 500), dtype)
    assert draw.dtype == dtype
    scores = np.asarray(draw, np.float64) / std
    assert scores.std() == pytest.approx(1, rel=0.02)
    # The standard errors at 500 000 draws are 0.0014 and 0.007. Drawn in bfloat16,
    # the mean is -0.012; truncated at 2 std, the kurtosis is 2.4.
    assert abs(scores.mean()) < 0.006
    assert np.mean(scores**4) / scores.var() ** 2 == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("shape", [(500_000,), (10, 50, 1000)])
def test_std_does_not_depend_on_the_shape(shape):
    """Guards the difference to fan-in rules: flattened and stacked kernels agree."""
    draw = initializers.stable_kernel(WIDTH)(jax.random.key(1), shape)
    assert draw.shape == shape
    assert draw.std() == pytest.approx(0.025, rel=0.01)


@each_case
def test_signature_is_that_of_jax(init, std):
    """Guards the order that Flax relies on: it passes three arguments by position."""
    del std
    want = inspect.signature(jax.nn.initializers.normal()).parameters
    assert list(inspect.signature(init).parameters) == list(want)


def test_same_key_same_draw_other_key_other_draw():
    """Guards reproducibility, jitted too, and that the key is used at all."""
    init = initializers.stable_kernel(WIDTH)
    draw = init(jax.random.key(0), (64, 64))
    jitted = jax.jit(init, static_argnums=(1, 2))(jax.random.key(0), (64, 64), None)
    np.testing.assert_allclose(draw, jitted, rtol=1e-6)
    assert (draw != init(jax.random.key(1), (64, 64))).mean() > 0.99


def test_low_precision_is_the_rounded_float32_draw():
    """Guards that a model's start does not depend on the dtype it is stored in."""
    init = initializers.stable_kernel(WIDTH)
    wide, narrow = (init(jax.random.key(0), (64, 64), t) for t in ("f4", "bfloat16"))
    assert narrow.dtype == jnp.bfloat16
    assert (narrow == wide.astype(jnp.bfloat16)).all()


@pytest.mark.parametrize("x64", [False, True])
def test_default_dtype_is_jaxs(x64):
    """Guards the dtype of an initializer called without one."""
    with jax.enable_x64(x64):
        draw = initializers.stable_kernel(WIDTH)(jax.random.key(0), (64, 64))
        assert draw.dtype == (jnp.float64 if x64 else jnp.float32)


def test_out_sharding_shards_without_changing_the_draw():
    """Guards initialisation in place on an explicit mesh."""
    init = initializers.stable_embedding(WIDTH)
    spec = jax.P("x", None)
    whole = init(jax.random.key(0), (64, 64))
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        parts = init(jax.random.key(0), (64, 64), jnp.bfloat16, spec)
        assert jax.typeof(parts).sharding.spec == spec
    assert len(parts.sharding.device_set) == 8
    np.testing.assert_array_equal(parts, whole.astype(jnp.bfloat16))


@pytest.mark.parametrize("value", [0, -3, 1.5, math.nan])
@pytest.mark.parametrize(
    ("function", "name", "good"),
    [
        ("stable", "width", {"num_layers": 2}),
        ("stable", "num_layers", {"width": 8}),
        ("stable_embedding", "width", {}),
        ("stable_kernel", "width", {}),
        ("stable_residual", "width", {"num_layers": 2}),
        ("stable_residual", "num_layers", {"width": 8}),
    ],
)
def test_bad_arguments_raise_one_line_that_names_what_is_allowed(
    function, name, good, value
):
    """Guards the message, and that it names the function that was called."""
    message = f"{function}: {name} must be a whole number >= 1, got {value}."
    with pytest.raises(ValueError) as error:
        getattr(initializers, function)(**good, **{name: value})
    assert str(error.value) == message
    with pytest.raises(TypeError, match=f"{function}: {name} must be a whole number"):
        getattr(initializers, function)(**good, **{name: "8"})


# Embedding, and the std of the residual stream it feeds to the first layer.
EMBEDS = {
    "vanilla": (flax.nnx.Embed, lambda width: (0.4 / width) ** 0.5),
    "scaled": (nnx.ScaledEmbed, lambda width: 0.4**0.5),
    "normed": (nnx.NormedEmbed, lambda width: 1.0),
}
each_embed = pytest.mark.parametrize(
    ("make_embed", "residual_std"), list(EMBEDS.values()), ids=list(EMBEDS)
)


def embed_tokens(make_embed, init, width, count, seed):
    """The first `count` rows of an embedding drawn with `init.embedding`."""
    embed = make_embed(
        count, width, embedding_init=init.embedding, rngs=flax.nnx.Rngs(seed)
    )
    return embed(jnp.arange(count))


@pytest.mark.parametrize(
    ("width", "num_layers", "published"),
    [
        (1024, 24, {"vanilla": 27.29, "scaled": 1.822, "normed": 1.520}),
        (2304, 24, {"vanilla": 40.44, "scaled": 1.822, "normed": 1.520}),
        (5120, 40, {"vanilla": 46.54, "scaled": 1.636, "normed": 1.402}),
    ],
)
def test_published_bounds_follow_from_what_is_drawn(width, num_layers, published):
    """Guards both conditions against the paper's numbers for the first FFN."""
    init = initializers.stable(width, num_layers)
    std_in = init.kernel(jax.random.key(0), (1000, 500)).std()
    std_out = init.residual(jax.random.key(1), (1000, 500)).std()
    for name, bound in published.items():
        residual = embed_tokens(EMBEDS[name][0], init, width, 256, seed=2)
        got = functional.ffn_jacobian_bound(
            width, 4 * width, std_in, std_out, residual.std()
        )
        assert got - 1 == pytest.approx(bound - 1, rel=0.01), name


def layer_norm(x):
    """LayerNorm over the last axis, without parameters."""
    return jax.nn.standardize(x, epsilon=1e-6)


def heads(x, w_qkv, num_heads=4):
    """The concatenated outputs of causal heads on one normalised sequence."""
    length, width = x.shape
    shape = (length, num_heads, width // num_heads)
    q, k, v = ((x @ w).reshape(shape) for w in w_qkv)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)


def attention_sublayer(x, w_qkv, w_out):
    """Pre-LN attention on one sequence."""
    return x + heads(layer_norm(x), w_qkv) @ w_out


def ffn_sublayer(x, w_in, w_out):
    """Pre-LN feed-forward network of two matrices."""
    return x + jax.nn.relu(layer_norm(x) @ w_in) @ w_out


@functools.partial(jax.jit, static_argnums=0)
def jacobian_norm(function, x, *weights):
    """Spectral norm of the Jacobian of `function` with respect to `x`."""
    jacobian = jax.jacfwd(function)(x, *weights)
    return jnp.linalg.norm(jacobian.reshape(x.size, x.size), ord=2)


def assert_bound_holds_and_is_not_idle(norm, bound):
    """Asserts that the norm is below the bound and above a tenth of its excess."""
    assert 0.1 * (bound - 1) < norm - 1 < bound - 1


@each_embed
def test_ffn_jacobian_stays_under_the_bound(make_embed, residual_std):
    """Matrices that the initializers draw satisfy the bound."""
    width, ffn_width, num_layers = 128, 512, 12
    init = initializers.stable(width, num_layers)
    std = (0.4 / width) ** 0.5
    bound = functional.ffn_jacobian_bound(
        width, ffn_width, std, std / (2 * num_layers) ** 0.5, residual_std(width)
    )
    for seed in range(4):
        x = embed_tokens(make_embed, init, width, 2, seed)[0]
        key_in, key_out = jax.random.split(jax.random.key(seed))
        w_in = init.kernel(key_in, (width, ffn_width))
        w_out = init.residual(key_out, (ffn_width, width))
        norm = jacobian_norm(ffn_sublayer, x, w_in, w_out)
        assert_bound_holds_and_is_not_idle(norm, bound)


@each_embed
def test_attention_jacobian_stays_under_the_bound(make_embed, residual_std):
    """The bound gets the true norm of the Jacobian of the heads."""
    width, num_layers = 128, 12
    init = initializers.stable(width, num_layers)
    std_out = (0.4 / width) ** 0.5 / (2 * num_layers) ** 0.5
    for seed in range(4):
        x = embed_tokens(make_embed, init, width, 2, seed)
        key_qkv, key_out = jax.random.split(jax.random.key(seed))
        w_qkv = init.kernel(key_qkv, (3, width, width))
        w_out = init.residual(key_out, (width, width))
        bound = functional.attention_jacobian_bound(
            width,
            std_out,
            residual_std(width),
            jacobian_norm(heads, layer_norm(x), w_qkv),
        )
        norm = jacobian_norm(attention_sublayer, x, w_qkv, w_out)
        assert_bound_holds_and_is_not_idle(norm, bound)
