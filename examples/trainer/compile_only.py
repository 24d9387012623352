"""Compiles the training step without the device, and measures its memory.

The TPU compiler is in the libtpu wheel, and that for NVIDIA GPUs in the wheels of JAX's
CUDA plugin. Neither needs a device. The numbers for memory are exact.
"""

import argparse
import importlib.util
import os
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich
import rich.box
import rich.table
from jax.experimental import topologies
from jax.sharding import Mesh

from trainer import data, hardware, hlo, model, optimizers, sharding, train_step
from trainer.config import RunConfig
from trainer.errors import UsageError

TARGETS = "tpu:TOPOLOGY, such as tpu:v5e:4x4, or gpu:h100:N"
# XLA's description of the device, which it would otherwise read from a device.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: %d minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Measurement(NamedTuple):
    """The compiler's numbers for one training step, per device."""

    optimizer: str
    state: int  # bytes of parameters and optimizer state
    temporaries: int  # bytes at most, beside them
    total: int  # bytes at most
    flops: float | None  # None: this compiler does not report it
    accessed: float | None  # bytes of memory moved
    collectives: dict[str, tuple[int, int]]  # by kind: how many, bytes of their results
    seconds: float  # to compile


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "compile only", "the memory of a training step, without its device"
    )
    group.add_argument(
        "--compile-only",
        action="store_true",
        help="compile the training step for --target, print its memory, and stop",
    )
    group.add_argument("--target", metavar="TARGET", help=TARGETS)


def run(given: dict[str, Any], parallelism, options: argparse.Namespace) -> int:
    """Compiles the step of every optimizer; returns 1 if one does not fit."""
    jax.config.update("jax_platforms", "cpu")  # or JAX looks for the device
    config = RunConfig.from_settings(**given)
    rows = data.rows_per_host(config, data.Host(0, 1))
    devices = find_devices(options.target)
    mesh = sharding.make_mesh(parallelism, rows, devices)
    device = hardware.find(devices[0].device_kind)
    print(
        f"{config.model.preset} on {mesh.size} x {devices[0].device_kind}, mesh"
        f" {' x '.join(f'{name} {size}' for name, size in mesh.shape.items())};"
        f" {config.batch_size} x {config.sequence_length} tokens per step",
        flush=True,
    )
    if devices[0].platform == "gpu" and not model.has_fused_attention("bfloat16"):
        print(
            "cuDNN is not installed: attention is XLA's own, which takes more memory"
            " than the fused kernel that a GPU runs in bfloat16"
        )
    fits = True
    for name in config.optimizers:
        try:
            measured = measure(name, config, mesh)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name}: does not fit; {out_of_memory(error)}")
            fits = False
            continue
        show(measured, device, config, mesh)
        fits = fits and (device is None or measured.total <= device.memory)
    return 0 if fits else 1


def find_devices(target: str | None) -> list[jax.Device]:
    """Returns the devices of a target, which can only compile."""
    kind, _, place = (target or "").partition(":")
    makers = {"tpu": tpu_devices, "gpu": gpu_devices}
    if kind not in makers or not place:
        got = f"; got {target!r}" if target else ""
        raise UsageError(f"--compile-only needs --target, {TARGETS}{got}")
    try:
        return makers[kind](place)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"there is no target {target}: {reason}") from error


def tpu_devices(topology: str) -> list[jax.Device]:
    if re.search(r"\b0+(x|$)|x0+(x|$)", topology):  # which ends the TPU compiler
        raise ValueError("every side of a topology must be >= 1")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("--target tpu needs the TPU compiler: pip install libtpu")
    hardware.prepare_libtpu()
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(described.devices)


def gpu_devices(place: str) -> list[jax.Device]:
    name, _, count = place.partition(":")
    if name != "h100" or not (count or "1").isdecimal():
        raise ValueError("GPUs are given as gpu:h100 or gpu:h100:N")
    plugins = importlib.util.find_spec("jax_plugins")  # which has them, if any is there
    majors = [
        n
        for n in (12, 13)
        if plugins and importlib.util.find_spec(f"jax_plugins.xla_cuda{n}")
    ]
    if not majors:
        raise UsageError(
            "--target gpu needs the compiler for GPUs: pip install jax-cuda13-plugin"
            " jax-cuda13-pjrt (on Python 3.11: jax-cuda12-plugin jax-cuda12-pjrt)"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    # Autotuning times kernels on the device.
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=H100 % majors[-1],
        topology=f"1x1x{count or 1}",
    )
    return list(described.devices)


def measure(name: str, config: RunConfig, mesh: Mesh) -> Measurement:
    """Compiles the training step of one optimizer, and measures it."""
    began = time.perf_counter()
    compiled = compile_step(name, config, mesh)
    return measure_compiled(name, compiled, time.perf_counter() - began)


def measure_compiled(
    name: str, compiled: jax.stages.Compiled, seconds: float
) -> Measurement:
    """Returns the compiler's numbers for a step that took `seconds` to compile."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    arguments = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    return Measurement(
        optimizer=name,
        state=arguments,
        temporaries=temporaries + results,
        total=arguments + results + temporaries + memory.generated_code_size_in_bytes,
        flops=costs.get("flops"),
        accessed=costs.get("bytes accessed"),
        collectives=count_collectives(compiled.as_text()),
        seconds=seconds,
    )


def compile_step(name: str, config: RunConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the step that training runs, for the devices of `mesh`."""
    task = train_step.make_task(config, configure(config, mesh), mesh)
    optimizer = optimizers.make(name, config)
    with jax.set_mesh(mesh):
        return train_step.lower_step(task, optimizer, jnp.uint16).compile()


def configure(config: RunConfig, mesh: Mesh) -> model.ModelConfig:
    """Returns the model of a run on the devices of `mesh`."""
    platform = mesh.devices.flat[0].platform
    return model.for_platform(config.model, vocabulary(config), platform)


def vocabulary(config: RunConfig) -> int:
    """Returns the vocabulary of the tokenizer if its name has it, or of the preset."""
    name, _, size = config.tokenizer.partition(":")
    if name == "bpe" and size.isdecimal():
        return int(size)
    return config.model.vocabulary


def count_collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns, by kind, the number of collectives and the bytes of their results."""
    counts, sizes = Counter(), Counter()
    for kind, results in hlo.collectives(text):
        counts[kind] += 1
        sizes[kind] += sum(array.nbytes for array in results)
    return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}


def out_of_memory(error: Exception) -> str:
    """Returns the part of the compiler's message that has the numbers."""
    found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm", str(error))
    return found[0] if found else str(error).splitlines()[0]


def show(
    measured: Measurement,
    device: hardware.Device | None,
    config: RunConfig,
    mesh: Mesh,
) -> None:
    """Prints one measurement as a table."""
    gib = 1 << 30
    tokens = config.tokens_per_step / mesh.size
    flops_per_token = configure(config, mesh).flops_per_token(config.sequence_length)
    rows = {
        "state (parameters, moments, batch)": f"{measured.state / gib:.2f} GiB",
        "temporaries, at most": f"{measured.temporaries / gib:.2f} GiB",
        "together": f"{measured.total / gib:.2f} GiB",
    }
    if device:
        fits = "fits" if measured.total <= device.memory else "DOES NOT FIT"
        rows["of the device's"] = f"{device.memory / gib:.0f} GiB: {fits}"
    rows["FLOPs of the model"] = f"{flops_per_token * tokens / 1e12:.2f} T"
    if measured.flops is not None:
        rows["FLOPs compiled (loops counted once)"] = f"{measured.flops / 1e12:.2f} T"
    if measured.accessed is not None:
        rows["bytes moved (loops counted once)"] = f"{measured.accessed / gib:.2f} GiB"
    for kind, (count, size) in measured.collectives.items():
        rows[f"{kind} ({count} in the program)"] = f"{size / gib:.3f} GiB"
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column(f"{measured.optimizer}, per device and step", no_wrap=True)
    table.add_column(f"compiled in {measured.seconds:.0f} s", justify="right")
    for row in rows.items():
        table.add_row(*row)
    rich.print(table)
