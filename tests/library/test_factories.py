"""The rules for every function that makes a transformation, initializer or mask.

A new one is a row in `FACTORIES`: `test_every_factory_is_listed` asks for it.
"""

import functools
import importlib
import inspect
import os
import pathlib
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import spam_optax
from spam_optax import initializers, testing

ROOT = pathlib.Path(__file__).parents[2]
# Numbers that even the narrowest dtypes have.
NUMBERS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "density", "rate"), 0.5),
    **dict.fromkeys(("b1", "b2", "eps", "decay"), 0.5),
    **dict.fromkeys(("gamma1", "gamma2", "gamma3"), 0.5),
    **dict.fromkeys(("threshold", "max_norm", "scale"), 2),
    **dict.fromkeys(("reset_interval", "interval", "total_steps"), 2),
    **dict.fromkeys(("warmup_steps", "row_blocks"), 2),
    **dict.fromkeys(("grace_steps", "key"), 1),
    **dict.fromkeys(("sigma", "share", "loss_share", "norm_share"), 0.5),
    **dict.fromkeys(("min_history", "max_consecutive"), 2),
}
DTYPES = {"mu_dtype", "nu_dtype"}
MASKS = {"density", "sparse_params", "key", "row_blocks"}
CLIP = {"clip_unseen", "count"}
# What makes a transformation, and which of its arguments are no numbers.
FACTORIES = {
    spam_optax.spam_clip: CLIP | {"nu_dtype"},
    spam_optax.scale_by_spam_adam: DTYPES | {"restart_bias_correction", "count"},
    spam_optax.spam_adam: DTYPES | {"restart_bias_correction", "count", "mask"},
    spam_optax.scale_by_spam: DTYPES | CLIP | {"restart_bias_correction"},
    spam_optax.spam: DTYPES | CLIP | {"restart_bias_correction", "mask"},
    spam_optax.scale_by_sparse_spam: DTYPES
    | CLIP
    | MASKS
    | {"restart_bias_correction"},
    spam_optax.sparse_spam: DTYPES | CLIP | MASKS | {"restart_bias_correction", "mask"},
    spam_optax.reset_moments: {"inner", "fields"},
    spam_optax.track_spikes: {"inner"},
    spam_optax.skip_spikes: {"inner", "window", "needs_loss", "robust"},
    spam_optax.clip_update_norm: {"window", "robust"},
    spam_optax.adaclip: {"count"},
    spam_optax.adagn: {"count"},
    spam_optax.gradient_stabilizer: {"count"},
    spam_optax.scale_by_stable_spam: DTYPES | {"count"},
    spam_optax.stable_spam: DTYPES | {"count", "mask"},
    spam_optax.zclip: {"count"},
    spam_optax.adagc: {"count"},
    spam_optax.scale_by_stable_adamw: DTYPES | {"count"},
    spam_optax.stable_adamw: DTYPES | {"count", "mask"},
    spam_optax.scale_by_adam_mini: DTYPES | {"count", "partition"},
    spam_optax.adam_mini: DTYPES | {"count", "partition", "mask"},
    testing.inject_spikes: {"key", "kind", "steps"},
}
OTHERS = {
    spam_optax.matrices_only: {},
    spam_optax.adam_mini_partition: {"num_heads": 2},
    spam_optax.qk_clip: {},
    spam_optax.query_key_tensors: {},
    initializers.stable: {"width": 8, "num_layers": 2},
    initializers.stable_kernel: {"width": 8},
    initializers.stable_residual: {"width": 8, "num_layers": 2},
    initializers.stable_embedding: {"width": 8},
    initializers.wesar: {"target_std": 0.5},
}
PARAMS = {"mlp": jax.ShapeDtypeStruct((4, 8), jnp.float32)}


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def required(factory):
    """Returns the arguments that have no default."""
    arguments = {"inner": optax.trace(0.5), "interval": 2, "key": 1}
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: arguments[p.name] for p in parameters if p.default is p.empty}


def numbers_of(factory):
    names = inspect.signature(factory).parameters
    return {name: NUMBERS[name] for name in names if name in NUMBERS}


def build_all():
    for factory, arguments in OTHERS.items():
        factory(**arguments)
    return [factory(**required(factory)) for factory in FACTORIES]


def trace(tx, params=PARAMS):
    """Returns the state after an update, without compiling it."""
    state = jax.eval_shape(tx.init, params)
    return jax.eval_shape(tx.update, params, state, params)[1]


def test_every_factory_is_listed():
    listed = {*FACTORIES, *OTHERS}
    no_factories = {
        *(spam_optax.momentum_mask, spam_optax.momentum_density),
        *(spam_optax.tensor_names, spam_optax.register_serialization),
        *(spam_optax.inject_hyperparams, spam_optax.describe_tensors),
    }
    for module in (spam_optax, testing, initializers):
        names = getattr(module, "__all__", dir(module))
        functions = {getattr(module, x) for x in names if not x.startswith("_")}
        assert {*filter(inspect.isfunction, functions)} <= listed | no_factories


BUILD_IN_A_NEW_PROCESS = """
from jax._src import xla_bridge
import studies, trainer, spam_optax.linen, spam_optax.nnx, test_factories
test_factories.build_all()
test_factories.import_all(trainer)
test_factories.import_all(studies)
print(xla_bridge.backends_are_initialized())
"""


def import_all(package):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


@pytest.mark.slow
def test_factories_and_imports_touch_no_device():
    """A use of a device would make a later `jax.distributed.initialize` fail."""
    paths = os.pathsep.join(str(ROOT / x) for x in (".", "examples", "tests/library"))
    process = subprocess.run(
        [sys.executable, "-c", BUILD_IN_A_NEW_PROCESS],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert process.stdout == "False\n", process.stderr


def test_factories_called_under_jit_leak_no_tracer():
    built = []
    jax.eval_shape(lambda: built.extend(build_all()))
    assert len(built) == len(FACTORIES)
    for tx in built:
        trace(tx)


def real_kinds():
    """Returns the types of real scalars of NumPy and ml_dtypes."""
    values = [*vars(np).values(), *vars(ml_dtypes).values()]
    kinds = {x for x in values if isinstance(x, type) and issubclass(x, np.generic)}
    return [
        kind
        for kind in kinds
        if any(jnp.issubdtype(kind, x) for x in (jnp.integer, jnp.floating))
        and not kind.__subclasses__()
        and kind is not np.timedelta64
    ]


def test_numbers_may_be_scalars_of_any_real_kind():
    kinds = real_kinds()
    assert {np.float16, np.longdouble, np.uint8, ml_dtypes.bfloat16} <= set(kinds)
    for factory in FACTORIES:
        numbers = numbers_of(factory)
        for kind in kinds:
            scalars = {
                name: kind(number)
                for name, number in numbers.items()
                if number == int(number) or jnp.issubdtype(kind, jnp.floating)
            }
            scalars = {k: x for k, x in scalars.items() if float(x) == numbers[k]}
            factory(**required(factory) | scalars)
        # JAX adds neither of these to float32 by itself.
        arguments = {
            name: (ml_dtypes.int4 if number >= 1 else ml_dtypes.float8_e4m3fn)(number)
            for name, number in numbers.items()
        }
        trace(factory(**required(factory) | arguments))


def test_scalars_are_not_rounded():
    """Five times an int8 of 100 is 500, which int8 cannot hold."""
    key, shape = jax.random.key(0), (2,)
    want = initializers.stable_residual(100, 100)(key, shape)
    got = initializers.stable_residual(np.int8(100), np.int8(100))(key, shape)
    np.testing.assert_array_equal(got, want)
    tx = spam_optax.spam(ml_dtypes.bfloat16(2**-10), weight_decay=np.float16(0))
    updates, _ = jax.jit(tx.update)(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -(2**-10), rtol=1e-4)


@pytest.mark.parametrize("value", [np.complex64(1), np.ones([], "complex64"), 1j])
def test_numbers_are_real(value):
    with pytest.raises(TypeError, match="b1 must be a finite number >= 0 and < 1, got"):
        spam_optax.spam(b1=value)


def test_inject_hyperparams_keeps_only_numbers_in_the_state():
    """The state has all numbers, in float32, and no other arguments."""
    statics = {"mask": is_matrix, "sparse_params": is_matrix, "mu_dtype": jnp.bfloat16}
    statics |= {"nu_dtype": jnp.bfloat16, "steps": lambda step: step == 2}
    statics |= {"partition": spam_optax.adam_mini_partition(2)}
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, "bfloat16"), PARAMS)
    for factory, static in FACTORIES.items():
        names = inspect.signature(factory).parameters
        arguments = required(factory) | numbers_of(factory)
        arguments |= {k: x for k, x in statics.items() if k in names}
        tx = spam_optax.inject_hyperparams(factory)(**arguments)
        state = trace(tx, params)
        assert set(state.hyperparams) == set(names) - static, factory
        for name, value in state.hyperparams.items():
            is_whole = isinstance(NUMBERS[name], int)
            assert value.dtype == ("int32" if is_whole else "float32")


def test_inject_hyperparams_keeps_masks_and_partitions():
    """Optax would call a mask as a schedule, and then nothing would be decayed."""
    make = spam_optax.inject_hyperparams(spam_optax.adam_mini)
    tx = make(
        optax.constant_schedule(0.5),
        weight_decay=np.float32(0.5),
        mask=is_matrix,
        partition=spam_optax.adam_mini_partition(num_heads=2),
    )
    params = {"query": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    state = tx.init(params)
    assert optax.tree.get(state, "nu")["query"].shape == (1, 2)
    assert float(state.hyperparams["weight_decay"]) == 0.5
    gradients = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(tx.update)(gradients, state, params)
    np.testing.assert_array_equal(updates["query"], np.full((4, 8), -0.25))
    np.testing.assert_array_equal(updates["bias"], np.zeros(8))


def test_inject_hyperparams_of_other_factories_is_optax():
    params = jnp.ones(2, jnp.bfloat16)
    tx = spam_optax.inject_hyperparams(optax.adamw, "b1")(0.1, b1=0.5, b2=0.999)
    state = tx.init(params)
    assert "b1" not in state.hyperparams
    assert state.hyperparams["b2"].dtype == jnp.float32
    ours = functools.partial(spam_optax.spam, mask=is_matrix, weight_decay=0.5)
    hyperparams = spam_optax.inject_hyperparams(ours)(0.1).init(params).hyperparams
    assert "learning_rate" in hyperparams and "mask" not in hyperparams
    with pytest.raises(ValueError, match="static_args"):
        spam_optax.inject_hyperparams(spam_optax.spam, "momentum")


def test_optaxs_inject_hyperparams_raises_an_error_that_names_ours():
    cases = {
        spam_optax.adam_mini: {"partition": spam_optax.adam_mini_partition(2)},
        spam_optax.sparse_spam: {"density": 0.5},
        testing.inject_spikes: {"key": 1, "steps": lambda step: step == 1},
    }
    for factory, arguments in cases.items():
        tx = optax.inject_hyperparams(factory)(**arguments)
        with pytest.raises(TypeError, match="use spam_optax.inject_hyperparams inst"):
            tx.init({"w": jnp.ones((2, 2))})


def a_model():
    """Returns parameters and a whole model, which has more leaves."""
    nothing = dict.fromkeys(("activation", "rate", "name", "positions"))
    params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)} | nothing
    rest = {"activation": jax.nn.relu, "rate": 0.1, "name": "mlp"}
    return params, params | rest | {"positions": jnp.arange(3)}


@pytest.mark.filterwarnings("ignore:adam_mini_partition. the names")
def test_a_model_may_be_passed_as_params():
    """Equinox users pass it, and `optax.adamw` skips leaves without an update."""
    params, model = a_model()

    def new_state(tx, p):
        gradients, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
        return jax.eval_shape(lambda: tx.update(gradients, state, p))

    for factory in FACTORIES:
        names = inspect.signature(factory).parameters
        decay = {"weight_decay": 0.5} if "weight_decay" in names else {}
        tx = factory(**required(factory) | decay)
        assert new_state(tx, model) == new_state(tx, params)


@pytest.mark.parametrize(
    "inner, absent",
    [
        (optax.adamw(0.1), {}),
        (spam_optax.stable_adamw(0.1, weight_decay=0.1), {"bias": None}),
        (spam_optax.sparse_spam(0.1), {"bias": None}),
    ],
    ids=["adamw", "stable_adamw", "sparse_spam"],
)
def test_reset_moments_of_a_model(inner, absent):
    """It also works in a step in which a parameter has no gradient."""
    params, model = a_model()
    tx = spam_optax.reset_moments(inner, interval=2)
    update, update_model = (
        jax.jit(lambda g, s, p=p: tx.update(g, s, p)) for p in (params, model)
    )
    _, state = update(params, tx.init(params))
    got, want = (f(params | absent, state) for f in (update_model, update))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_allclose(optax.tree.get(got, "mu")["kernel"], 0.1, rtol=1e-5)


def test_inject_hyperparams_raises_the_errors_of_the_factory():
    """Optax would pass arrays to the factory, which it does not check."""
    inject = spam_optax.inject_hyperparams
    tx = spam_optax.spam(1e-3)
    for make, words in (
        (lambda: inject(tx), "inner_factory must be a function that makes"),
        (lambda: inject(spam_optax.spam, 3), "static_args must be a collection"),
        (lambda: inject(spam_optax.spam, "b3"), "static_args must be .* b1, .* b3"),
        (lambda: inject(spam_optax.spam, (), int), "hyperparam_dtype must be"),
        (lambda: inject(spam_optax.spam)(-1.0), "spam: learning_rate must be .* -1"),
        (lambda: inject(spam_optax.spam)(b1=np.float16(1)), "b1 must be .* < 1"),
        (lambda: inject(spam_optax.spam)(b1=jnp.sin, b2=2), "b2 must be .* got 2"),
        (lambda: inject(spam_optax.adam_mini_partition)(), "what inner_factory makes"),
    ):
        with pytest.raises((TypeError, ValueError), match=words) as error:
            make()
        assert "\n" not in str(error.value)


def test_a_number_may_be_larger_than_whole_numbers_of_jax():
    params = {"w": jnp.ones(2)}
    tx = spam_optax.spam(1e-3, threshold=2**63)
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.isfinite(updates["w"]).all()


def test_leaves_that_are_no_arrays_are_named():
    for leaf in (jax.nn.relu, "x", object()):
        params = {"layer": {"act": leaf, "w": jnp.ones(2)}}
        for make in (spam_optax.spam, spam_optax.stable_spam):
            with pytest.raises(TypeError, match=r"\['act'\] must be an array, got "):
                make(1e-3).init(params)
