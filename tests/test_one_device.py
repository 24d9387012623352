"""The optimizers and the trainer on one device, as on a laptop.

All other tests see eight devices, and the number of devices decides how coordinates are
counted. JAX reads the number once, so these tests run again in a process of their own.
The test is not marked slow, so that the README's command includes it.
"""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = (
    "library/test_spam.py::test_equals_golden",
    "library/test_spam.py::test_marches_beside_the_numpy_reference[short window]",
    "library/test_sparse.py::test_marches_beside_the_numpy_reference[short windows]",
    "library/test_sparse.py::test_marches_in_every_shape",
    "library/test_stable_spam.py::test_equals_numpy[float32-resets]",
    "library/test_stable_spam.py::"
    "test_default_resets_differ_from_the_reference_only_from_the_first_reset_on",
    "trainer/test_train_step.py::test_first_steps_give_the_recorded_numbers",
)
RUN = """
import sys, jax, pytest
code = pytest.main(sys.argv[1:])
assert jax.device_count() == 1
sys.exit(code)
"""


@pytest.mark.one_python
def test_recorded_numbers_and_numpy_marches():
    run = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-x", "-p", "no:cacheprovider"]
        + [f"tests/{test}" for test in TESTS],
        cwd=pathlib.Path(__file__).parents[1],
        # The name of a worker gives the process a compilation cache of its own.
        env=os.environ
        | {"JAX_NUM_CPU_DEVICES": "1", "PYTEST_XDIST_WORKER": "one_device"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
