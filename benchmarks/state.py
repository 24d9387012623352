"""Bytes of optimizer state for the models of the paper, without allocating anything."""

import functools

import jax
import jax.numpy as jnp
import optax

from benchmarks import optimizers, shapes

# The densities with which the paper matches GaLore's memory, and GaLore's ranks.
PAPER_DENSITY = {"60M": 0.3225, "130M": 0.4306, "350M": 0.3225, "1B": 0.3225}
GALORE_RANK = {"60M": 128, "130M": 256, "350M": 256, "1B": 512}
# "G" of bfloat16 weights and optimizer states together, as printed.
PAPER_MEMORY = {
    "Adam": {"60M": 0.36, "130M": 0.76, "350M": 2.06, "1B": 7.80},
    "GaLore; SPAM of paper's density": {
        "60M": 0.24,
        "130M": 0.52,
        "350M": 1.22,
        "1B": 4.38,
    },
}
_BFLOAT16 = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}


def measure(quick, track):
    """Bytes of state per parameter, and of weights and state together in bfloat16."""
    del quick
    return {
        name: _model(name, model)
        for name, model in track(shapes.MODELS.items(), description="state")
    }


def _model(name, model):
    params = model.params()
    narrow = model.params(jnp.bfloat16)
    parameters = shapes.size(params)
    return {
        "parameters": parameters,
        "density": PAPER_DENSITY[name],
        "state_bytes_per_parameter": {
            title: _state_bytes(make(), params) / parameters
            for title, make in _makers(name).items()
        },
        "bfloat16_bytes": {
            title: shapes.nbytes(narrow) + _state_bytes(make(), narrow)
            for title, make in _bfloat16_makers(name).items()
        },
    }


def _state_bytes(tx, params):
    return shapes.nbytes(jax.eval_shape(tx.init, params))


def _makers(name):
    sparse = functools.partial(optimizers.sparse_spam, PAPER_DENSITY[name])
    return {
        "optax.adam": optimizers.adam,
        "optax.adafactor": lambda: optax.adafactor(1e-3),
        "optax.lion": lambda: optax.lion(1e-3),
        "contrib.galore": lambda: optimizers.galore(GALORE_RANK[name]),
        "spam": optimizers.spam,
        "spam, bfloat16 moments": lambda: optimizers.spam(**_BFLOAT16),
        "sparse_spam 1/4": optimizers.sparse_spam,
        "sparse_spam 1/4, bfloat16 moments": lambda: optimizers.sparse_spam(
            **_BFLOAT16
        ),
        "sparse_spam, paper's density": sparse,
        "sparse_spam, paper's density, bfloat16 moments": lambda: sparse(**_BFLOAT16),
    }


def _bfloat16_makers(name):
    """Those with both moments in bfloat16, which is what the paper counts."""
    makers = _makers(name)
    names = (
        *("optax.adam", "contrib.galore", "spam, bfloat16 moments"),
        "sparse_spam, paper's density, bfloat16 moments",
        "sparse_spam 1/4, bfloat16 moments",
    )
    return {name: makers[name] for name in names}
