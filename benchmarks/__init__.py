"""The benchmarks of spam_optax: ``python -m benchmarks --help``."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from trainer import hardware  # noqa: E402

# Before JAX is imported: with libtpu installed it would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
hardware.prepare_libtpu()
