"""Strict JAX on eight CPU devices, which compiles quickly and once.

JAX_NUM_CPU_DEVICES sets another number of devices; tests/test_one_device.py uses it.
"""

import os
import pathlib

from trainer import hardware

# Before JAX is imported: with libtpu installed it would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
hardware.prepare_libtpu()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", 8)))
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation is most of the suite's time. Programs are therefore compiled with few
# optimizations, and those that take a tenth of a second are kept for later runs: to
# keep every small one took a tenth of the time of a first run. Each worker has a folder
# of its own, since JAX does not lock entries: another could read a half-written one.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache" / WORKER
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Files that share a fixture, here a run of the trainer, which takes half a minute.
TOGETHER = {"tests/trainer/test_mistakes.py": "tests/trainer/test_program.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each file to one worker, so that no fixture of a file is made twice."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return Scheduling(config, log)


@pytest.fixture
def full_compilation():
    """Compiles programs with all optimizations, for tests of the compiled program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
