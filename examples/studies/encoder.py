"""The block of a transformer that sees all of its input, as in vision."""

import jax
from flax import nnx

from trainer.errors import UsageError


def check_heads(width: int, heads: int) -> None:
    """Raises UsageError unless each head has the same width."""
    if width % heads:
        raise UsageError(
            f"--width must be a multiple of --heads, which is {heads}, not {width}"
        )


class Block(nnx.Module):
    """Attention without a mask, then a feed-forward layer, each after a LayerNorm."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        x_BND = x_BND + self.attention(self.attention_norm(x_BND))
        return x_BND + self.down(nnx.gelu(self.up(self.ffn_norm(x_BND))))
