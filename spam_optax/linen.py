"""Layers for Flax Linen: large embeddings of Spike No More, and WeSaR.

``ScaledEmbed`` and ``NormedEmbed`` replace ``flax.linen.Embed``. The residual stream
leaves them with a standard deviation near 1. See :mod:`spam_optax.initializers` for the
other half of the method. ``WesarDense`` replaces ``flax.linen.Dense``.
:mod:`spam_optax.nnx` has the same modules in NNX.
"""

import math
from typing import Any

import jax
from jax.nn.initializers import Initializer

from spam_optax import _wesar, initializers
from spam_optax._wesar import fold_wesar as fold_wesar

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    raise ImportError(
        "spam_optax.linen needs Flax: pip install spam_optax[flax]"
    ) from error

__all__ = ("NormedEmbed", "ScaledEmbed", "WesarDense", "fold_wesar")


class ScaledEmbed(nn.Embed):
    r"""Embedding whose output is multiplied by the square root of its width.

    .. math::
      x = \sqrt d \, E[\mathrm{id}], \qquad E \sim \mathcal{N}(0, \tfrac{2}{5 d})

    with :math:`d` = ``features``. The output has a standard deviation of
    :math:`\sqrt{0.4}`, 0.632. The layer meets condition 2 of Spike No More.

    The attributes are those of ``flax.linen.Embed``. Only ``embedding_init`` has
    another default, :func:`~spam_optax.initializers.stable_embedding` of ``features``.
    With Flax's default initializer the standard deviation would be 1.
    ``attend(query)`` is ``query @ embedding.T`` with the stored table, without the
    factor, so a tied head returns logits of order 1.

    Linen has no ``out_sharding``. On an explicit mesh, wrap a lookup in a table that is
    sharded over the vocabulary in ``jax.sharding.auto_axes``.

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
        """Embeds integers and appends an axis of length ``features``."""
        return super().__call__(inputs) * math.sqrt(self.features)


class NormedEmbed(nn.Embed):
    r"""Embedding followed by a LayerNorm.

    .. math::
      x = \mathrm{LayerNorm}(E[\mathrm{id}]), \qquad
      E \sim \mathcal{N}(0, \tfrac{2}{5 d})

    with :math:`d` = ``features``. The output has a standard deviation of 1. The layer
    meets condition 2 of Spike No More.

    The attributes are those of ``flax.linen.Embed``, with the default of
    :class:`ScaledEmbed` for ``embedding_init``. ``dtype`` and ``param_dtype`` apply
    to the LayerNorm too. Its ``scale`` and ``bias`` are the parameters ``norm``.
    ``attend(query)`` is ``query @ embedding.T`` with the stored table, which is not
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

    def setup(self) -> None:
        super().setup()  # type: ignore[no-untyped-call]
        self.norm = nn.LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Embeds integers and appends an axis of length ``features``."""
        return self.norm(super().__call__(inputs))


class WesarDense(nn.Dense):
    r"""Dense layer whose matrix is reparameterised: WeSaR.

    .. math::
      y = x \, (\alpha W) + b, \qquad W \sim \mathcal{N}(0, 4 \cdot 10^{-5}), \quad
      \alpha_0 = \frac{s}{\sqrt{4 \cdot 10^{-5}}}

    with :math:`s` = ``target_std``. The parameters are ``kernel``, which is :math:`W`;
    ``alpha``, a scalar; and ``bias``, which is not scaled. The product
    :math:`\alpha W` is computed in ``param_dtype``. See
    :func:`~spam_optax.initializers.wesar` for the reason. :func:`fold_wesar` returns
    the parameters of a plain ``Dense``.

    The attributes are those of ``flax.linen.Dense``, with another default for
    ``kernel_init``, and ``target_std``: the standard deviation of :math:`\alpha W` at
    initialization, > 0. None: the standard deviation of Spike No More's kernels,
    :math:`\sqrt{2 / (5 d)}` with :math:`d` the width of the input. This is right if the
    input is the residual stream. For attention-out and FFN-out pass
    :math:`\sqrt{2 / (5 d)} / \sqrt{2 N}`, with the width :math:`d` and the number of
    layers :math:`N` of the model. You may wrap ``kernel_init`` for partitioning, but do
    not change its distribution, which is that of ``initializers.wesar``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from spam_optax import linen
      >>> layer = linen.WesarDense(512, target_std=0.02)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 1024)))
      >>> params = variables["params"]
      >>> print(f"{params['kernel'].std():.4f} {params['alpha']:.4f}")
      0.0063 3.1623
      >>> print(f"{linen.fold_wesar(params)['kernel'].std():.3f}")
      0.020

    References:
      Nishida et al., `Initialization of Large Language Models via Reparameterization to
      Mitigate Loss Spikes <https://arxiv.org/abs/2410.05052>`_, EMNLP 2024.
    """

    kernel_init: Initializer = initializers.wesar_kernel
    target_std: float | None = None

    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Declares a parameter. The ``kernel`` that ``Dense`` gets is the product."""
        value = super().param(name, init_fn, *args, **kwargs)
        if name != "kernel":
            return value
        width = value.shape[-2]
        init = _wesar.alpha_init(self.target_std, width)
        alpha = super().param("alpha", init, (), self.param_dtype)
        return _wesar.scale(value, alpha)
