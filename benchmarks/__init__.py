"""The benchmarks of spam_optax: ``python -m benchmarks --help``."""

import os

# Before JAX is imported: with libtpu installed it would look for a TPU, and the
# compiler for one asks for a metadata server unless told not to.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
