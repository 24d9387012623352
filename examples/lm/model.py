"""A LLaMA-style decoder: RMSNorm, SwiGLU, rotary positions, causal attention.

Letters in shape comments: B sequences, T tokens, D width, H heads, K head width,
V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder."""

    layers: int  # residual blocks
    width: int  # of the residual stream, D; divisible by twice the heads
    heads: int  # attention heads, H
    ffn_width: int  # inner width of the gated feed-forward layer
    vocabulary: int = 256  # tokens, V: bytes
    rotary_base: float = 10_000.0  # wavelengths run from 2 pi to 2 pi times this
    scan_unroll: int = 1  # layers per scan iteration: faster on CPU, slower to compile

    @property
    def init_std(self) -> float:
        """Of every matrix: GPT-2's 0.02 at width 625, more in a narrower model."""
        return 0.5 / self.width**0.5


PRESETS = {
    "nano": ModelConfig(layers=2, width=32, heads=2, ffn_width=64),
    "tiny": ModelConfig(layers=3, width=96, heads=3, ffn_width=256, scan_unroll=3),
    "small": ModelConfig(layers=6, width=256, heads=8, ffn_width=688),
    # The paper's 60M shape; a byte vocabulary leaves 26M of it.
    "base": ModelConfig(layers=8, width=512, heads=8, ffn_width=1376),
}


def flat_dot_general(x, kernel, dimension_numbers, **kwargs):
    """`lax.dot_general` of a matrix and activations with any leading axes.

    The leading axes are merged first because XLA's CPU backend takes about 1.3 times
    as long for the gradient of a 3-D product.
    """
    ((contracted, (axis,)), batch) = dimension_numbers
    if contracted != (x.ndim - 1,) or batch != ((), ()):
        raise ValueError(f"Not a product over the last axis: {dimension_numbers}.")
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (axis,)), batch), **kwargs)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def linear(config: ModelConfig, inputs: int, outputs: int, rngs: nnx.Rngs):
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.normal(config.init_std),
        dot_general=flat_dot_general,
        rngs=rngs,
    )


def rotate(x_BTHK: jax.Array, base: float) -> jax.Array:
    """Rotary positions: turns pairs of features by an angle that grows with position.

    The product of a rotated query and a rotated key depends on their contents and on
    the distance between them only.
    """
    tokens, half = x_BTHK.shape[1], x_BTHK.shape[3] // 2
    frequency = base ** (-jnp.arange(half) / half)
    angle = jnp.arange(tokens)[:, None] * frequency[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        project = functools.partial(linear, config, config.width, config.width, rngs)
        self.query = project()
        self.key = project()
        self.value = project()
        self.out = project()

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        H = self.config.heads
        query, key, value = (
            project(x_BTD).reshape(B, T, H, D // H)
            for project in (self.query, self.key, self.value)
        )
        attended_BTHK = jax.nn.dot_product_attention(
            rotate(query, self.config.rotary_base),
            rotate(key, self.config.rotary_base),
            value,
            is_causal=True,
        )
        return self.out(attended_BTHK.reshape(B, T, D))


class FeedForward(nnx.Module):
    """SwiGLU: a gated feed-forward layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = linear(config, config.width, config.ffn_width, rngs)
        self.up = linear(config, config.width, config.ffn_width, rngs)
        self.down = linear(config, config.ffn_width, config.width, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """One pre-norm residual block."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Decoder(nnx.Module):
    """Tokens in, logits of the next token out; the head is the embedding, transposed.

    The blocks are one module whose parameters have a leading axis of layers, so a deep
    model compiles as fast as a shallow one.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(config.init_std),
            rngs=rngs,
        )
        self.blocks = stack_blocks(config, rngs)
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        @nnx.scan(
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            unroll=self.config.scan_unroll,
        )
        def through_blocks(x_BTD, block):
            return block(x_BTD)

        x_BTD = through_blocks(self.embed(tokens_BT), self.blocks)
        return flat_dot_general(
            self.norm(x_BTD), self.embed.embedding[...], (((2,), (1,)), ((), ()))
        )


def stack_blocks(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """All blocks as one, with independently drawn parameters."""

    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return Block(config, rngs=rngs)

    return create(rngs)
