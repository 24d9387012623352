r"""Initializers of Spike No More: small sub-layers and a large shortcut.

A Pre-LN transformer has a LayerNorm before each sub-layer. Its gradient norm stays
small under two conditions:

1. The sub-layers are small. Draw queries, keys, values, FFN-in and gate with
   :func:`stable_kernel`, and attention-out and FFN-out with :func:`stable_residual`.
2. The shortcut, which is the residual connection, is large. The output of the embedding
   has a standard deviation near 1. Draw the table with :func:`stable_embedding` and use
   it in a ``ScaledEmbed`` or a ``NormedEmbed`` of :mod:`spam_optax.linen` or
   :mod:`spam_optax.nnx`.

:func:`wesar` is another way to small sub-layers. All matrices are drawn with the same
standard deviation, and a trainable factor sets the size of each.

The factories return plain JAX initializers, ``init(key, shape, dtype, out_sharding)``.
They work in Linen, in NNX, and in every library that accepts initializers of
``jax.nn.initializers``. The standard deviation depends on the width and depth of the
model and not on the shape drawn. It is therefore also right for flattened, scanned and
stacked kernels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from spam_optax import _arithmetic, _validate

__all__ = (
    "StableInitializers",
    "WesarInitializers",
    "stable",
    "stable_embedding",
    "stable_kernel",
    "stable_residual",
    "wesar",
)

WESAR_STD = math.sqrt(4e-5)


class StableInitializers(NamedTuple):
    """The initializers of one model, see :func:`stable`.

    Attributes:
      kernel: For queries, keys, values, FFN-in and gate.
      residual: For attention-out and FFN-out, which write to the residual stream.
      embedding: For the table of a ``ScaledEmbed`` or a ``NormedEmbed``.
    """

    kernel: Initializer
    residual: Initializer
    embedding: Initializer


def stable(width: int, num_layers: int) -> StableInitializers:
    r"""Returns the initializers of Spike No More for the given width and depth.

    .. math::
      \mathrm{kernel}, \mathrm{embedding} \sim \mathcal{N}\left(0, \tfrac{2}{5 d}\right)
      \qquad
      \mathrm{residual} \sim
      \mathcal{N}\left(0, \tfrac{2}{5 d} \cdot \tfrac{1}{2 N}\right)

    with :math:`d` = `width` and :math:`N` = `num_layers`. The second argument of
    :math:`\mathcal{N}` is the variance; the standard deviation is its square root.

    Args:
      width: Width of the residual stream, the same number for every matrix.
      num_layers: Number of transformer layers, each with an attention and an FFN.

    Returns:
      ``kernel``, ``residual`` and ``embedding``, in a named tuple.

    Raises:
      ValueError: If an argument is not a whole number of at least 1.
      TypeError: If an argument is not a number.

    Examples:
      >>> import jax
      >>> from spam_optax import initializers
      >>> init = initializers.stable(width=1024, num_layers=24)
      >>> key = jax.random.key(42)
      >>> for name, shape in [("kernel", (1024, 512)), ("residual", (512, 1024))]:
      ...     print(f"{name} {getattr(init, name)(key, shape).std():.4f}")
      kernel 0.0198
      residual 0.0029

      In a Flax module, Linen or NNX, these are the ``kernel_init`` and
      ``out_kernel_init`` of multi-head attention, the ``kernel_init`` of the dense
      layers and the ``embedding_init`` of the embedding.

    References:
      Takase et al., `Spike No More: Stabilizing the Pre-training of Large Language
      Models <https://arxiv.org/abs/2312.16903>`_, COLM 2025.

    .. warning::
      Do not combine the factor ``1 / sqrt(2 * num_layers)`` with LayerNorm Scaling,
      which divides a norm's output by the square root of its depth: both shrink the
      same sub-layers. With LayerNorm Scaling, use ``kernel`` for the outputs too.
    """
    _validate.check_whole("width", width, low=1)
    _validate.check_whole("num_layers", num_layers, low=1)
    return StableInitializers(
        kernel=stable_kernel(width),
        residual=stable_residual(width, num_layers),
        embedding=stable_embedding(width),
    )


def stable_std(width: int) -> float:
    """Returns the standard deviation of kernels and embeddings."""
    return math.sqrt(2 / (5 * width))


def stable_kernel(width: int) -> Initializer:
    r"""Returns the initializer of queries, keys, values, FFN-in and gate.

    .. math::
      W \sim \mathcal{N}\left(0, \tfrac{2}{5 d}\right), \qquad
      \mathrm{std} = \sqrt{\tfrac{2}{5 d}}

    :math:`d` is `width` for every matrix, whatever its fan-in, so this is not a
    ``variance_scaling``. It meets condition 1 of Spike No More: small sub-layers.

    Args:
      width: Width of the residual stream.

    Returns:
      ``init(key, shape, dtype=None, out_sharding=None)``, which draws any shape. None
      is JAX's default floating dtype. bfloat16 and float16 are drawn in float32.

    Raises:
      ValueError: If `width` is not a whole number of at least 1.
      TypeError: If `width` is not a number. ``init`` raises it if the dtype is neither
        floating nor complex.

    Examples:
      >>> import jax
      >>> from spam_optax import initializers
      >>> init = initializers.stable_kernel(width=1024)
      >>> kernel = init(jax.random.key(42), (1024, 512))
      >>> print(kernel.shape, kernel.dtype, f"{kernel.std():.4f}")
      (1024, 512) float32 0.0198

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, COLM 2025.
    """
    width = _validate.check_whole("width", width, low=1)
    return _normal(stable_std(width))


def stable_residual(width: int, num_layers: int) -> Initializer:
    r"""Returns the initializer of attention-out and FFN-out.

    These matrices write to the residual stream.

    .. math::
      W \sim \mathcal{N}\left(0, \tfrac{2}{5 d} \cdot \tfrac{1}{2 N}\right), \qquad
      \mathrm{std} = \sqrt{\tfrac{2}{5 d}} \cdot \tfrac{1}{\sqrt{2 N}}

    with :math:`N` = `num_layers` and :math:`d` = `width`, also for FFN-out, which has a
    larger fan-in. It meets condition 1 of Spike No More: small sub-layers.

    Args:
      width: Width of the residual stream.
      num_layers: Number of transformer layers, each with an attention and an FFN.

    Returns:
      ``init(key, shape, dtype=None, out_sharding=None)``, as of :func:`stable_kernel`.

    Raises:
      ValueError: If an argument is not a whole number of at least 1.
      TypeError: If an argument is not a number.

    Examples:
      >>> import jax
      >>> from spam_optax import initializers
      >>> init = initializers.stable_residual(width=1024, num_layers=24)
      >>> print(f"{init(jax.random.key(42), (4096, 256)).std():.4f}")
      0.0029

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, COLM 2025.

    .. warning::
      Do not combine it with LayerNorm Scaling, see :func:`stable`.
    """
    width = _validate.check_whole("width", width, low=1)
    num_layers = _validate.check_whole("num_layers", num_layers, low=1)
    return _normal(stable_std(width) / math.sqrt(2 * num_layers))


def stable_embedding(width: int) -> Initializer:
    r"""Returns the initializer of the table of a ``ScaledEmbed`` or ``NormedEmbed``.

    .. math::
      E \sim \mathcal{N}\left(0, \tfrac{2}{5 d}\right), \qquad
      \mathrm{std} = \sqrt{\tfrac{2}{5 d}}

    with :math:`d` = `width`. The small table alone does not meet condition 2 of Spike
    No More, a large shortcut. The operation after the lookup does:

    - ``ScaledEmbed`` multiplies by :math:`\sqrt d`. The standard deviation of its
      output is :math:`\sqrt{0.4}`, 0.632.
    - ``NormedEmbed`` normalizes. The standard deviation of its output is 1.

    The table stays small, so a tied head (``attend``) returns logits of order 1.

    Args:
      width: Width of the residual stream, the number of columns of the table.

    Returns:
      ``init(key, shape, dtype=None, out_sharding=None)``, as of :func:`stable_kernel`.

    Raises:
      ValueError: If `width` is not a whole number of at least 1.
      TypeError: If `width` is not a number.

    Examples:
      >>> import jax
      >>> from spam_optax import initializers
      >>> init = initializers.stable_embedding(width=256)
      >>> table = init(jax.random.key(42), (4096, 256))
      >>> print(f"{table.std():.4f}, scaled {(table * 256**0.5).std():.2f}")
      0.0395, scaled 0.63

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, COLM 2025.

    .. warning::
      Three similar setups behave differently:

      - Flax's default for an ``Embed`` has std :math:`1 / \sqrt d`, so the scaled
        output has std 1 and not 0.632.
      - A plain ``Embed`` with std 1 has a large shortcut, but it needs an untied head
        or logits divided by :math:`\sqrt d`, and weight decay makes the shortcut
        smaller again.
      - Scaling down the gradient of the embedding does not make the shortcut larger.
    """
    width = _validate.check_whole("width", width, low=1)
    return _normal(stable_std(width))


def embedding_table(
    key: jax.Array,
    shape: Sequence[int],
    dtype: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Draws `stable_embedding` of the width in `shape`.

    This is the default of the layers.
    """
    return stable_embedding(shape[-1])(key, shape, dtype, out_sharding)


class WesarInitializers(NamedTuple):
    """The initializers of one reparameterised matrix, see :func:`wesar`.

    Attributes:
      kernel: For the stored matrix :math:`W`, the same for every target.
      alpha: For its factor, a scalar.
    """

    kernel: Initializer
    alpha: Initializer


def wesar(target_std: float) -> WesarInitializers:
    r"""Returns the initializers of WeSaR, weight scaling as reparameterisation.

    .. math::
      \bar W = \alpha W, \qquad W \sim \mathcal{N}(0, \sigma^2), \quad
      \sigma^2 = 4 \cdot 10^{-5}, \qquad \alpha_0 = \frac{s}{\sigma}

    :math:`s` is `target_std`: the standard deviation that the matrix has without
    reparameterisation, for example that of :func:`stable_kernel`. A model computes with
    :math:`\bar W` and trains :math:`W` and :math:`\alpha`. All matrices :math:`W` then
    have the same standard deviation. An optimizer such as Adam, whose steps do not
    depend on the size of the gradient, therefore changes all matrices by the same
    fraction. Without reparameterisation it changes the smallest matrices most.

    ``WesarDense`` of :mod:`spam_optax.linen` and ``WesarLinear`` of
    :mod:`spam_optax.nnx` are such layers.

    Args:
      target_std: Standard deviation of :math:`\bar W` at initialization.

    Returns:
      ``kernel`` and ``alpha``, in a named tuple.

    Raises:
      ValueError: If `target_std` is not > 0.
      TypeError: If `target_std` is not a number.

    Examples:
      >>> import jax
      >>> from spam_optax import initializers
      >>> init = initializers.wesar(target_std=0.02)
      >>> kernel = init.kernel(jax.random.key(42), (1024, 512))
      >>> alpha = init.alpha(jax.random.key(43), ())
      >>> print(f"{alpha * kernel.std():.4f} = {alpha:.4f} * {kernel.std():.4f}")
      0.0200 = 3.1623 * 0.0063

    References:
      Nishida et al., `Initialization of Large Language Models via Reparameterization to
      Mitigate Loss Spikes <https://arxiv.org/abs/2410.05052>`_, EMNLP 2024.
    """
    target_std = _validate.check_number("target_std", target_std, above=0)
    alpha = jax.nn.initializers.constant(target_std / WESAR_STD)
    return WesarInitializers(kernel=wesar_kernel, alpha=alpha)


def wesar_kernel(
    key: jax.Array,
    shape: Sequence[int],
    dtype: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Draws the `kernel` of `wesar`. This is the default of the layers."""
    return _normal(WESAR_STD)(key, shape, dtype, out_sharding)


def _normal(std: float) -> Initializer:
    """Returns JAX's `normal`, drawn in at least float32."""
    draw = jax.nn.initializers.normal(std)

    def init(
        key: jax.Array,
        shape: Sequence[int],
        dtype: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        dtype = jnp.result_type(float) if dtype is None else dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                "initializers: dtype must be floating or complex, got "
                f"{jnp.dtype(dtype)}."
            )
        # A normal drawn in bfloat16 has 128 values and a mean of -0.012 std. A common
        # mean is a large singular value: it grows with the width, and those of the
        # noise grow with its root.
        wide = _arithmetic.promote_types(dtype, jnp.float32)
        return draw(key, shape, wide, out_sharding).astype(dtype)

    return init
