"""Peak FLOPs and memory of devices, and the environment of the TPU compiler."""

import importlib.util
import os
from typing import NamedTuple


class Device(NamedTuple):
    """One chip, as JAX counts devices."""

    flops: float  # per second, of dense bfloat16 products
    memory: int  # bytes


# From the makers' data sheets. The keys are the beginnings of jax.Device.device_kind;
# the longer of two that match comes first.
DEVICES = {
    "TPU v4": Device(275e12, 32 << 30),
    "TPU v5 lite": Device(197e12, 16 << 30),
    "TPU v5e": Device(197e12, 16 << 30),
    "TPU v5p": Device(459e12, 95 << 30),
    "TPU v5": Device(459e12, 95 << 30),
    "TPU v6 lite": Device(918e12, 32 << 30),
    "TPU v6e": Device(918e12, 32 << 30),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40 << 30),
    "NVIDIA A100": Device(312e12, 80 << 30),
    "NVIDIA H100": Device(989e12, 80 << 30),
    "NVIDIA H200": Device(989e12, 141 << 30),
    "NVIDIA B200": Device(2250e12, 180 << 30),
}


def find(device_kind: str) -> Device | None:
    """Returns the data of a kind of device; None if it is not in the table."""
    for beginning, device in DEVICES.items():
        if device_kind.startswith(beginning):
            return device
    return None


def prepare_libtpu() -> None:
    """Sets the environment in which libtpu compiles without a TPU.

    It then sends no request to a metadata server, and a second program may compile at
    the same time.
    """
    if importlib.util.find_spec("libtpu") is None:
        return
    import libtpu

    for name, value in {
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
