"""Embeddings with a large shortcut for Flax Linen, after Spike No More.

Drop-in replacements of ``flax.linen.Embed``: the residual stream leaves them with a
standard deviation near 1. See :mod:`spam_optax.initializers` for the other half of the
method, and :mod:`spam_optax.nnx` for the same modules in NNX.
"""

import math

import jax
from jax.nn.initializers import Initializer

from spam_optax import initializers

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    raise ImportError(
        "spam_optax.linen needs Flax: pip install spam_optax[flax]"
    ) from error

__all__ = ("NormedEmbed", "ScaledEmbed")


class ScaledEmbed(nn.Embed):
    r"""Embedding whose output is multiplied by the square root of its width.

    .. math::
      x = \sqrt d \, E[\mathrm{id}], \qquad E \sim \mathcal{N}(0, \tfrac{2}{5 d})

    with :math:`d` = ``features``: the output has a standard deviation of
    :math:`\sqrt{0.4}`, 0.632. The scaled embedding of condition 2 of Spike No More.

    The attributes are those of ``flax.linen.Embed``; only ``embedding_init`` has
    another default, :func:`~spam_optax.initializers.stable_embedding` of ``features``.
    (Flax's default would make it 1 instead of 0.632.) ``attend(query)`` is
    ``query @ embedding.T`` with the table as stored, without the factor, so that a tied
    head gives logits of order 1.

    On an explicit mesh Linen has no ``out_sharding``: a lookup in a table sharded over
    the vocabulary goes through ``jax.sharding.auto_axes``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from spam_optax import linen
      >>> embed = linen.ScaledEmbed(num_embeddings=1000, features=256)
      >>> ids = jnp.arange(1000)
      >>> variables = embed.init(jax.random.key(0), ids)
      >>> x = embed.apply(variables, ids)
      >>> print(x.shape, f"{x.std():.2f}")
      (1000, 256) 0.63
      >>> embed.apply(variables, x, method="attend").shape
      (1000, 1000)

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, COLM 2025.
    """

    embedding_init: Initializer = initializers.embedding_table

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Embeds integers; appends an axis of length ``features``."""
        return super().__call__(inputs) * math.sqrt(self.features)


class NormedEmbed(nn.Embed):
    r"""Embedding followed by a LayerNorm.

    .. math::
      x = \mathrm{LayerNorm}(E[\mathrm{id}]), \qquad
      E \sim \mathcal{N}(0, \tfrac{2}{5 d})

    with :math:`d` = ``features``: the output has a standard deviation of 1. Another
    way to condition 2 of Spike No More.

    The attributes are those of ``flax.linen.Embed``, with the default of
    :class:`ScaledEmbed` for ``embedding_init``; ``dtype`` and ``param_dtype`` hold for
    the LayerNorm too. Its ``scale`` and ``bias`` are the parameters ``norm``.
    ``attend(query)`` is ``query @ embedding.T`` with the table as stored, not
    normalised.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from spam_optax import linen
      >>> embed = linen.NormedEmbed(num_embeddings=1000, features=256)
      >>> ids = jnp.arange(1000)
      >>> x, variables = embed.init_with_output(jax.random.key(0), ids)
      >>> print(x.shape, f"{x.std():.2f}")
      (1000, 256) 1.00
      >>> sorted(variables["params"])
      ['embedding', 'norm']

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, COLM 2025.
    """

    embedding_init: Initializer = initializers.embedding_table

    def setup(self):
        super().setup()
        self.norm = nn.LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Embeds integers; appends an axis of length ``features``."""
        return self.norm(super().__call__(inputs))
