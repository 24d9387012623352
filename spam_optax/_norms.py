"""Shared by the transformations that clip by norms of whole tensors."""

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
    """Sets non-finite coordinates to 0. Also returns their mask.

    A coordinate is non-finite if its square is, in float32, the dtype of the norms.
    """
    single = jnp.zeros([], jnp.float32)

    def is_bad(g: jax.Array) -> jax.Array:
        return functional.nonfinite_mask(_arithmetic.narrow_like(g, single))

    bad = _moments.map_leaves(lambda g: is_bad(jnp.asarray(g)), updates)
    gradients = _moments.map_leaves(
        lambda g, b: jnp.where(b, jnp.zeros_like(g), g), updates, bad
    )
    return gradients, bad


def finite(
    updates: optax.Updates, total: jax.Array | None
) -> tuple[optax.Updates, tuple[jax.Array | None, ...]]:
    """Sets non-finite coordinates to 0, and counts them.

    Returns the gradients, and a tuple of the count and the new total.
    """
    check_updates(updates)
    gradients, bad = screen(updates)
    return gradients, _moments.count(bad, total)


def of_tensors(gradients: optax.Updates) -> jax.Array:
    """Returns one float32 norm per tensor."""
    norms = [_arithmetic.norm(g) for g in jax.tree.leaves(gradients)]
    return _arithmetic.stack(norms, jnp.float32)


def global_norm(updates: optax.Updates) -> jax.Array:
    """Returns the norm of all updates, float32; not finite if its square is not."""
    squares = [jnp.sum(_arithmetic.abs_sq(u)) for u in jax.tree.leaves(updates)]
    total = sum(squares, jnp.zeros([]))
    return _arithmetic.root(total).astype(jnp.float32)


def factor(norm: jax.Array, limit: jax.typing.ArrayLike) -> jax.Array:
    """Returns the factor that scales `norm` down to `limit`.

    It is 1 if the norm is not above the limit.
    """
    is_above = norm > limit
    return jnp.where(is_above, limit / jnp.where(is_above, norm, 1), 1).astype(
        jnp.float32
    )


def scale(
    tensors: list[jax.Array | None], factors: Iterable[jax.Array]
) -> list[jax.Array | None]:
    """Multiplies each tensor by its factor and keeps its dtype. None stays None."""
    return [
        None if x is None else (_arithmetic.widen(x) * by).astype(jnp.asarray(x).dtype)
        for x, by in zip(tensors, factors, strict=True)
    ]
