"""Shared by the WeSaR layers: the product, its target, and folding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spam_optax import _validate, initializers


def alpha_init(target_std: float | None, width: int) -> jax.nn.initializers.Initializer:
    """Returns the initializer of a layer's factor.

    The default target is Spike No More's.
    """
    if target_std is None:
        target_std = initializers.stable_std(width)
    target_std = _validate.check_number("target_std", target_std, above=0)
    return initializers.wesar(target_std).alpha


def scale(kernel: jax.Array, alpha: jax.Array) -> jax.Array:
    """Returns ``alpha * kernel``. Both may have leading axes of stacked layers."""
    return jnp.expand_dims(alpha, (-2, -1)) * kernel


def fold_wesar(params: Any) -> Any:
    r"""Multiplies each factor into its matrix, and returns parameters of plain layers.

    .. math::
      W \leftarrow \alpha W

    This is done wherever a ``kernel`` has an ``alpha`` beside it, and the ``alpha`` is
    removed. The result fits the same model with ``flax.linen.Dense`` in place of
    ``WesarDense``, or ``flax.nnx.Linear`` in place of ``WesarLinear``. Use it for
    inference or for storage.

    Args:
      params: Linen's ``variables`` or their ``params``; an ``nnx.State``, or the nested
        dictionary that ``nnx.to_pure_dict`` returns. Layers may be stacked along
        leading axes, by ``vmap`` or ``scan``.

    Returns:
      The same kind of tree, with the same dtypes and metadata (such as partitioning).

    Raises:
      TypeError: If `params` is not a mapping. A module is not a mapping.
      ValueError: If an ``alpha`` does not have one number per matrix in the ``kernel``
        beside it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx as flax_nnx
      >>> from spam_optax import nnx
      >>> layer = nnx.WesarLinear(8, 4, rngs=flax_nnx.Rngs(0))
      >>> plain = flax_nnx.Linear(8, 4, rngs=flax_nnx.Rngs(1))
      >>> flax_nnx.update(plain, nnx.fold_wesar(flax_nnx.state(layer)))
      >>> print(jnp.array_equal(plain(jnp.ones(8)), layer(jnp.ones(8))))
      True

    References:
      Nishida et al., `WeSaR <https://arxiv.org/abs/2410.05052>`_, EMNLP 2024.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            "fold_wesar: params must be a mapping of names to parameters, as "
            f"flax.nnx.state(model) is, got {type(params).__name__}."
        )
    return _fold(params)


def _fold(params: Any) -> Any:
    if not isinstance(params, Mapping):
        return params
    children = {name: _fold(child) for name, child in params.items()}
    if children.keys() >= {"kernel", "alpha"}:
        (alpha,) = jax.tree.leaves(children.pop("alpha"))
        (kernel,) = jax.tree.leaves(children["kernel"])
        if alpha.shape != kernel.shape[:-2]:
            raise ValueError(
                "fold_wesar: alpha must be one number for each matrix, of shape "
                f"{kernel.shape[:-2]} for a kernel of shape {kernel.shape}, "
                f"got {alpha.shape}."
            )
        children["kernel"] = jax.tree.map(lambda w: scale(w, alpha), children["kernel"])
    container: Any = type(params)
    return container(children)
