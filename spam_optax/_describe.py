"""The role and the moments of each tensor, read from an optimizer's state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _moments, _momentum_mask, _paths


class TensorDescription(NamedTuple):
    """Describes how an optimizer treats a tensor.

    Attributes:
      name: The tensor's name, as in :func:`spam_optax.tensor_names`.
      shape: Its shape.
      role: Its role, found by its name: ``embedding``, ``head``, ``vector``,
        ``factor`` (of a WeSaR layer), ``low rank`` (LoRA's), ``feed-forward``,
        ``fused attention`` (such as queries, keys and values in one), ``query``,
        ``key``, ``value``, ``attention output``, ``projection`` (of embeddings),
        ``other matrix``, or ``unknown``.
      density: The fraction of its entries with a first moment.
      second_moments: The shape of its second moment, or None if it has none.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    density: float
    second_moments: tuple[int, ...] | None


class TensorDescriptions(tuple[TensorDescription, ...]):
    """A tuple of :class:`TensorDescription` that prints as a table."""

    def __str__(self) -> str:
        rows = [("tensor", "shape", "role", "momentum", "second moments")]
        rows += [
            (
                d.name,
                str(d.shape),
                d.role,
                f"{d.density:.0%}",
                "none" if d.second_moments is None else str(d.second_moments),
            )
            for d in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
        )


def describe_tensors(
    opt_state: optax.OptState, params: optax.Params
) -> TensorDescriptions:
    """Lists the role and the moments of every tensor.

    Call it before a long run to see which matrices have sparse momentum, and how many
    second moments Adam-mini has for each tensor.

    Args:
      opt_state: A state with first moments ``mu`` or second moments ``nu``, or one that
        contains such states, like that of a chain or a wrapper. Shapes are enough:
        ``jax.eval_shape(tx.init, params)``.
      params: The parameters, or arrays shaped like them.

    Returns:
      A tuple of :class:`TensorDescription`, in the order of
      :func:`spam_optax.tensor_names`. It prints as a table.

    Raises:
      ValueError: If there are no moments in `opt_state`, if they do not fit `params`,
        or if two tensors have the same name.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> params = {"embed": jnp.ones((16, 8)), "mlp": {"kernel": jnp.ones((8, 32))}}
      >>> state = spam_optax.sparse_spam(density=0.25).init(params)
      >>> print(spam_optax.describe_tensors(state, params))
      tensor      shape    role          momentum  second moments
      embed       (16, 8)  embedding     100%      (16, 8)
      mlp/kernel  (8, 32)  feed-forward  25%       (2, 32)

    .. seealso:: :func:`spam_optax.momentum_mask`, :func:`spam_optax.matrices_only`,
      :func:`spam_optax.adam_mini_partition`
    """
    unboxed, state = _paths.unboxed(params), _paths.unboxed(opt_state)
    first, second = (_shapes_of(state, unboxed, name) for name in ("mu", "nu"))
    if first is None and second is None:
        raise ValueError(
            "describe_tensors: opt_state must hold first moments mu or second moments "
            f"nu, got {jax.tree.structure(opt_state)}."
        )
    tensors = _paths.leaves(params)
    none = [None] * len(tensors)
    return TensorDescriptions(
        TensorDescription(
            name,
            jnp.shape(leaf.value),
            _paths.role(leaf.path, jnp.ndim(leaf.value)) or "unknown",
            0.0
            if mu is None
            else math.prod(mu) / max(math.prod(jnp.shape(leaf.value)), 1),
            nu,
        )
        for name, leaf, mu, nu in zip(
            _paths.names(params),
            tensors,
            first or none,
            second or none,
            strict=True,
        )
    )


def _shapes_of(
    opt_state: optax.OptState, params: optax.Params, name: str
) -> list[tuple[int, ...] | None] | None:
    """Returns the shape of each tensor's moment called `name`.

    Returns None if no state has such moments. If there are several states, the first
    one with a moment counts.
    """
    shapes = None
    for tree in _moments.fields(opt_state, name):
        of_state = _shapes(tree, params, name)
        if shapes is None:
            shapes = of_state
        shapes = [a if b is None else b for a, b in zip(of_state, shapes, strict=True)]
    return shapes


def _shapes(tree: Any, params: optax.Params, name: str) -> list[tuple[int, ...] | None]:
    """Returns the shape of each tensor's moment in one state, or None without one."""
    try:
        tree = _momentum_mask.spread_absent(tree, params)
        moments = jax.tree.structure(params).flatten_up_to(tree)
    except (KeyError, TypeError, ValueError):
        moments = [tree]
    tensors = jax.tree.leaves(params)
    # A tensor without moments may have an empty node, but not a tree of moments.
    shapes = [getattr(m, "shape", None) for m in moments]
    fits = len(shapes) == len(tensors) and all(
        not jax.tree.leaves(m) if shape is None else _is_within(shape, jnp.shape(p))
        for m, shape, p in zip(moments, shapes, tensors, strict=True)
    )
    if not fits:
        raise ValueError(
            f"describe_tensors: params must be those of the moments {name} in "
            f"opt_state, got {jax.tree.structure(params)}."
        )
    return shapes


def _is_within(moment: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Checks that a moment is a number, or has its tensor's rank and no longer axis."""
    same_rank = len(moment) == len(shape)
    return not moment or (same_rank and all(map(int.__le__, moment, shape)))
