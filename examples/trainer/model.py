"""A LLaMA-style decoder: RMSNorm, SwiGLU, rotary positions, causal attention.

Options against instability: the embeddings and initializers of Spike No More, WeSaR,
LayerNorm Scaling (arXiv 2502.05795), Mix-LN (2412.13795), gated attention (2505.06708),
normalized queries and keys (2302.05442), soft caps of logits (2408.00118), and QK-clip
(2507.20534). Quantized linear layers are an option that makes training less stable.

Letters in shape comments: B sequences, T tokens, D width, H heads, K head width,
V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import spam_optax
import spam_optax.nnx
from spam_optax import initializers
from trainer import quantization, sharding
from trainer.errors import UsageError
from trainer.settings import OneOf, Real, Switch, Whole, check_settings, setting

EMBEDDINGS = {
    "plain": nnx.Embed,
    "scaled": spam_optax.nnx.ScaledEmbed,
    "normed": spam_optax.nnx.NormedEmbed,
}
INITIALIZATIONS = ("standard", "stable", "wesar")
# Those whose matrices that write to the residual stream are divided by
# sqrt(2 * layers).
DEPTH_SCALED = ("stable", "wesar")
NORMS = ("pre", "scaled", "mixed")
COMPUTE_DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("none", *quantization.FORMATS)
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


REMAT = ("none", *REMAT_POLICIES)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, its options, and how it computes."""

    layers: int = setting(dataclasses.MISSING, Whole(1))  # residual blocks, N
    # Of the residual stream, D; divisible by twice the heads.
    width: int = setting(dataclasses.MISSING, Whole(2))
    heads: int = setting(dataclasses.MISSING, Whole(1))  # attention heads, H
    # Inner width of the gated feed-forward layer.
    ffn_width: int = setting(dataclasses.MISSING, Whole(1))
    vocabulary: int = 32_000  # tokens, V; a run takes its tokenizer's number
    preset: str = "custom"  # the key of this shape in PRESETS
    rotary_base: float = 10_000.0  # wavelengths run from 2 pi to 2 pi times this
    norm_epsilon: float = 1e-6  # added to the mean square in RMSNorm
    positions: int = 1024  # of `architectures.GPT2`: the longest sequence
    scan_unroll: int = 1  # layers per scan iteration: faster on CPU, slower to compile
    attention: str = "xla"  # implementation of jax.nn.dot_product_attention

    embedding: str = setting("plain", OneOf(tuple(EMBEDDINGS)))
    # stable: Spike No More; wesar: WeSaR.
    initialization: str = setting("standard", OneOf(INITIALIZATIONS))
    # scaled: LayerNorm Scaling; mixed: Mix-LN.
    norm: str = setting("pre", OneOf(NORMS))
    # A sigmoid gate on the outputs of the heads.
    gated_attention: bool = setting(False, Switch())
    # An RMSNorm of each head's queries and keys.
    qk_norm: bool = setting(False, Switch())
    # The largest size of attention's logits and of the next token's logits.
    attention_softcap: float | None = setting(None, Real(exclude_low=True))
    logit_softcap: float | None = setting(None, Real(exclude_low=True))
    # The largest attention logit, above which QK-clip scales a head's queries and keys.
    qk_clip: float | None = setting(None, Real(exclude_low=True))
    # A head of its own instead of the transposed embedding.
    untied_head: bool = setting(False, Switch())
    # Of activations; parameters are float32.
    compute_dtype: str = setting("float32", OneOf(COMPUTE_DTYPES))
    # Of the weights and activations of the linear layers in the blocks.
    quantize: str = setting("none", OneOf(QUANTIZATIONS))
    # The inputs of a layer that share a scale. Of three, no activation is rounded.
    quantize_group: int = setting(256, Whole(4))
    # The activations that the backward pass computes again.
    remat: str = setting("none", OneOf(REMAT))

    def __post_init__(self):
        check_settings(self)
        if self.width % (2 * self.heads):
            raise UsageError(
                f"width must be a multiple of twice the heads, which is"
                f" {2 * self.heads}, not {self.width}"
            )
        if self.norm == "scaled" and self.initialization in DEPTH_SCALED:
            raise UsageError(
                f"--norm scaled and --initialization {self.initialization} both make"
                " sub-layers smaller with depth, and must not be combined: use"
                " --initialization standard, or another --norm"
            )
        if self.qk_clip is not None:
            bounded = "qk_norm" if self.qk_norm else "attention_softcap"
            if self.qk_norm or self.attention_softcap is not None:
                raise UsageError(
                    f"--qk-clip and --{bounded.replace('_', '-')} must not be combined:"
                    " the second already bounds the attention logits"
                )
            if self.norm == "mixed":
                raise UsageError("--qk-clip and --norm mixed must not be combined")

    @functools.cached_property
    def matrix_parameters(self) -> int:
        """Parameters that a token is multiplied with: all kernels and the head.

        A tied head is the transposed embedding.
        """
        _, params = abstract(self)
        names, leaves = spam_optax.tensor_names(params), jax.tree.leaves(params)
        head = "head/kernel" if self.untied_head else "embed/embedding"
        return sum(
            leaf.size
            for name, leaf in zip(names, leaves, strict=True)
            if name == head or name.endswith("/kernel")
        )

    def flops_per_token(self, tokens: int) -> int:
        """Returns the FLOPs per token of a step on sequences of `tokens` tokens.

        Twice the matrix parameters forward, twice that backward, and attention's two
        products over the whole sequence, masked half included: the convention of PaLM,
        appendix B. What rematerialization computes again does not count.
        """
        return 6 * self.matrix_parameters + 12 * self.layers * self.width * tokens


SHAPES = {
    "nano": ModelConfig(layers=2, width=32, heads=2, ffn_width=64, vocabulary=256),
    "tiny": ModelConfig(
        layers=3, width=96, heads=3, ffn_width=256, vocabulary=256, scan_unroll=3
    ),
    # The LLaMA shapes of GaLore, SPAM and their relatives.
    "9m": ModelConfig(layers=4, width=128, heads=4, ffn_width=352),
    "60m": ModelConfig(layers=8, width=512, heads=8, ffn_width=1376),
    "130m": ModelConfig(layers=12, width=768, heads=12, ffn_width=2048),
    "350m": ModelConfig(layers=24, width=1024, heads=16, ffn_width=2736),
    "1b": ModelConfig(layers=24, width=2048, heads=32, ffn_width=5461),
}
PRESETS = {
    name: dataclasses.replace(shape, preset=name) for name, shape in SHAPES.items()
}


def for_platform(config: ModelConfig, vocabulary: int, platform: str) -> ModelConfig:
    """Returns the model of a run, for a tokenizer's vocabulary and a kind of device."""
    fused = platform == "gpu" and has_fused_attention(config.compute_dtype)
    attention = "cudnn" if fused else "xla"
    return dataclasses.replace(config, vocabulary=vocabulary, attention=attention)


def has_fused_attention(dtype: str) -> bool:
    """Returns whether cuDNN is installed and has an attention kernel for this dtype."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), dtype)
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
    try:
        jax.eval_shape(attend, x, x, x)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def make_initializers(config: ModelConfig) -> initializers.StableInitializers:
    """Returns initializers of kernels, residual kernels and the embedding.

    The standard one is a normal distribution for all: GPT-2's deviation of 0.02 at
    width 625, more in a narrower model. WeSaR's kernels have initializers of their own.
    """
    if config.initialization in DEPTH_SCALED:
        return initializers.stable(config.width, config.layers)
    normal = nnx.initializers.normal(0.5 / config.width**0.5)
    return initializers.StableInitializers(normal, normal, normal)


def flat_dot_general(x, kernel, dimension_numbers, **kwargs):
    """Multiplies activations with any leading axes by a matrix, as `lax.dot_general`.

    The leading axes are merged first because XLA's CPU backend takes about 1.3 times
    as long for the gradient of a 3-D product.
    """
    ((contracted, (axis,)), batch) = dimension_numbers
    if contracted != (x.ndim - 1,) or batch != ((), ()):
        raise ValueError(f"Not a product over the last axis: {dimension_numbers}.")
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (axis,)), batch), **kwargs)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def linear(
    config: ModelConfig,
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    residual: bool = False,
    use_bias: bool = False,
) -> nnx.Linear:
    """Makes a linear layer; `residual` if its output is added to the stream."""
    if config.initialization == "wesar":
        std = (2 / (5 * config.width)) ** 0.5  # Spike No More's
        target_std = std / (2 * config.layers) ** 0.5 if residual else std
        layer = functools.partial(spam_optax.nnx.WesarLinear, target_std=target_std)
    else:
        init = make_initializers(config)
        kernel_init = init.residual if residual else init.kernel
        layer = functools.partial(nnx.Linear, kernel_init=kernel_init)
    dot_general = flat_dot_general
    if config.quantize != "none":
        dot_general = quantization.DotGeneral(
            config.quantize, config.quantize_group, flat_dot_general
        )
    return layer(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=config.compute_dtype,
        dot_general=dot_general,
        rngs=rngs,
    )


def norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.width,
        epsilon=config.norm_epsilon,
        dtype=config.compute_dtype,
        rngs=rngs,
    )


def rotate(x_BTHK: jax.Array, base: float) -> jax.Array:
    """Applies rotary positions: rotates pairs of features by position-dependent angles.

    The product of a rotated query and a rotated key depends on their contents and on
    the distance between them only.
    """
    tokens, half = x_BTHK.shape[1], x_BTHK.shape[3] // 2
    frequency = base ** (-jnp.arange(half) / half)
    angle = jnp.arange(tokens)[:, None] * frequency[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Keeps `x` between minus `cap` and `cap`. None: there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHK: jax.Array,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes causal attention and the largest logit of every head.

    This is `jax.nn.dot_product_attention`, in XLA, with a soft cap of the logits. The
    largest logit is measured before the cap.
    """
    logits_BHTS = jnp.einsum(
        "bthk,bshk->bhts",
        query_BTHK,
        key_BSHK,
        preferred_element_type=jnp.float32,
    )
    logits_BHTS *= query_BTHK.shape[-1] ** -0.5
    is_seen_TS = jnp.tril(jnp.ones(logits_BHTS.shape[2:], bool))[None, None]
    smallest = jnp.finfo(jnp.float32).min
    seen_BHTS = jnp.where(is_seen_TS, logits_BHTS, smallest)
    largest_H = jax.lax.stop_gradient(seen_BHTS).max((0, 2, 3))
    if cap is not None:
        seen_BHTS = jnp.where(is_seen_TS, softcap(logits_BHTS, cap), smallest)
    weights_BHTS = jax.nn.softmax(seen_BHTS, axis=-1).astype(value_BSHK.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS, value_BSHK), largest_H


class AttentionLogits(nnx.Intermediate):
    """The largest attention logit of every head of a batch."""


class Attention(nnx.Module):
    """Causal self-attention with rotary positions.

    The gate, if there is one, is that of Qiu et al. (2025): a sigmoid for each feature
    of each head, of a linear function of the block's input, before the last matrix.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        project = functools.partial(linear, config, config.width, config.width, rngs)
        self.query = project()
        self.key = project()
        self.value = project()
        self.out = project(residual=True)
        if config.gated_attention:
            self.gate = project()
        if config.qk_norm:
            width = config.width // config.heads
            self.query_norm, self.key_norm = (
                nnx.RMSNorm(width, dtype=config.compute_dtype, rngs=rngs)
                for _ in range(2)
            )

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        H = self.config.heads
        query, key, value = (
            project(x_BTD).reshape(B, T, H, D // H)
            for project in (self.query, self.key, self.value)
        )
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (rotate(x, self.config.rotary_base) for x in (query, key))
        attended_BTD = self.attend(query, key, value).reshape(B, T, D)
        if self.config.gated_attention:
            attended_BTD = attended_BTD * nnx.sigmoid(self.gate(x_BTD))
        return self.out(attended_BTD)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Computes attention, and records its logits if QK-clip needs them."""
        config = self.config
        if config.qk_clip is None and config.attention_softcap is None:
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation=config.attention
            )
        attended_BTHK, largest_H = attend(query, key, value, config.attention_softcap)
        if config.qk_clip is not None:
            self.sow(AttentionLogits, "largest", largest_H, reduce_fn=lambda _, x: x)
        return attended_BTHK


class FeedForward(nnx.Module):
    """SwiGLU: a gated feed-forward layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = linear(config, config.width, config.ffn_width, rngs)
        self.up = linear(config, config.width, config.ffn_width, rngs)
        self.down = linear(config, config.ffn_width, config.width, rngs, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """One residual block: attention, then the feed-forward layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = norm(config, rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def pre_norm(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))

    def scaled_norm(self, x_BTD: jax.Array, factor: jax.Array) -> jax.Array:
        """Applies the block with norms scaled by `factor` (LayerNorm Scaling)."""
        x_BTD = x_BTD + self.attention(factor * self.attention_norm(x_BTD))
        return x_BTD + self.ffn(factor * self.ffn_norm(x_BTD))

    def post_norm(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD))
        return self.ffn_norm(x_BTD + self.ffn(x_BTD))


class Decoder(nnx.Module):
    """Tokens in, float32 logits of the next token out.

    The blocks are one module whose parameters have a leading axis of layers, so a deep
    model compiles as fast as a shallow one. Other architectures have other blocks.
    """

    block = Block
    make_norm = staticmethod(norm)

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = EMBEDDINGS[config.embedding](
            config.vocabulary,
            config.width,
            dtype=config.compute_dtype,
            promote_dtype=cast_table,
            embedding_init=make_initializers(config).embedding,
            rngs=rngs,
        )
        self.blocks = stack_blocks(self.block, config, rngs)
        self.norm = self.make_norm(config, rngs)
        if config.untied_head:
            precise = dataclasses.replace(config, quantize="none")
            self.head = linear(precise, config.width, config.vocabulary, rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = sharding.constrain_batch(self.look_up(tokens_BT))
        x_BTD = self.norm(through_blocks(self.config, x_BTD, self.blocks))
        return softcap(self.score(x_BTD), self.config.logit_softcap)

    def score(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the float32 logits of the next token, without a cap."""
        if self.config.untied_head:
            return self.head(x_BTD).astype(jnp.float32)
        (embedding_VD,) = cast_table((self.embed.embedding[...],), dtype=x_BTD.dtype)
        logits_BTV = flat_dot_general(x_BTD, embedding_VD, (((2,), (1,)), ((), ())))
        return logits_BTV.astype(jnp.float32)

    def look_up(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns the embeddings of the tokens."""
        return self.embed(tokens_BT)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns the structure of the model, and shapes and dtypes of its parameters."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(decoder)
    return graphdef, nnx.to_pure_dict(state)


def forward(
    graphdef: nnx.GraphDef, params: optax.Params, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the next token's logits, and the largest attention logits.

    These have the shape (layers, heads). They are None without QK-clip.
    """
    decoder = nnx.merge(graphdef, params)
    if decoder.config.qk_clip is None:
        return decoder(tokens_BT), None
    logits, captured = nnx.capture(decoder, AttentionLogits)(tokens_BT)
    (largest,) = jax.tree.leaves(captured)
    return logits, largest


def through_blocks(
    config: ModelConfig, x_BTD: jax.Array, blocks: nnx.Module
) -> jax.Array:
    """Applies the stacked blocks in turn."""
    scan = functools.partial(scan_blocks, config)
    if config.norm == "scaled":
        factors = 1 / jnp.sqrt(jnp.arange(1, config.layers + 1))
        factors = factors.astype(config.compute_dtype)
        return scan("scaled_norm", x_BTD, blocks, factors)
    if config.norm == "mixed":
        early = max(1, config.layers // 4)
        first, rest = (
            jax.tree.map(lambda x, part=part: x[part], blocks)
            for part in (slice(early), slice(early, None))
        )
        return scan("pre_norm", scan("post_norm", x_BTD, first), rest)
    return scan("pre_norm", x_BTD, blocks)


def scan_blocks(
    config: ModelConfig, method: str, x_BTD: jax.Array, *stacked: Any
) -> jax.Array:
    """Applies a method of each block to the stream and the block's part of the rest."""

    def apply(x_BTD, block, *rest):
        return sharding.constrain_batch(getattr(block, method)(x_BTD, *rest))

    if config.remat != "none":
        apply = nnx.remat(apply, prevent_cse=False, policy=REMAT_POLICIES[config.remat])
    scan = nnx.scan(
        apply,
        in_axes=(nnx.Carry, *(0 for _ in stacked)),
        out_axes=nnx.Carry,
        unroll=config.scan_unroll,
    )
    return scan(x_BTD, *stacked)


def cast_table(arrays: tuple[jax.Array, ...], *, dtype: str, **options):
    """Casts an embedding's table and gathers its columns, as its `promote_dtype`.

    The devices then exchange the table instead of the rows that they looked up.
    """
    del options  # Flax's, for inputs that are not floats yet
    cast = (x.astype(dtype) for x in arrays)
    return tuple(sharding.gather_columns(x) if x.ndim == 2 else x for x in cast)


def stack_blocks(
    block: type[nnx.Module], config: ModelConfig, rngs: nnx.Rngs
) -> nnx.Module:
    """Makes all blocks as one module, with independently drawn parameters."""

    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return block(config, rngs=rngs)

    return create(rngs)
