"""How many operations one further tensor adds to the program of an update.

Each shape is traced and lowered once. A further tensor of a known shape adds one call
for each pass over the tensors, the cast of its update, and its entries in vectors.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import spam_optax

ADDED = {
    "spam": (spam_optax.scale_by_spam, 4),
    "spam_adam": (spam_optax.scale_by_spam_adam, 4),
    "spam_clip": (spam_optax.spam_clip, 3),
    "stable_spam": (spam_optax.scale_by_stable_spam, 14),
    "stable_adamw": (spam_optax.scale_by_stable_adamw, 6),
    "adam_mini": (spam_optax.scale_by_adam_mini, 4),
    "adaclip": (spam_optax.adaclip, 7),
    "adagn": (spam_optax.adagn, 9),
    "gradient_stabilizer": (spam_optax.gradient_stabilizer, 9),
    "zclip": (spam_optax.zclip, 6),
    "adagc": (spam_optax.adagc, 8),
    "track_spikes": (lambda: spam_optax.track_spikes(optax.identity()), 11),
}


def operations(tx, tensors):
    params = {str(i): jnp.ones((8, 8)) for i in range(tensors)}
    args = jax.eval_shape(lambda p: (p, tx.init(p), p), params)
    return jax.jit(tx.update).lower(*args).as_text().count(" = ")


@pytest.mark.filterwarnings("ignore:adam_mini_partition. the names")
@pytest.mark.parametrize("name", ADDED)
def test_one_further_tensor_of_a_known_shape(name):
    """`optax.scale_by_adam` adds 38 operations."""
    make, added = ADDED[name]
    assert operations(make(), 4) - operations(make(), 3) == added
