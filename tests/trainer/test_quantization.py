"""Simulated quantization, compared with loops over the entries of each group."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from trainer import compile_only, model, quantization, sharding, train_step
from trainer.config import RunConfig
from trainer.run_folder import Run
from trainer_in_process import refused
from trainer_process import assert_same_run, checkpoint_steps, kill_at

pytestmark = pytest.mark.one_python

FORMATS = tuple(quantization.FORMATS)
GROUP = 32
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is in the libtpu wheel, which is not installed",
)
# The values of each format that are not negative.
VALUES = {
    "int8": np.arange(128.0),
    "int4": np.arange(8.0),
    "fp4": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "fp4_e1m2": np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def weights(name, group, x, axis=0):
    return quantization.quantize_weights(name, group, x, axis)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def activations(name, group, x, axis=0):
    return quantization.quantize_activations(name, group, x, axis)


OPERANDS = {"weights": weights, "activations": activations}


def draw(*shape, dtype="float32", seed=0):
    """Values with some outliers, as activations have."""
    x = np.random.default_rng(seed).standard_t(4, size=shape)
    return jnp.asarray(x, dtype)


# --------------------------------------------------------- written out, one group each


def nearest(x, values):
    return min(values, key=lambda value: abs(value - x))


def written_out_symmetric(name, group, kept):
    order = sorted(range(len(group)), key=lambda i: abs(group[i]))
    rounded = order[: len(order) - kept]
    scale = abs(group[rounded[-1]]) / VALUES[name][-1]
    values = [sign * scale * v for v in VALUES[name] for sign in (1, -1)]
    result = group.copy()
    for i in rounded:
        result[i] = nearest(group[i], values)
    return result


def written_out_int4(group):
    """The value 0 is one of the 16."""
    low, high = min(0, *group), max(0, *group)
    scale = (high - low) / 15
    below = round(-low / scale)  # values below 0
    return np.array([nearest(x, scale * np.arange(-below, 16 - below)) for x in group])


def written_out(operand, name, group):
    if operand == "weights":
        int4 = name == "int4"
        return (
            written_out_int4(group) if int4 else written_out_symmetric(name, group, 0)
        )
    return written_out_symmetric(name, group, 0 if name == "int8" else 2)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_written_out(name, operand):
    x = draw(3 * GROUP, 20)
    got = OPERANDS[operand](name, GROUP, x)
    reference = functools.partial(written_out, operand, name)
    groups = np.float64(x).reshape(3, GROUP, 20)
    want = np.apply_along_axis(reference, 1, groups).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert np.abs(want - x).max() > (0.01 if name == "int8" else 0.1)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_is_rounded_in_float32(name, operand):
    x, quantize = draw(3 * GROUP, 20, dtype="bfloat16"), OPERANDS[operand]
    got, want = quantize(name, GROUP, x), quantize(name, GROUP, x.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_fp4_is_the_format_of_ml_dtypes():
    """Halfway values, of which the even one is taken, included."""
    x = np.linspace(-6, 6, 24 * 8 + 1, dtype=np.float32)
    want = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(quantization.round_e2m1(x), want)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", FORMATS)
def test_axis_of_the_groups(name, operand):
    x, quantize = draw(2, 3, 4 * GROUP), OPERANDS[operand]
    got = quantize(name, GROUP, x, 2)
    moved = quantize(name, GROUP, jnp.moveaxis(x, 2, 0), 0)
    np.testing.assert_array_equal(got, jnp.moveaxis(moved, 0, 2))


@pytest.mark.parametrize("length", [GROUP - 2, GROUP + 2])
@pytest.mark.parametrize("operand", OPERANDS)
def test_a_group_that_does_not_divide_the_axis_is_the_whole_axis(operand, length):
    x, quantize = draw(length, 5), OPERANDS[operand]
    want = quantize("int4", length, x)
    np.testing.assert_array_equal(quantize("int4", GROUP, x), want)


# --------------------------------------------------------------------- special values


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", FORMATS)
def test_values_of_the_format_are_kept(name, operand):
    """At a scale that is a power of two, of either sign."""
    values = VALUES[name]
    x = np.concatenate([-values[1:], values])
    if (name, operand) == ("int4", "weights"):
        x = np.arange(-5.0, 11.0)
    x = jnp.asarray(np.resize(x, 2 * len(x)) / 64, jnp.float32)
    np.testing.assert_array_equal(OPERANDS[operand](name, len(x), x), x)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", FORMATS)
def test_groups_of_equal_values_are_kept(name, operand):
    x = jnp.repeat(jnp.array([0.0, 0.3, -7e4, 1e-30]), GROUP)
    got = OPERANDS[operand](name, GROUP, x)
    np.testing.assert_allclose(got, x, rtol=1e-6)
    np.testing.assert_array_equal(got[:GROUP], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so_and_spoils_no_other_group(name, operand, bad):
    x, quantize = draw(3 * GROUP), OPERANDS[operand]
    clean = quantize(name, GROUP, x)
    for count in (1, 3, GROUP):
        got = quantize(name, GROUP, x.at[GROUP : GROUP + count].set(bad))
        assert not np.isfinite(got[GROUP : GROUP + count]).any()
        for other in (slice(GROUP), slice(2 * GROUP, None)):
            np.testing.assert_array_equal(got[other], clean[other])


def test_two_activations_are_kept_and_leave_the_others_their_precision():
    x = draw(GROUP).at[jnp.array([3, 8])].set(jnp.array([500.0, -1000.0]))
    got = activations("int4", GROUP, x)
    np.testing.assert_array_equal(got[jnp.array([3, 8])], x[jnp.array([3, 8])])
    rest = np.delete(np.abs(x), [3, 8]).max()
    assert 0 < np.abs(got - x).max() <= rest / 14 * (1 + 1e-6)
    # A third one of that size sets the scale, and the small ones become 0.
    got = activations("int4", GROUP, x.at[5].set(400.0))
    assert np.count_nonzero(got) == 3


# ---------------------------------------------------------------------------- products

DIMENSIONS = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("name", FORMATS)
def test_gradient_passes_straight_through(name):
    """It is the gradient of a product of the rounded operands, to the last bit."""
    x, kernel = draw(2, 3, 2 * GROUP), draw(2 * GROUP, 7, seed=1)
    dot_general = quantization.DotGeneral(name, GROUP, model.flat_dot_general)
    rounded = activations(name, GROUP, x, 2), weights(name, GROUP, kernel)
    direction = draw(2, 3, 7, seed=2)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(product, x, kernel):
        y, pull = jax.vjp(lambda x, k: product(x, k, DIMENSIONS), x, kernel)
        return y, *pull(direction)

    got = value_and_gradient(dot_general, x, kernel)
    want = value_and_gradient(model.flat_dot_general, *rounded)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    plain = value_and_gradient(model.flat_dot_general, x, kernel)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(got, plain, strict=True))


def test_equal_settings_compile_once():
    shape = dataclasses.replace(model.PRESETS["nano"], quantize="fp4")
    (first, _), (second, _) = model.abstract(shape), model.abstract(shape)
    assert first == second and hash(first) == hash(second)


@pytest.mark.parametrize("initialization", model.INITIALIZATIONS)
def test_linear_layers_in_the_blocks_are_quantized_and_no_others(initialization):
    shape = dataclasses.replace(
        model.PRESETS["nano"],
        initialization=initialization,
        quantize="int8",
        quantize_group=16,
        gated_attention=True,
        untied_head=True,
    )
    decoder = nnx.eval_shape(lambda: model.Decoder(shape, rngs=nnx.Rngs(0)))
    want = quantization.DotGeneral("int8", 16, model.flat_dot_general)
    attention, ffn = decoder.blocks.attention, decoder.blocks.ffn
    for layer in (
        *(attention.query, attention.key, attention.value, attention.out),
        *(attention.gate, ffn.gate, ffn.up, ffn.down),
    ):
        assert layer.dot_general == want
    assert decoder.head.dot_general is model.flat_dot_general


@functools.cache
def loss_and_gradient(**options):
    shape = dataclasses.replace(model.PRESETS["nano"], quantize_group=8, **options)
    graphdef, _ = model.abstract(shape)
    params = train_step.initial_params(model.PRESETS["nano"], 0)
    tokens = jax.random.randint(jax.random.key(0), (2, 17), 0, 256)
    step = jax.jit(jax.value_and_grad(train_step.loss_fn), static_argnums=2)
    loss, gradient = step(params, tokens, graphdef)
    return float(loss), gradient


def smallest_cosine(gradient, other):
    """The cosine of the tensor that differs most in direction."""
    pairs = zip(*map(jax.tree.leaves, (gradient, other)), strict=True)
    return min(np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b)) for a, b in pairs)


@pytest.mark.nightly
@pytest.mark.slow
def test_model_has_nearly_the_gradient_of_the_plain_one():
    """Each format has a loss of its own."""
    plain_loss, plain = loss_and_gradient(quantize="none")
    losses = {plain_loss}
    for name in FORMATS:
        loss, gradient = loss_and_gradient(quantize=name)
        assert loss == pytest.approx(plain_loss, rel=0.02)
        low = 0.995 if name == "int8" else 0.7
        assert low < smallest_cosine(gradient, plain) < 1 - 1e-6, name
        losses.add(loss)
    assert len(losses) == 1 + len(FORMATS)
    options = {"compute_dtype": "bfloat16", "remat": "full"}
    half_loss, half = loss_and_gradient(quantize=name, **options)
    assert half_loss == pytest.approx(loss, rel=0.01)
    assert smallest_cosine(half, gradient) > 0.9


# ------------------------------------------------------------------------------- qwix

needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="qwix is not installed"
)
# qwix's limit of int8 is 127.5, so its scale is made that of a limit of 127.
LIKE_QWIX = {
    "int8": ("int8", f"absmax,{127.5 / 127}"),
    "int4": ("int4", "minmax"),
    "fp4": ("float4_e2m1fn", "absmax"),
}


@pytest.mark.slow
@needs_qwix
@pytest.mark.parametrize("name", LIKE_QWIX)
def test_weights_are_those_of_qwix(name):
    import qwix

    qtype, calibration = LIKE_QWIX[name]
    x = draw(3 * GROUP, 200)
    quantized = qwix.quantize(
        x,
        qtype,
        channelwise_axes=(1,),
        tiled_axes={0: GROUP},
        calibration_method=calibration,
    )
    want = qwix.dequantize(quantized)
    np.testing.assert_allclose(weights(name, GROUP, x), want, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------ the trainer


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quantize=int3"], ["--quantize", "int3", "int4", "fp4_e1m2"]),
        (["--quantize-group=3"], ["--quantize-group", ">= 4", "3"]),
    ],
    ids=lambda value: value[0],
)
def test_mistakes_are_one_line(flags, words, capsys):
    line = refused(capsys, *flags)
    assert all(word in line for word in words)


def test_settings_are_those_of_the_flags_and_survive_config_json():
    assert RunConfig().model.quantize == "none"
    settings = {"quantize": "fp4_e1m2", "quantize_group": 32}
    run = Run(RunConfig.from_settings(**settings), checkpoints=None, hosts=1)
    content = json.loads(json.dumps(run.to_json()))
    assert Run.from_json(content) == run
    assert settings.items() <= content.items()


@pytest.mark.nightly
@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit(trainer, tmp_path):
    flags = ["--preset=nano", "--optimizer=adam", "--batch-size=8", "--steps=40"]
    flags += ["--sequence-length=16", "--eval-sequences=16", "--bursts=0"]
    flags += ["--checkpoint-every=7", "--quantize=int4", "--quantize-group=16"]
    code, _, errors = trainer.run(*flags, "--output=whole", cwd=tmp_path)
    assert (code, errors) == (0, "")
    process = trainer.start(*flags, "--output=run", cwd=tmp_path)
    folder = tmp_path / "run"
    kill_at(process, lambda: any(checkpoint_steps(folder, "adam")))
    code, _, errors = trainer.run("--resume", "--output=run", cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert_same_run(folder, tmp_path / "whole", "adam")


@functools.cache
def measure_on_tpus(name):
    devices = compile_only.find_devices("tpu:v5e:2x4")
    mesh = sharding.make_mesh(sharding.Parallelism(2, 2, 2), 16, devices)
    config = RunConfig.from_settings(preset="9m", batch_size=16, quantize=name)
    return compile_only.measure("adam", config, mesh)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
@pytest.mark.usefixtures("full_compilation")
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("name", ["int4", "fp4"])
def test_compiles_for_tpus_and_adds_little(name):
    """Matrices are split on a mesh with all three axes; only scales are sent for it."""
    plain, measured = measure_on_tpus("none"), measure_on_tpus(name)
    assert measured.temporaries < 1.2 * plain.temporaries
    assert measured.accessed < 1.1 * plain.accessed
    sent = [sum(n for _, n in m.collectives.values()) for m in (measured, plain)]
    assert sent[0] < 1.02 * sent[1]
