"""The machine and the versions that a result belongs to."""

import datetime
import importlib.metadata
import os
import pathlib
import platform

import jax

PACKAGES = (
    *("spam_optax", "jax", "jaxlib", "optax", "numpy"),
    *("libtpu", "torch", "pytorch_optimizer"),
)


def describe():
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _cpu_model(),
        "cores": cores(),
        "memory_gib": _memory() / 2**30,
        "load_at_start": os.getloadavg()[0],
        "device": f"{device.platform} ({device.device_kind})",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_model():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
