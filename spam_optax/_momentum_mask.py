"""Shows which entries of the parameters have momentum."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spam_optax import _paths, _sparse_layout, _sparse_spam, _validate


def momentum_mask(opt_state: optax.OptState, params: optax.Params) -> Any:
    """Returns which entries of the parameters have momentum now.

    Args:
      opt_state: A state of :func:`sparse_spam`, or one that contains such a state, for
        example that of a chain or a wrapper.
      params: The parameters, or arrays shaped like them.

    Returns:
      A tree like `params` of boolean arrays, shaped like the parameters. Dense
      parameters are all true. Parameters of another optimizer are all false.

    Raises:
      ValueError: If there is no state of :func:`sparse_spam` in `opt_state`, or if it
        does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.sparse_spam(density=0.25)
      >>> params = {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}
      >>> mask = spam_optax.momentum_mask(tx.init(params), params)
      >>> print(mask["kernel"].sum(), mask["bias"].sum())
      12 6
    """
    tensors, structure = jax.tree.flatten(params)
    names = _paths.names(params)
    masks = []
    for state in _sparse_states(opt_state):
        moments = structure.flatten_up_to(_moments_for(state, params))
        lanes = _sparse_spam.select(state.mask_seeds, names, tensors, moments)
        masks.append(
            [
                _mask(*tensor, row_blocks=state.mask_seeds.size)
                for tensor in zip(tensors, moments, lanes, strict=True)
            ]
        )
    merged = [functools.reduce(jnp.logical_or, x) for x in zip(*masks, strict=True)]
    return structure.unflatten(merged)


def _mask(p: Any, moment: Any, lanes: jax.Array | None, row_blocks: int) -> jax.Array:
    """Returns which entries of one parameter have momentum in one state."""
    if lanes is None:
        return jnp.full(jnp.shape(p), hasattr(moment, "shape"))
    layout = _sparse_layout.of_moments(jnp.shape(p), moment.shape, row_blocks)
    return _sparse_layout.mask(layout, lanes)


def momentum_density(opt_state: optax.OptState, params: optax.Params) -> Any:
    """Returns the fraction of each parameter that has momentum.

    :func:`spam_optax.describe_tensors` shows it with names and roles.

    Args:
      opt_state: A state of :func:`sparse_spam`, or one that contains such a state.
      params: The parameters, or arrays shaped like them.

    Returns:
      A tree like `params` of Python numbers: the actual density of a matrix with sparse
      momentum, 1 for a dense parameter, 0 for a parameter of another optimizer.

    Raises:
      ValueError: As for :func:`momentum_mask`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.sparse_spam(density=0.25)
      >>> params = {"kernel": jnp.zeros((10, 6)), "bias": jnp.zeros(6)}
      >>> spam_optax.momentum_density(tx.init(params), params)
      {'bias': 1.0, 'kernel': 0.2}
    """

    def density(p: Any, moment: Any) -> float:
        if not hasattr(moment, "shape"):
            return 0.0
        shape = jnp.shape(p)
        return 1.0 if shape == moment.shape else moment.shape[-2] / shape[-2]

    densities = []
    for state in _sparse_states(opt_state):
        mu = _moments_for(state, params)
        densities.append(jax.tree.map(density, params, mu))
    return functools.reduce(functools.partial(jax.tree.map, max), densities)


def _sparse_states(
    opt_state: optax.OptState,
) -> list[_sparse_spam.ScaleBySparseSpamState]:
    """Returns the states of `sparse_spam` in `opt_state`. Raises without one."""
    is_sparse = lambda x: isinstance(x, _sparse_spam.ScaleBySparseSpamState)  # noqa: E731
    states = list(filter(is_sparse, jax.tree.leaves(opt_state, is_leaf=is_sparse)))
    if not states:
        raise ValueError(
            f"{_validate.caller()}: opt_state must hold a state of sparse_spam, got "
            f"{jax.tree.structure(opt_state)}."
        )
    return states


def _moments_for(
    state: _sparse_spam.ScaleBySparseSpamState, params: optax.Params
) -> optax.Updates:
    """Returns the first moments of a state. Raises if they do not fit `params`."""
    if state.mask_seeds.ndim != 1:
        raise ValueError(
            f"{_validate.caller()}: opt_state must be the state of one run, got one of "
            f"{state.mask_seeds.shape[:-1]} runs; use jax.vmap({_validate.caller()})."
        )
    try:
        mu = spread_absent(state.inner_state.mu, params)
        leaves = jax.tree.structure(params).flatten_up_to(mu)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{_validate.caller()}: params must be a tree like those of opt_state, got "
            f"{jax.tree.structure(params)}."
        ) from None
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, p), moment in zip(paths, leaves, strict=True):
        if isinstance(moment, optax.MaskedNode):
            continue
        got, held = jnp.shape(p), getattr(moment, "shape", None)
        is_sparse = (
            held is not None
            and len(got) == len(held) >= 2
            and (*got[:-2], got[-1]) == (*held[:-2], held[-1])
            and got[-2] > held[-2]
        )
        if got != held and not is_sparse:
            raise ValueError(
                f"{_validate.caller()}: params must be those of opt_state, got the "
                f"shape {got} at {_validate.place(path)}, where its moments have "
                f"{held}."
            )
    return mu


def spread_absent(tree: Any, params: optax.Params) -> Any:
    """Replaces each `MaskedNode`, which stands for a subtree, by one per parameter."""
    is_absent: Callable[[Any], bool] = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(
        lambda x, part: jax.tree.map(lambda _: x, part) if is_absent(x) else x,
        tree,
        params,
        is_leaf=lambda x: x is None or is_absent(x),  # None: a dense parameter.
    )
