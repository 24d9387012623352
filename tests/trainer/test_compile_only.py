"""The trainer's step, compiled for TPUs and GPUs. No such device is needed."""

import functools
import importlib.util
import re
from collections import Counter

import jax
import optax
import pytest

import pretrain
from trainer import compile_only, config, hardware, hlo, optimizers, sharding

# A program for a device that is not here is stored in the suite's cache of compiled
# programs, cannot be loaded from it, and is then compiled again.
pytestmark = [
    pytest.mark.usefixtures("full_compilation"),
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),
]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is in the libtpu wheel, which is not installed",
)
needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="the GPU compiler is in JAX's CUDA plugin, which is not installed",
)
V5E = hardware.DEVICES["TPU v5e"]


def compile_for(target, optimizer, parallelism, **given):
    settings = config.RunConfig.from_settings(**given)
    devices = compile_only.find_devices(target)
    rows = settings.batch_size // settings.accumulate
    mesh = sharding.make_mesh(parallelism, rows, devices)
    return compile_only.measure(optimizer, settings, mesh)


def state_bytes(preset, bytes_per_parameter, devices):
    """Returns the bytes of parameters and moments on each of the devices."""
    parameters = {"9m": 8_995_968, "60m": 58_073_600, "1b": 1_339_082_752}[preset]
    return parameters * bytes_per_parameter / devices


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
def test_four_chips_share_the_batch():
    """Each has all of the state, which the TPU pads, and only gradients are sent."""
    given = {"preset": "9m", "batch_size": 16}
    measured = compile_for("tpu:v5e:2x2", "spam", sharding.Parallelism(), **given)
    assert measured.state == pytest.approx(state_bytes("9m", 12, 1), rel=0.1)
    assert measured.total < V5E.memory
    assert set(measured.collectives) == {"all-reduce"}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
def test_1b_fits_sixteen_chips():
    fsdp = sharding.Parallelism(fsdp=16)
    measured = compile_for("tpu:v5e:4x4", "spam", fsdp, preset="1b")
    assert measured.state == pytest.approx(state_bytes("1b", 12, 16), rel=0.02)
    assert measured.total < V5E.memory


# -------------------------------------------------- a small model, split in three ways

SMALL = config.RunConfig.from_settings(preset="9m", batch_size=16, remat="none")


@functools.cache
def compile_small(optimizer):
    """Compiles the 9M model on a mesh with all three axes, once for all tests."""
    devices = compile_only.find_devices("tpu:v5e:2x4")
    parallelism = sharding.Parallelism(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(parallelism, SMALL.batch_size, devices)
    return compile_only.compile_step(optimizer, SMALL, mesh)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
def test_sparse_momentum_saves_memory():
    """It keeps both moments for a quarter of each matrix: 6 bytes a parameter less.

    The TPU pads small matrices, so it saves even more.
    """
    dense, sparse = (
        compile_only.measure_compiled(name, compile_small(name), seconds=0.0)
        for name in ("spam", "sparse_spam")
    )
    model = SMALL.model
    matrices = model.matrix_parameters - model.width * model.vocabulary
    on_device = matrices // 4  # by fsdp and tensor; the parts of data have copies
    assert dense.state - sparse.state >= 6 * on_device
    assert sparse.total < dense.total


def large_results(compiled, tensors):
    """Results of collectives by kind, without those of about one number per tensor."""
    return Counter(
        (collective.kind, array)
        for collective in hlo.collectives(compiled.as_text())
        for array in collective.results
        if array.size > tensors
    )


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
def test_optimizer_adds_only_scalar_collectives(monkeypatch):
    """On a mesh with all three axes SPAM's step sends as much as plain SGD's."""
    sgd = optimizers.Entry(lambda _, rate: optax.sgd(rate))
    monkeypatch.setitem(optimizers.TABLE, "sgd", sgd)
    plain, spam, sparse = (
        large_results(compile_small(name), tensors=12)
        for name in ("sgd", "spam", "sparse_spam")
    )
    assert plain
    assert spam == plain
    assert sparse == plain


@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
def test_command_reports_whether_it_fits(capsys):
    flags = ["--compile-only", "--target=tpu:v5e:2x2", "--preset=nano"]
    flags += ["--optimizer=adam", "--no-spikes"]
    assert pretrain.main(flags) == 0
    output = capsys.readouterr().out
    for words in ("4 x TPU v5 lite", "data 4", "GiB: fits", "FLOPs", "all-reduce"):
        assert words in output
    flags += ["--batch-size=65536", "--sequence-length=1024"]
    assert pretrain.main(flags) == 1
    assert "not fit" in capsys.readouterr().out.lower()


@pytest.mark.tpu
@needs_libtpu
def test_unknown_topology_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--compile-only", "--target=tpu:v5e:nowhere"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "tpu:v5e:nowhere" in error and error.count("\n") == 1


def test_without_any_plugin_of_jax_the_compiler_for_gpus_is_named(monkeypatch):
    """An installation for CPUs does not have the package of the plugins."""

    def find_spec(name):
        if name.startswith("jax_plugins."):
            raise ModuleNotFoundError("No module named 'jax_plugins'")
        return None

    monkeypatch.setattr(compile_only.importlib.util, "find_spec", find_spec)
    with pytest.raises(config.UsageError, match="pip install jax-cuda13-plugin"):
        compile_only.find_devices("gpu:h100:8")


@pytest.mark.slow
@needs_cuda
def test_60m_on_one_h100():
    measured = compile_for("gpu:h100:1", "spam", sharding.Parallelism(), preset="60m")
    assert measured.state == pytest.approx(state_bytes("60m", 12, 1), rel=0.01)
    assert measured.total < hardware.find("NVIDIA H100 80GB HBM3").memory


@pytest.mark.slow
def test_flops_are_those_of_the_configured_model(capsys):
    """The model has gates and another vocabulary, unlike the preset."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    measured = compile_only.Measurement("adam", 0, 0, 0, None, None, {}, 0.0)

    def teraflops(**given):
        settings = config.RunConfig.from_settings(preset="60m", **given)
        compile_only.show(measured, None, settings, mesh)
        output = capsys.readouterr().out
        return float(re.search(r"FLOPs of the model\s+([\d.]+) T", output)[1])

    tokens, plain = 512 * 256, teraflops()
    gates, words = 8 * 512**2, 32_000 * 512
    for added, given in (
        (gates, {"gated_attention": True}),
        (words, {"tokenizer": "bpe:64000"}),
    ):
        more = 6 * added * tokens / 1e12
        assert teraflops(**given) - plain == pytest.approx(more, abs=0.02)


def test_collectives_are_counted_with_their_bytes():
    text = """
  %a = f32[4,8]{1,0} all-gather(%x), dimensions={0}
  %b = (f32[], bf16[16]{0}) all-reduce(%y, %z), to_apply=%add
  %c = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%w)
  %d = bf16[8]{0} all-gather-done(%c)
  %e = f32[4] add(%a, %b)
"""
    assert compile_only.count_collectives(text) == {
        "all-gather": (2, 4 * 8 * 4 + 16),
        "all-reduce": (1, 4 + 32),
    }


def test_device_names_of_jax_are_recognized():
    assert hardware.find("TPU v5 lite") == hardware.find("TPU v5e") == V5E
    assert hardware.find("TPU v5p").flops > hardware.find("TPU v4").flops
    assert hardware.find("NVIDIA H100 80GB HBM3").memory == 80 << 30
    assert hardware.find(jax.devices()[0].device_kind) is None
