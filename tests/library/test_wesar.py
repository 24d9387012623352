"""WeSaR: its layers in Linen and NNX compared with plain layers, and folding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx
from flax.core import FrozenDict

from spam_optax import initializers, linen, nnx

pytestmark = pytest.mark.one_python

INPUTS, OUTPUTS, LAYERS = 640, 500, 3
# A variance of 4e-5 is 1 / 25 000, one of 2 / (5 * 640) is 1 / 1600.
STD, DEFAULT_TARGET = 1 / math.sqrt(25_000), 1 / 40
X = jax.random.normal(jax.random.key(7), (2, 5, INPUTS))
NARROW = X[..., :64]


class Flavor:
    """One layer of Linen or NNX, as a tree of parameters and a function."""

    def __init__(self, name, **kwargs):
        self.fold = (linen if name == "linen" else nnx).fold_wesar
        if name == "linen":
            layer = linen.WesarDense(OUTPUTS, **kwargs)
            plain = nn.Dense(OUTPUTS, **self._common(kwargs))
            self.params = layer.init(jax.random.key(0), X)["params"]
            self.apply = lambda params, x: layer.apply({"params": params}, x)
            self.apply_plain = lambda params, x: plain.apply({"params": params}, x)
        else:
            rngs = flax_nnx.Rngs(0)
            layer = nnx.WesarLinear(INPUTS, OUTPUTS, rngs=rngs, **kwargs)
            plain = flax_nnx.Linear(INPUTS, OUTPUTS, rngs=rngs, **self._common(kwargs))
            graphdef, state = flax_nnx.split(layer)
            plain_graphdef = flax_nnx.graphdef(plain)
            self.params = flax_nnx.to_pure_dict(state)
            self.apply = lambda params, x: flax_nnx.merge(graphdef, params)(x)
            self.apply_plain = lambda params, x: flax_nnx.merge(plain_graphdef, params)(
                x
            )

    @staticmethod
    def _common(kwargs):
        return {name: value for name, value in kwargs.items() if name != "target_std"}


each_flavor = pytest.mark.parametrize("flavor", ["linen", "nnx"])


@each_flavor
def test_parameters_at_initialization(flavor):
    """The matrix has the right standard deviation, and so has the scaled matrix."""
    params = Flavor(flavor).params
    assert jax.tree.map(jnp.shape, dict(params)) == {
        "alpha": (),
        "bias": (OUTPUTS,),
        "kernel": (INPUTS, OUTPUTS),
    }
    assert params["kernel"].std() == pytest.approx(STD, rel=0.01)
    assert params["alpha"] == pytest.approx(DEFAULT_TARGET / STD, rel=1e-6)


@each_flavor
@pytest.mark.parametrize("target", [0.003, 1.5])
def test_target_is_the_std_of_the_product_and_leaves_the_kernel_alone(flavor, target):
    params = Flavor(flavor, target_std=target).params
    np.testing.assert_array_equal(params["kernel"], Flavor(flavor).params["kernel"])
    product = params["alpha"] * params["kernel"]
    assert product.std() == pytest.approx(target, rel=0.01)


def test_initializers_match_what_the_layers_draw():
    init = initializers.wesar(0.5)
    assert init.alpha(jax.random.key(0), ()) == pytest.approx(0.5 / STD, rel=1e-6)
    kernel = init.kernel(jax.random.key(0), (300, 700), jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16
    kernel = kernel.astype(jnp.float32)
    assert kernel.std() == pytest.approx(STD, rel=0.01)
    assert abs(kernel.mean()) < 0.01 * STD  # drawn in bfloat16 it is biased


@each_flavor
def test_output_is_that_of_the_scaled_matrix_and_the_unscaled_bias(flavor):
    layer = Flavor(flavor)
    params = dict(layer.params, alpha=jnp.float32(-3.0), bias=jnp.arange(500.0))
    kernel = np.asarray(params["kernel"], np.float64)
    want = np.asarray(X, np.float64) @ (-3 * kernel) + np.arange(500)
    np.testing.assert_allclose(layer.apply(params, X), want, rtol=1e-5, atol=1e-5)


@each_flavor
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"dtype": jnp.float16, "param_dtype": jnp.bfloat16},
        {"precision": "highest", "bias_init": nn.initializers.ones},
    ],
    ids=lambda kwargs: " ".join(kwargs) or "plain",
)
@pytest.mark.parametrize("jitted", [False, True])
def test_folded_parameters_give_the_same_outputs_bit_for_bit(flavor, kwargs, jitted):
    """The plain layer has the same options and the same dtypes."""
    layer = Flavor(flavor, **kwargs)
    params = dict(layer.params, alpha=layer.params["alpha"] * 1.2345)
    folded = layer.fold(params)
    assert set(folded) == set(params) - {"alpha"}
    assert {x.dtype for x in jax.tree.leaves((params, folded))} == {
        jnp.dtype(kwargs.get("param_dtype", "float32"))
    }
    functions = layer.apply, layer.apply_plain
    got, want = (
        (jax.jit(function) if jitted else function)(tree, X)
        for function, tree in zip(functions, (params, folded), strict=True)
    )
    dtype = kwargs.get("dtype", "float32")
    assert got.dtype == want.dtype == jnp.dtype(dtype)
    got, want = got.astype("f4"), want.astype("f4")
    # Compiled, XLA may keep a product of bfloat16 in float32 where it is used.
    in_excess = jitted and "param_dtype" in kwargs
    np.testing.assert_allclose(got, want, rtol=0, atol=0.01 if in_excess else 0)
    assert got.std() > 0.5


@each_flavor
def test_gradients_are_those_of_the_product(flavor):
    """The factor's gradient is the inner product of matrix and plain gradient."""
    layer = Flavor(flavor)
    params = dict(layer.params)
    target = jax.random.normal(jax.random.key(1), (2, 5, OUTPUTS))

    def gradient(apply, params):
        return jax.jit(jax.grad(lambda p: jnp.mean((apply(p, X) - target) ** 2)))(
            params
        )

    got = gradient(layer.apply, params)
    plain = gradient(layer.apply_plain, layer.fold(params))
    inner = np.sum(np.float64(plain["kernel"]) * np.float64(params["kernel"]))
    assert got["alpha"] == pytest.approx(inner, rel=1e-4)
    want = params["alpha"] * plain["kernel"]
    np.testing.assert_allclose(got["kernel"], want, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(got["bias"], plain["bias"], rtol=1e-5)


def test_stacked_nnx_layers_scan_and_fold():
    """Trainers stack blocks by vmap into one module, with a factor for each layer."""

    def create(layer):
        split = flax_nnx.split_rngs(splits=LAYERS)
        make = flax_nnx.vmap(
            lambda rngs: layer(64, 64, rngs=rngs), in_axes=0, out_axes=0
        )
        return split(make)(flax_nnx.Rngs(0))

    def apply(x, layer):
        return x + layer(x)

    def through(x, layers, apply=apply):
        scan = flax_nnx.scan(
            apply, in_axes=(flax_nnx.Carry, 0), out_axes=flax_nnx.Carry
        )
        return scan(x, layers)

    stacked = create(nnx.WesarLinear)
    stacked.alpha[...] *= jnp.array([1.0, -2.0, 0.5])
    state = flax_nnx.state(stacked)
    assert state["alpha"].shape == (LAYERS,)
    assert not np.array_equal(state["kernel"][0], state["kernel"][1])

    x = NARROW
    for alpha, kernel in zip(stacked.alpha[...], stacked.kernel[...], strict=True):
        x = x + x @ (alpha * kernel)
    got = flax_nnx.jit(through)(NARROW, stacked)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)
    remat = flax_nnx.jit(lambda x, layers: through(x, layers, flax_nnx.remat(apply)))
    np.testing.assert_array_equal(remat(NARROW, stacked), got)

    plain = create(flax_nnx.Linear)
    flax_nnx.update(plain, nnx.fold_wesar(state))
    np.testing.assert_array_equal(flax_nnx.jit(through)(NARROW, plain), got)


def test_stacked_linen_layers_scan_and_fold():
    class Stack(nn.Module):
        dense: type[nn.Dense]

        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda layer, x, _: (x + layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            return scan(self.dense(64, name="layer"), x, None)[0]

    stack = Stack(linen.WesarDense)
    variables = stack.init(jax.random.key(0), NARROW)
    params = variables["params"]["layer"]
    params["alpha"] *= jnp.array([1.0, -2.0, 0.5])
    x = NARROW
    for alpha, kernel in zip(params["alpha"], params["kernel"], strict=True):
        x = x + x @ (alpha * kernel)
    got = jax.jit(stack.apply)(variables, NARROW)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)
    folded = linen.fold_wesar(variables)
    assert set(folded["params"]["layer"]) == {"kernel", "bias"}
    plain = jax.jit(Stack(nn.Dense).apply)(folded, NARROW)
    np.testing.assert_array_equal(plain, got)


def test_folding_keeps_the_tree_and_everything_else():
    """The trees are nested and have an `alpha` that belongs to another layer."""
    layer = {"kernel": jnp.full((2, 3), 2.0), "alpha": jnp.float32(3), "bias": 1.0}
    tree = {
        "params": {"a": [0.5], "b": {"c": layer}, "act": {"alpha": 7.0}},
        "stats": {"kernel": 4.0},
    }
    want = {"kernel": jnp.full((2, 3), 6.0), "bias": 1.0}
    for make in (dict, FrozenDict):
        folded = linen.fold_wesar(make(tree))
        assert type(folded) is make
        assert folded["stats"] == {"kernel": 4.0}
        params = folded["params"]
        assert (params["a"], params["act"]) == ([0.5], {"alpha": 7.0})
        assert jax.tree.all(jax.tree.map(jnp.array_equal, dict(params["b"]["c"]), want))
    assert "alpha" in layer  # what was passed is as it was
    again = linen.fold_wesar(linen.fold_wesar(tree))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, linen.fold_wesar(tree)))


def test_linen_partitioning_metadata_reaches_the_matrix_and_outlives_folding():
    init = nn.with_partitioning(initializers.wesar(1.0).kernel, (None, "x"))
    layer = linen.WesarDense(OUTPUTS, kernel_init=init)
    variables = layer.init(jax.random.key(0), X)
    for tree in (variables, linen.fold_wesar(variables)):
        specs = nn.get_partition_spec(tree)["params"]
        assert specs["kernel"] == jax.P(None, "x")
    got = layer.apply(variables, X)
    want = nn.Dense(OUTPUTS).apply(nn.unbox(linen.fold_wesar(variables)), X)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_nnx_explicit_mesh(spec):
    """Guards metadata, out_sharding and values with the matrix in four parts."""
    plain = nnx.WesarLinear(INPUTS, OUTPUTS, rngs=flax_nnx.Rngs(0))
    want, out_sharding = plain(X), jax.P(None, None, "x")
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        layer = nnx.WesarLinear(
            INPUTS,
            OUTPUTS,
            kernel_metadata={"out_sharding": spec},
            rngs=flax_nnx.Rngs(0),
        )
        assert jax.typeof(layer.kernel[...]).sharding.spec == jax.P(*spec)
        apply = flax_nnx.jit(lambda layer, x: layer(x, out_sharding=out_sharding))
        output = apply(layer, X)
        assert jax.typeof(output).sharding.spec == out_sharding
        folded = nnx.fold_wesar(flax_nnx.state(layer))["kernel"]
        assert jax.typeof(folded[...]).sharding.spec == jax.P(*spec)
        assert folded.get_metadata()["out_sharding"] == spec
    np.testing.assert_allclose(output, want, rtol=1e-5, atol=1e-5)


def test_nnx_options_reach_the_product():
    """These options are not in Linen: promotion, product and the result's dtype."""
    seen = []

    def dot_general(x, kernel, *args, **kwargs):
        seen.append((kernel.shape, kwargs["preferred_element_type"]))
        return jax.lax.dot_general(x, kernel, *args, **kwargs)

    def promote(arrays, **kwargs):
        seen.append([x.dtype for x in arrays])
        return flax_nnx.nn.dtypes.promote_dtype(arrays, **kwargs)

    layer = nnx.WesarLinear(
        INPUTS,
        OUTPUTS,
        dtype=jnp.bfloat16,
        dot_general=dot_general,
        promote_dtype=promote,
        preferred_element_type=jnp.float32,
        rngs=flax_nnx.Rngs(0),
    )
    layer(X)
    assert seen == [[jnp.float32] * 3, ((INPUTS, OUTPUTS), jnp.float32)]


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 8)])
def test_an_alpha_that_is_not_one_number_a_matrix_is_an_error(shape):
    params = {"kernel": jnp.ones((4, 8)), "alpha": jnp.ones(shape)}
    with pytest.raises(ValueError) as error:
        linen.fold_wesar(params)
    message = str(error.value)
    assert "\n" not in message
    assert "fold_wesar: alpha" in message and f"got {shape}" in message


def test_a_module_is_an_error_to_fold():
    """A module that is returned unchanged would look folded."""
    layer = nnx.WesarLinear(8, 4, rngs=flax_nnx.Rngs(0))
    with pytest.raises(TypeError, match="^fold_wesar: params must .* got WesarLinear"):
        nnx.fold_wesar(layer)


@each_flavor
@pytest.mark.parametrize(("target", "kind"), [(0.0, ValueError), ("0.1", TypeError)])
def test_a_bad_target_names_the_layer(flavor, target, kind):
    with pytest.raises(kind, match="^Wesar(Dense|Linear): target_std must be a finite"):
        Flavor(flavor, target_std=target)
