"""What clips by the norms of whole tensors share."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _validate, functional


def check_params(params: optax.Params) -> None:
    """Raises unless every parameter has a floating or complex dtype."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        _validate.check_inexact(path, p)


def check_updates(updates: optax.Updates) -> None:
    """Raises unless every update has a floating or complex dtype."""
    for path, g in jax.tree_util.tree_leaves_with_path(updates):
        _validate.check_inexact(path, g, "update")


def screen(updates: optax.Updates) -> tuple[optax.Updates, optax.Updates]:
    """The gradients with 0 for what is not finite, and where that was.

    Not finite is what has no square in float32, since the norms are float32.
    """
    single = jnp.zeros([], jnp.float32)

    def is_bad(g):
        return functional.nonfinite_mask(_arithmetic.narrow_like(g, single))

    bad = _moments.map_leaves(lambda g: is_bad(jnp.asarray(g)), updates)
    gradients = _moments.map_leaves(
        lambda g, b: jnp.where(b, jnp.zeros_like(g), g), updates, bad
    )
    return gradients, bad


def finite(
    updates: optax.Updates, total: jax.Array
) -> tuple[optax.Updates, tuple[jax.Array, jax.Array]]:
    """The gradients of :func:`screen`; how many were not finite, and the new total."""
    check_updates(updates)
    gradients, bad = screen(updates)
    return gradients, _moments.count(bad, total)


def of_tensors(gradients: optax.Updates) -> jax.Array:
    """The norm of every tensor, float32."""
    norms = [_arithmetic.norm(g) for g in jax.tree.leaves(gradients)]
    return _arithmetic.stack(norms, jnp.float32)


def factor(norm: jax.Array, limit: jax.typing.ArrayLike) -> jax.Array:
    """What brings `norm` down to `limit`: 1 if it is not above, so for a norm of 0."""
    is_above = norm > limit
    return jnp.where(is_above, limit / jnp.where(is_above, norm, 1), 1).astype(
        jnp.float32
    )


def scale(
    tensors: list[jax.Array | None], factors: Iterable[jax.Array]
) -> list[jax.Array | None]:
    """The tensors times one factor each, in their dtypes; None stays None."""
    return [
        None if x is None else (_arithmetic.widen(x) * by).astype(jnp.asarray(x).dtype)
        for x, by in zip(tensors, factors, strict=True)
    ]
