"""Optax's own generic tests, unchanged, with the transformations of this package.

The wheel of Optax ships its test modules. They read a table of optimizers while their
classes are decorated and look the names up in `optax.contrib` and `optax._src.alias`
while they run; so each class is imported with our table in place of Optax's and our
functions put where it looks. This leans on private paths of Optax: should it fail with
a new version of Optax, `test_conformance.py` states the same rules without them.
"""

import importlib
import os
import sys
import warnings
from unittest import mock

import jax
import optax
import optax.contrib
import pytest
from absl.testing import parameterized
from optax._src import alias

import spam_optax

pytestmark = pytest.mark.filterwarnings("default")


def spam_chain(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(spam_optax.spam_clip(), spam_optax.spam_adam(learning_rate))


def sparse_spam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Has sparse momentum in every matrix. Optax's tests would inject the density."""
    return spam_optax.sparse_spam(learning_rate, 0.5, sparse_params=True)


def adam_mini(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Fixes the partition, which Optax's tests would inject as a schedule."""
    return spam_optax.adam_mini(learning_rate)


def zclip_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(spam_optax.zclip(), optax.adam(learning_rate))


def stabilizer_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(spam_optax.gradient_stabilizer(), optax.adam(learning_rate))


def adagc_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(spam_optax.adagc(), optax.adam(learning_rate))


FACTORIES = {
    "sparse_spam": sparse_spam,
    "spam": spam_optax.spam,
    "spam_adam": spam_optax.spam_adam,
    "spam_chain": spam_chain,
    "reset_moments": spam_optax.reset_moments,
    "track_spikes": spam_optax.track_spikes,
    "stable_spam": spam_optax.stable_spam,
    "stabilizer_adam": stabilizer_adam,
    "stable_adamw": spam_optax.stable_adamw,
    "adam_mini": adam_mini,
    "zclip_adam": zclip_adam,
    "adagc_adam": adagc_adam,
}
MAIN, OTHERS = (
    tuple({"opt_name": x, "opt_kwargs": {"learning_rate": 1e-2}} for x in names)
    for names in (
        ("spam", "sparse_spam", "stable_spam"),
        (
            *("spam_adam", "spam_chain", "stabilizer_adam", "stable_adamw"),
            *("zclip_adam", "adagc_adam"),
        ),
    )
)
RESTARTED = {"learning_rate": 1e-2, "restart_bias_correction": True}
OTHERS += ({"opt_name": "spam", "opt_kwargs": RESTARTED},)
# The first is not for complex parameters, which the tests of aliases have.
CONTRIB = tuple(
    {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": 1e-2},
        "wrapper_name": wrapper,
        "wrapper_kwargs": arguments,
    }
    for name, wrapper, arguments in (
        ("adam_mini", None, None),
        ("adam", "reset_moments", {"interval": 500}),
        ("spam", "track_spikes", {}),
    )
)
SHARDED = {
    "spam_clip": spam_optax.spam_clip(),
    "spam_adam": spam_optax.spam_adam(1.0),
    "spam": spam_optax.spam(1.0),
    "spam_decayed": spam_optax.spam(1.0, weight_decay=0.1),
    "spam_chain": spam_chain(1.0),
    # Rows are sharded there, and no group may be spread over devices.
    "sparse_spam": spam_optax.sparse_spam(1.0, sparse_params=True, row_blocks=8),
    "reset_moments": spam_optax.reset_moments(optax.adam(1.0), 500),
    "track_spikes": spam_optax.track_spikes(spam_optax.spam(1.0)),
    "adaclip": spam_optax.adaclip(),
    "adagn": spam_optax.adagn(),
    "gradient_stabilizer": spam_optax.gradient_stabilizer(),
    "stable_spam": spam_optax.stable_spam(1.0, total_steps=10),
    "zclip": spam_optax.zclip(),
    "adagc": spam_optax.adagc(),
    "stable_adamw": spam_optax.stable_adamw(1.0),
    "adam_mini": spam_optax.adam_mini(1.0),
}
FLOAT64 = [
    ("spam_clip", spam_optax.spam_clip, {}),
    ("scale_by_spam_adam", spam_optax.scale_by_spam_adam, {}),
    ("spam_adam", spam_optax.spam_adam, {}),
    ("scale_by_spam", spam_optax.scale_by_spam, {}),
    ("spam", spam_optax.spam, {"weight_decay": 0.1}),
    ("sparse_spam", spam_optax.sparse_spam, {"sparse_params": True}),
    ("adaclip", spam_optax.adaclip, {}),
    ("adagn", spam_optax.adagn, {}),
    ("gradient_stabilizer", spam_optax.gradient_stabilizer, {}),
    ("stable_spam", spam_optax.stable_spam, {"weight_decay": 0.1}),
    ("zclip", spam_optax.zclip, {}),
    ("adagc", spam_optax.adagc, {}),
    ("stable_adamw", spam_optax.stable_adamw, {"weight_decay": 0.1}),
    ("adam_mini", spam_optax.adam_mini, {"weight_decay": 0.1}),
    (
        "track_spikes",
        lambda: spam_optax.track_spikes(spam_optax.spam()),
        {},
    ),
    (
        "inject_spikes",
        lambda: spam_optax.testing.inject_spikes(0, kind="noise", rate=1.0),
        {},
    ),
]


# These tests have optimizers of their own and say nothing of ours.
OF_OPTAX_ALONE = ("test_explicit_dtype", "test_microbatch")


def borrow(module: str, test_class: str, *, optimizers=(), named=()):
    """Imports a test class of Optax with our tables in place of its own."""
    product, named_parameters = parameterized.product, parameterized.named_parameters

    used = []

    def our_product(*rows, **kwargs):
        is_table = [any("opt_name" in row for row in table) for table in rows]
        used.extend(filter(None, is_table))
        rows = [
            optimizers if ours else table
            for ours, table in zip(is_table, rows, strict=True)
        ]
        return product(*rows, **kwargs)

    def our_named_parameters(*tables):
        is_table = len(tables) == 1 and len(list(tables[0])) > 10
        used.extend(filter(None, [is_table]))
        return named_parameters(named) if is_table else named_parameters(*tables)

    sys.modules.pop(module, None)
    with (
        mock.patch.object(parameterized, "product", our_product),
        mock.patch.object(parameterized, "named_parameters", our_named_parameters),
        mock.patch.dict(os.environ),  # One of the modules sets XLA_FLAGS.
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        cls = getattr(importlib.import_module(module), test_class)
    # Should Optax reshape its tables, its own optimizers must not stand in for ours.
    assert used, f"{module} no longer reads a table of optimizers"
    for name in [x for x in vars(cls) if x.startswith(OF_OPTAX_ALONE)]:
        delattr(cls, name)
    return cls


@pytest.fixture(autouse=True)
def _names_where_optax_looks(monkeypatch):
    for name, factory in FACTORIES.items():
        monkeypatch.setattr(optax.contrib, name, factory, raising=False)
        monkeypatch.setattr(alias, name, factory, raising=False)


@pytest.fixture(autouse=True)
def _optax_defaults():
    # Optax's tests broadcast on purpose.
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def _run_sharding_tests(monkeypatch):
    # Optax 0.2.8 compares versions as strings, so that "0.10" < "0.7.2" skips the
    # tests of sharding on every current JAX.
    monkeypatch.setattr(jax, "__version__", "1.0.0")


ContribTest = pytest.mark.one_python(
    borrow("optax.contrib._common_test", "ContribTest", optimizers=CONTRIB)
)
AliasTest = pytest.mark.one_python(
    borrow("optax._src.alias_test", "AliasTest", optimizers=MAIN)
)
OtherAliasTest = pytest.mark.slow(
    pytest.mark.nightly(borrow("optax._src.alias_test", "AliasTest", optimizers=OTHERS))
)
ShardingTest = borrow("optax._src.sharding_test", "ShardingTest", named=SHARDED.items())
Float64Test = pytest.mark.one_python(
    borrow("optax._src.float64_test", "Float64Test", named=FLOAT64)
)
