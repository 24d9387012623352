"""The optimizers that are compared, by the names they have in the tables."""

import jax
import optax
from optax import contrib

import spam_optax

BASELINE = "optax.adamw"
_RATE = 1e-3


def galore(rank=128):
    """GaLore of the matrices whose momentum `sparse_spam` makes sparse."""

    def projected(params):
        return jax.tree.map(
            lambda chosen: contrib.GaLoreDimensionNumbers() if chosen else None,
            spam_optax.matrices_only()(params),
        )

    return contrib.galore(_RATE, rank, weight_dimension_numbers=projected)


def adam():
    return optax.adam(_RATE)


def adamw():
    return optax.adamw(_RATE)


def spam(**kwargs):
    return spam_optax.spam(_RATE, **kwargs)


def sparse_spam(density=0.25, **kwargs):
    return spam_optax.sparse_spam(_RATE, density, **kwargs)


def clip_then_adam():
    return optax.chain(spam_optax.spam_clip(count=True), adam())


ELEMENTWISE = {
    "optax.adam": adam,
    BASELINE: adamw,
    "optax.adafactor": lambda: optax.adafactor(_RATE),
    "optax.lion": lambda: optax.lion(_RATE),
    "clip_by_global_norm, adam": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), adam()
    ),
    "spam, no counts": spam,
    "spam": lambda: spam(count=True),
    "sparse_spam 1/4, no counts": sparse_spam,
    "sparse_spam 1/4": lambda: sparse_spam(count=True),
    "spam_clip, adam": clip_then_adam,
    "spam_clip, spam_adam": lambda: optax.chain(
        spam_optax.spam_clip(count=True), spam_optax.spam_adam(_RATE)
    ),
    "track_spikes(spam)": lambda: spam_optax.track_spikes(spam()),
}

# Their step multiplies or decomposes matrices: seconds for matrices of 2048 x 2048.
MATRIX = {"contrib.galore": galore}
if hasattr(contrib, "muon"):
    MATRIX["contrib.muon"] = lambda: contrib.muon(_RATE)
