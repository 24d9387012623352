"""Layers for Flax NNX: large embeddings of Spike No More, and WeSaR.

``ScaledEmbed`` and ``NormedEmbed`` replace ``flax.nnx.Embed``. The residual stream
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

    with :math:`d` = ``features``. The output has a standard deviation of
    :math:`\sqrt{0.4}`, 0.632. The layer meets condition 2 of Spike No More.

    ``attend(query)`` is ``query @ embedding.T`` with the stored table, without the
    factor, so a tied head returns logits of order 1.

    Args:
      num_embeddings: Size of the vocabulary.
      features: Width of the residual stream.
      embedding_init: Initializer of the table, of shape (num_embeddings, features). The
        default is :func:`~spam_optax.initializers.stable_embedding` of `features`. With
        Flax's default initializer the standard deviation of the output would be 1.
      rngs: The random streams, as for every NNX module.
      **kwargs: The other arguments of ``flax.nnx.Embed``: ``dtype``, ``param_dtype``,
        ``promote_dtype``, ``embedding_metadata``.

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
        """Embeds integers and appends an axis of length ``features``."""
        return super().__call__(inputs, out_sharding) * math.sqrt(self.features)


class NormedEmbed(nnx.Embed):
    r"""Embedding followed by a LayerNorm.

    .. math::
      x = \mathrm{LayerNorm}(E[\mathrm{id}]), \qquad
      E \sim \mathcal{N}(0, \tfrac{2}{5 d})

    with :math:`d` = ``features``. The output has a standard deviation of 1. The layer
    meets condition 2 of Spike No More.

    The LayerNorm is the attribute ``norm``. Its ``dtype``, ``param_dtype`` and
    ``promote_dtype`` are those of the table. ``attend(query)`` is
    ``query @ embedding.T`` with the stored table, which is not normalised. The
    arguments are those of :class:`ScaledEmbed`.

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
        """Embeds integers and appends an axis of length ``features``."""
        return self.norm(super().__call__(inputs, out_sharding))


class WesarLinear(nnx.Linear):
    r"""Linear layer whose matrix is reparameterised: WeSaR.

    .. math::
      y = x \, (\alpha W) + b, \qquad W \sim \mathcal{N}(0, 4 \cdot 10^{-5}), \quad
      \alpha_0 = \frac{s}{\sqrt{4 \cdot 10^{-5}}}

    with :math:`s` = `target_std`. The parameters are ``kernel``, the matrix :math:`W`;
    ``alpha``, a scalar; and ``bias``, which is not scaled. The product
    :math:`\alpha W` is computed in ``param_dtype``. See
    :func:`~spam_optax.initializers.wesar` for the reason. :func:`fold_wesar` returns
    the parameters of a plain ``Linear``.

    Args:
      in_features: Width of the input.
      out_features: Width of the output.
      target_std: Standard deviation of :math:`\alpha W` at initialization. None: the
        standard deviation of Spike No More's kernels, :math:`\sqrt{2 / (5 d)}` with
        :math:`d` = `in_features`. This is right if the input is the residual stream.
        For attention-out and FFN-out pass :math:`\sqrt{2 / (5 d)} / \sqrt{2 N}`, with
        the width :math:`d` and the number of layers :math:`N` of the model.
      kernel_init: Initializer of :math:`W`. You may wrap it, but do not change its
        distribution.
      rngs: The random streams, as for every NNX module.
      **kwargs: The other arguments of ``flax.nnx.Linear``.

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
        """Returns a plain layer with the product as its kernel.

        Its forward pass is used.
        """
        kernel = _wesar.scale(self.kernel[...], self.alpha[...])
        return nnx.Linear(
            self.in_features,
            self.out_features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=lambda *_: kernel,
            # It is called only if there is a bias.
            bias_init=lambda *_: self.bias[...],  # type: ignore[index]
            dot_general=self.dot_general,
            promote_dtype=self.promote_dtype,
            preferred_element_type=self.preferred_element_type,
            rngs=nnx.Rngs(0),
        )
