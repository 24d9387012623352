"""What the drivers check. Each runs beside the module `page`, the code of a page."""

import math

import jax
import numpy as np
import optax

import spam_optax
from spam_optax import SkipReason


def check_losses(losses, share):
    """The last loss must be below this share of the first one."""
    losses = [float(loss) for loss in losses]
    assert len(losses) == 20, len(losses)
    assert all(map(math.isfinite, losses)), losses
    assert losses[-1] < share * losses[0], losses


def check_statistics(state, params, steps=20):
    """The state must have moments, and statistics of every tensor after `steps`."""
    moments = jax.tree.leaves(optax.tree.get(state, "mu"))
    names = spam_optax.tensor_names(params)
    assert len(moments) == len(names) > 0
    assert np.any(moments[0] != 0)
    scores = optax.tree.get(state, "tensor_spike_score")
    assert scores.shape == (len(names),) and np.all(scores > 0), scores
    assert np.all(optax.tree.get(state, "tensor_steps") == steps)


def check_skipped(state, with_loss):
    """The last step must be skipped, also for the loss if the trainer passes it."""
    wanted = SkipReason.NORM_NONFINITE
    if with_loss:
        wanted |= SkipReason.LOSS_NONFINITE
    assert SkipReason(int(optax.tree.get(state, "skip_reason"))) == wanted
    assert optax.tree.get(state, "skipped_total") == 1


def check_equal(some, others):
    """The arrays of two trees must be equal, bit for bit."""
    some, others = jax.tree.leaves(some), jax.tree.leaves(others)
    assert len(some) == len(others) > 0
    for x, y in zip(some, others, strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)
