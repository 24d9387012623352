"""Memory of the trainer's step on TPU and H100, from their compilers."""

import importlib.util

from trainer import compile_only, config, hardware, sharding

# Preset, target and how many devices share the parameters.
CASES = (
    ("60m", "tpu:v5e:2x2", 4),
    ("130m", "tpu:v5e:2x2", 4),
    ("350m", "tpu:v5e:2x4", 8),
    ("1b", "tpu:v5e:4x4", 16),
    ("60m", "gpu:h100:1", 1),
)
OPTIMIZERS = ("spam", "sparse_spam")
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin")}


def measure(quick, track):
    """Bytes for each device, of cases whose compiler is installed; else None."""
    cases = [case for case in CASES if _has_compiler(case[1])]
    if quick:
        cases = cases[:1]
    jobs = [(*case, name) for case in cases for name in OPTIMIZERS]
    rows = [_row(*job) for job in track(jobs, description="presets")]
    return rows or None


def _has_compiler(target):
    names = COMPILERS[target.partition(":")[0]]
    return any(importlib.util.find_spec(name) for name in names)


def _row(preset, target, fsdp, optimizer):
    settings = config.RunConfig.from_settings(preset=preset)
    devices = compile_only.find_devices(target)
    mesh = sharding.make_mesh(
        sharding.Parallelism(fsdp=fsdp), settings.batch_size, devices
    )
    measured = compile_only.measure(optimizer, settings, mesh)
    return {
        "preset": preset,
        "target": target,
        "mesh": dict(mesh.shape),
        "memory": hardware.find(devices[0].device_kind).memory,
        **measured._asdict(),
    }
