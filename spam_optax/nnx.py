"""Layers for Flax NNX: large embeddings after Spike No More, and WeSaR.

``ScaledEmbed`` and ``NormedEmbed`` replace ``flax.nnx.Embed``: the residual stream
leaves them with a standard deviation near 1. See :mod:`spam_optax.initializers` for the
other half of the method. ``WesarLinear`` replaces ``flax.nnx.Linear``.
:mod:`spam_optax.linen` has the same modules in Linen.
"""

import math
from typing import Any

import jax
from jax.nn.initializers import Initializer

from spam_optax import _wesar, initializers
from spam_optax._wesar import fold_wesar as fold_wesar

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ImportError(
        "spam_optax.nnx needs Flax: pip install spam_optax[flax]"
    ) from error

__all__ = ("NormedEmbed", "ScaledEmbed", "WesarLinear", "fold_wesar")


class ScaledEmbed(nnx.Embed):
    r"""Embedding whose output is multiplied by the square root of its width.

    .. math::
      x = \sqrt d \, E[\mathrm{id}], \qquad E \sim \mathcal{N}(0, \tfrac{2}{5 d})

    with :math:`d` = ``features``: the output has a standard deviation of
    :math:`\sqrt{0.4}`, 0.632. The scaled embedding of condition 2 of Spike No More.

    ``attend(query)`` is ``query @ embedding.T`` with the table as stored, without the
    factor, so that a tied head gives logits of order 1.

    Args:
      num_embeddings: Size of the vocabulary.
      features: Width of the residual stream.
      embedding_init: Initializer of the table, of shape (num_embeddings, features); by
        default :func:`~spam_optax.initializers.stable_embedding` of `features`. (That
        of ``flax.nnx.Embed`` would make the output's deviation 1 instead of 0.632.)
      rngs: The random streams, as for any NNX module.
      **kwargs: Everything else that ``flax.nnx.Embed`` takes: ``dtype``,
        ``param_dtype``, ``promote_dtype``, ``embedding_metadata``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx as flax_nnx
      >>> from spam_optax import nnx
      >>> embed = nnx.ScaledEmbed(1000, 256, rngs=flax_nnx.Rngs(0))
      >>> x = embed(jnp.arange(1000))
      >>> print(x.shape, f"{x.std():.2f}")
      (1000, 256) 0.63
      >>> embed.attend(x).shape
      (1000, 1000)

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, COLM 2025.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: Initializer = initializers.embedding_table,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            num_embeddings,
            features,
            embedding_init=embedding_init,
            rngs=rngs,
            **kwargs,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Embeds integers; appends an axis of length ``features``."""
        return super().__call__(inputs, out_sharding) * math.sqrt(self.features)


class NormedEmbed(nnx.Embed):
    r"""Embedding followed by a LayerNorm.

    .. math::
      x = \mathrm{LayerNorm}(E[\mathrm{id}]), \qquad
      E \sim \mathcal{N}(0, \tfrac{2}{5 d})

    with :math:`d` = ``features``: the output has a standard deviation of 1. Another
    way to condition 2 of Spike No More.

    The LayerNorm is the attribute ``norm`` and shares ``dtype``, ``param_dtype`` and
    ``promote_dtype`` with the table. ``attend(query)`` is ``query @ embedding.T`` with
    the table as stored, not normalised.

    Args:
      num_embeddings: Size of the vocabulary.
      features: Width of the residual stream.
      embedding_init: Initializer of the table, of shape (num_embeddings, features); by
        default :func:`~spam_optax.initializers.stable_embedding` of `features`.
      rngs: The random streams, as for any NNX module.
      **kwargs: Everything else that ``flax.nnx.Embed`` takes: ``dtype``,
        ``param_dtype``, ``promote_dtype``, ``embedding_metadata``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx as flax_nnx
      >>> from spam_optax import nnx
      >>> embed = nnx.NormedEmbed(1000, 256, rngs=flax_nnx.Rngs(0))
      >>> x = embed(jnp.arange(1000))
      >>> print(x.shape, f"{x.std():.2f}")
      (1000, 256) 1.00

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, COLM 2025.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: Initializer = initializers.embedding_table,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            num_embeddings,
            features,
            embedding_init=embedding_init,
            rngs=rngs,
            **kwargs,
        )
        self.norm = nnx.LayerNorm(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            promote_dtype=self.promote_dtype,
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Embeds integers; appends an axis of length ``features``."""
        return self.norm(super().__call__(inputs, out_sharding))


class WesarLinear(nnx.Linear):
    r"""Linear layer whose matrix is reparameterised: WeSaR.

    .. math::
      y = x \, (\alpha W) + b, \qquad W \sim \mathcal{N}(0, 4 \cdot 10^{-5}), \quad
      \alpha_0 = \frac{s}{\sqrt{4 \cdot 10^{-5}}}

    with :math:`s` = `target_std`. The parameters are ``kernel``, the matrix :math:`W`;
    ``alpha``, a scalar; and ``bias``, which is not scaled. The product
    :math:`\alpha W` is made in ``param_dtype``.
    :func:`~spam_optax.initializers.wesar` tells what it is good for; :func:`fold_wesar`
    makes the parameters of a plain ``Linear``.

    Args:
      in_features: Width of the input.
      out_features: Width of the output.
      target_std: Standard deviation of :math:`\alpha W` at initialization. None is that
        of Spike No More's kernels, :math:`\sqrt{2 / (5 d)}` with :math:`d` =
        `in_features`. That is right where the input is the residual stream; for
        attention-out and FFN-out pass :math:`\sqrt{2 / (5 d)} / \sqrt{2 N}`, with the
        width and depth of the model.
      kernel_init: Initializer of :math:`W`; wrap it, but keep what it draws.
      rngs: The random streams, as for any NNX module.
      **kwargs: Everything else that ``flax.nnx.Linear`` takes.

    Raises:
      ValueError: If `target_std` is not > 0.
      TypeError: If `target_std` is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx as flax_nnx
      >>> from spam_optax import nnx
      >>> layer = nnx.WesarLinear(1024, 512, target_std=0.02, rngs=flax_nnx.Rngs(0))
      >>> print(f"{layer.kernel.std():.4f} {layer.alpha[...]:.4f}")
      0.0063 3.1623
      >>> folded = nnx.fold_wesar(flax_nnx.state(layer))
      >>> print(f"{folded['kernel'].std():.3f}")
      0.020

    References:
      Nishida et al., `Initialization of Large Language Models via Reparameterization to
      Mitigate Loss Spikes <https://arxiv.org/abs/2410.05052>`_, EMNLP 2024.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        target_std: float | None = None,
        kernel_init: Initializer = initializers.wesar_kernel,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        alpha_init = _wesar.alpha_init(target_std, in_features)
        super().__init__(
            in_features, out_features, kernel_init=kernel_init, rngs=rngs, **kwargs
        )
        self.alpha = nnx.Param(alpha_init(rngs.params(), (), self.param_dtype))

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to the last axis."""
        return self._folded()(inputs, out_sharding)

    def _folded(self) -> nnx.Linear:
        """The plain layer that computes the same: its forward pass is this one's."""
        kernel = _wesar.scale(self.kernel[...], self.alpha[...])
        return nnx.Linear(
            self.in_features,
            self.out_features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=lambda *_: kernel,
            bias_init=lambda *_: self.bias[...],
            dot_general=self.dot_general,
            promote_dtype=self.promote_dtype,
            preferred_element_type=self.preferred_element_type,
            rngs=nnx.Rngs(0),
        )
