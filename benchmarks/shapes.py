"""The parameters that are measured, as trees of shapes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Llama(NamedTuple):
    """A LLaMA without biases, its output head not tied to the embedding."""

    hidden: int
    feed_forward: int
    layers: int
    vocabulary: int = 32000

    def params(self, dtype=jnp.float32):
        def shaped(*shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        def layer():
            square = shaped(self.hidden, self.hidden)
            up = shaped(self.hidden, self.feed_forward)
            down = shaped(self.feed_forward, self.hidden)
            return {
                "attention": dict.fromkeys(("query", "key", "value", "out"), square),
                "mlp": {"gate": up, "up": up, "down": down},
                "attention_norm": {"scale": shaped(self.hidden)},
                "mlp_norm": {"scale": shaped(self.hidden)},
            }

        return {
            "embed": {"embedding": shaped(self.vocabulary, self.hidden)},
            **{f"layer_{i}": layer() for i in range(self.layers)},
            "norm": {"scale": shaped(self.hidden)},
            "head": {"kernel": shaped(self.hidden, self.vocabulary)},
        }


MODELS = {
    "60M": Llama(512, 1376, 8),
    "130M": Llama(768, 2048, 12),
    "350M": Llama(1024, 2736, 24),
    "1B": Llama(2048, 5461, 24),
}
# As large as the 60M model, deeper and thinner: 201 arrays instead of 75.
DEEP = Llama(384, 1024, 22)


def matrices(count, width):
    """Square matrices of float32."""
    shape = jax.ShapeDtypeStruct((width, width), jnp.float32)
    return {f"kernel_{i}": shape for i in range(count)}


def size(tree):
    """Numbers in all arrays of a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree):
    """Bytes of all arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
