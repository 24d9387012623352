"""Embeddings with a large shortcut for Flax NNX, after Spike No More.

Drop-in replacements of ``flax.nnx.Embed``: the residual stream leaves them with a
standard deviation near 1. See :mod:`spam_optax.initializers` for the other half of the
method, and :mod:`spam_optax.linen` for the same modules in Linen.
"""

import math
from typing import Any

import jax
from jax.nn.initializers import Initializer

from spam_optax import initializers

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ImportError(
        "spam_optax.nnx needs Flax: pip install spam_optax[flax]"
    ) from error

__all__ = ("NormedEmbed", "ScaledEmbed")


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
