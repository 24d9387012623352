"""Two decoders to compare with the LLaMA-style one: other blocks, the same trainer.

Letters in shape comments: B sequences, T tokens, D width, H heads, K head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from trainer import model
from trainer.model import ModelConfig

RECURRENCE_SHARPNESS = 8.0  # c of the RG-LRU
INITIAL_DECAYS = 0.9, 0.999  # range of the recurrence where its gate is open
KERNEL_SIZE = 4  # tokens of the causal convolution


def layer_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, dtype=config.compute_dtype, rngs=rngs)


# ---------------------------------------------------------------------------- GPT-2


class GPT2Attention(nnx.Module):
    """Causal self-attention with biases and without positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        project = functools.partial(
            model.linear, config, width, width, rngs, use_bias=True
        )
        self.query = project()
        self.key = project()
        self.value = project()
        self.out = project(residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        H = self.config.heads
        query, key, value = (
            project(x_BTD).reshape(B, T, H, D // H)
            for project in (self.query, self.key, self.value)
        )
        attended_BTHK = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=self.config.attention
        )
        return self.out(attended_BTHK.reshape(B, T, D))


class GPT2FeedForward(nnx.Module):
    """Two matrices with biases and a GELU between them, four times as wide."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(model.linear, config, rngs=rngs, use_bias=True)
        self.up = linear(config.width, 4 * config.width)
        self.down = linear(4 * config.width, config.width, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x_BTD)))


class GPT2Block(model.Block):
    """A residual block with other parts than the LLaMA-style one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(config, rngs)
        self.attention = GPT2Attention(config, rngs=rngs)
        self.ffn_norm = layer_norm(config, rngs)
        self.ffn = GPT2FeedForward(config, rngs=rngs)


class GPT2(model.Decoder):
    """A decoder with LayerNorm, biases, learned positions and GELU.

    Radford et al., Language Models are Unsupervised Multitask Learners, 2019. The
    feed-forward layer is four times as wide as the stream; `ffn_width` is not used.
    """

    block = GPT2Block
    make_norm = staticmethod(layer_norm)

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        table = model.make_initializers(config).embedding(
            rngs.params(), (config.positions, config.width)
        )
        self.positions = nnx.Param(table)

    def look_up(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = super().look_up(tokens_BT)
        positions_TD = self.positions[...][: tokens_BT.shape[1]]
        return x_BTD + positions_TD[None].astype(x_BTD.dtype)


# ----------------------------------------------------------------------------- Hawk


class GatedRecurrence(nnx.Module):
    r"""Griffin's RG-LRU, a diagonal linear recurrence with gates of the input alone.

    ``h_t = a_t * h_(t-1) + sqrt(1 - a_t**2) * i_t * x_t`` with the gates ``r_t`` and
    ``i_t``, sigmoids of linear maps of ``x_t``, and ``a_t = sigmoid(decay)**(8 r_t)``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(
            model.linear, config, config.width, config.width, rngs, use_bias=True
        )
        self.recurrence_gate = linear()
        self.input_gate = linear()
        low, high = INITIAL_DECAYS
        drawn = jax.random.uniform(rngs.params(), (config.width,), jnp.float32)
        slowest = (low + (high - low) * drawn) ** (1 / RECURRENCE_SHARPNESS)
        self.decay = nnx.Param(jnp.log(slowest) - jnp.log1p(-slowest))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)  # a product of many decays needs float32
        open_BTD = nnx.sigmoid(self.recurrence_gate(x_BTD).astype(jnp.float32))
        log_decay_D = RECURRENCE_SHARPNESS * nnx.log_sigmoid(self.decay[...])
        log_a_BTD = log_decay_D[None, None, :] * open_BTD
        entering = x * nnx.sigmoid(self.input_gate(x_BTD).astype(jnp.float32))
        entering *= jnp.sqrt(-jnp.expm1(2 * log_a_BTD))
        return linear_recurrence(jnp.exp(log_a_BTD), entering).astype(x_BTD.dtype)


def linear_recurrence(a_BTD: jax.Array, b_BTD: jax.Array) -> jax.Array:
    """Computes ``h_t = a_t * h_(t-1) + b_t`` along the tokens in parallel, from 0."""

    def join(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(join, (a_BTD, b_BTD), axis=1)[1]


class CausalConvolution(nnx.Module):
    """Convolves each feature over a token and the three tokens before it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1 / math.sqrt(KERNEL_SIZE))
        self.kernel = nnx.Param(normal(rngs.params(), (KERNEL_SIZE, config.width)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        tokens = x_BTD.shape[1]
        kernel = self.kernel[...].astype(x_BTD.dtype)
        padded = jnp.pad(x_BTD, ((0, 0), (KERNEL_SIZE - 1, 0), (0, 0)))
        return sum(
            kernel[back][None, None, :] * padded[:, back : back + tokens]
            for back in range(KERNEL_SIZE)
        )


class RecurrentMixer(nnx.Module):
    """Hawk's replacement for attention: a convolution, a recurrence and a gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(
            model.linear, config, config.width, config.width, rngs
        )
        self.gate = linear()
        self.value = linear()
        self.convolution = CausalConvolution(config, rngs=rngs)
        self.recurrence = GatedRecurrence(config, rngs=rngs)
        self.out = linear(residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        mixed_BTD = self.recurrence(self.convolution(self.value(x_BTD)))
        return self.out(nnx.gelu(self.gate(x_BTD)) * mixed_BTD)


class HawkBlock(nnx.Module):
    """A pre-norm residual block with a LLaMA-style feed-forward layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.mixer_norm = model.norm(config, rngs)
        self.mixer = RecurrentMixer(config, rngs=rngs)
        self.ffn_norm = model.norm(config, rngs)
        self.ffn = model.FeedForward(config, rngs=rngs)

    def pre_norm(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Hawk(model.Decoder):
    """A decoder without attention: gated linear recurrences.

    De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention for
    Efficient Language Models, 2024, arXiv 2402.19427. Here the recurrence is as wide as
    the stream, its gates are whole matrices rather than block-diagonal ones, and the
    feed-forward gate is SiLU.
    """

    block = HawkBlock
