"""The reset clock, and momentum reset for any gradient transformation."""

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spam_optax import _moments, _schedule, _validate


class ResetMomentsState(NamedTuple):
    """State of :func:`reset_moments`.

    Attributes:
      reset_step: Number of steps taken.
      inner_state: State of the inner transformation.
    """

    reset_step: jax.Array  # shape=(), dtype=jnp.int32.
    inner_state: optax.OptState


def reset_moments(
    inner: optax.GradientTransformation,
    interval: jax.typing.ArrayLike | None,
    *,
    fields: Collection[str] = ("mu", "nu", "trace"),
) -> optax.GradientTransformationExtraArgs:
    r"""Resets the momentum of any Optax transformation at regular intervals.

    In steps ``interval``, ``2 * interval``, ... the named fields of the inner state go
    back to their initial values before the gradient of that step is used. Everything
    else stays, including step counters, so schedules and bias corrections continue.

    .. warning::
      The step counter stays, so after a reset Adam's moments start from 0 without bias
      correction. Its steps are then 2.6 times the learning rate on average and at most
      6.6 times, in the 12th step after a reset (interval 500, constant gradient). Huang
      et al. use a ramp after each reset. :func:`spam_optax.spam_adam` includes it. For
      other optimizers chain ``optax.scale_by_schedule`` with
      :func:`spam_optax.functional.reset_ramp`. Sign-based optimizers such as Lion are
      not affected.

    Args:
      inner: The transformation whose momentum is reset: ``optax.scale_by_adam``,
        ``scale_by_lion``, ``trace``, ``contrib.muon``, a whole chain, ...
      interval: Number of steps between resets. None: no resets.
      fields: Names of the state fields that are reset, at any depth of the inner state.
        Keys of dictionaries do not count. Attributes of named tuples count, also in
        parameters.

    Returns:
      The wrapped transformation. It passes extra arguments on to `inner`.

    Raises:
      ValueError: If `interval` is < 1 or not whole, or `fields` is empty; by ``init``,
        if the inner state has none of the `fields`; by ``update``, if the trees are not
        like the parameters of ``init``.
      TypeError: If `inner` is not a transformation, or `fields` is not a collection of
        strings.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.reset_moments(optax.trace(decay=0.9), interval=3)
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     update, state = tx.update(jnp.ones(()), state, params)
      ...     print(f"{update:.2f}")
      1.00
      1.90
      1.00
      1.90

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, section 3.
    """
    if interval is not None:
        interval = _validate.check_steps("interval", interval, low=1)
    _validate.check_transformation(inner)
    _validate.check_names("fields", fields, kind="state fields")
    if not fields:
        raise ValueError(
            f"{_validate.caller()}: fields must be a collection of names of state "
            f"fields, at least one, got {fields!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> ResetMomentsState:
        inner_state = inner.init(params)
        if not any(_moments.fields(inner_state, field) for field in fields):
            raise ValueError(
                f"{_validate.caller()}: fields must name at least one field of the "
                f"inner state, got {tuple(fields)!r}; an inner transformation without "
                "momentum, such as plain SGD, has none."
            )
        return ResetMomentsState(jnp.zeros([], jnp.int32), inner_state)

    def update_fn(
        updates: optax.Updates,
        state: ResetMomentsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ResetMomentsState]:
        _validate.check_state(state, ResetMomentsState)
        step = optax.safe_increment(state.reset_step)
        inner_state = state.inner_state
        if interval is not None:
            is_reset = _schedule.reset_position(step, interval) == 0
            initial = _initial_state(inner, updates, inner_state, params)
            inner_state = jax.tree_util.tree_map_with_path(
                lambda path, old, new: (
                    jnp.where(is_reset, _like(new, old), old)
                    if _names_any(path, fields)
                    else old
                ),
                inner_state,
                initial,
            )
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        return updates, ResetMomentsState(step, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _initial_state(
    inner: optax.GradientTransformation,
    updates: optax.Updates,
    inner_state: optax.OptState,
    params: optax.Params | None,
) -> optax.OptState:
    """Returns the initial state of `inner`, in the structure of `inner_state`.

    It is computed in every step and not stored, because the compiler sees initial
    moments as constants.
    """
    try:
        trees = [updates] if params is None else _possible_params(updates, params)
        cause = None
    except (KeyError, TypeError, ValueError) as error:  # The trees do not fit.
        trees, cause = [], error
    for tree in trees:
        try:
            initial = inner.init(tree)
        except (TypeError, ValueError) as error:  # `inner` raises for this tree.
            cause = error
            continue
        if jax.tree.structure(initial) == jax.tree.structure(inner_state):
            return initial
    got = jax.tree.structure(updates if params is None else params)
    raise ValueError(
        f"{_validate.caller()}: params, and updates, must be trees like init's "
        f"parameters, got {got}."
    ) from cause


def _possible_params(
    updates: optax.Updates, params: optax.Params
) -> list[optax.Params]:
    """Returns the trees that ``init`` may have been called with.

    `params` may contain more. An Equinox model also contains functions and numbers,
    which have no updates. A parameter that is not used in a step has no update either.
    """

    def of_kind(kind: Any, leaf: Any) -> Any:
        is_array = isinstance(leaf, (jax.Array, np.ndarray))
        return leaf if is_array and jnp.issubdtype(leaf.dtype, kind) else None

    def of_part(kind: Any, g: Any, part: Any) -> Any:
        return part if g is not None else jax.tree.map(partial(of_kind, kind), part)

    # The parts without updates have all their arrays, or only floats, or none.
    is_none = lambda x: x is None  # noqa: E731
    return [
        jax.tree.map(partial(of_part, kind), updates, params, is_leaf=is_none)
        for kind in (np.generic, np.inexact, np.void)
    ]


def _like(new: jax.Array, old: jax.Array) -> jax.Array:
    """Casts `new` to the dtype of `old`, and on an explicit mesh to its sharding."""
    new = new.astype(old.dtype)
    wanted = jax.typeof(old).sharding
    if jax.typeof(new).sharding == wanted:
        return new
    return jax.sharding.reshard(new, wanted)


def _names_any(path: tuple[Any, ...], fields: Collection[str]) -> bool:
    """Checks whether an attribute, not a dictionary key, in `path` is in `fields`."""
    return any(
        isinstance(key, jax.tree_util.GetAttrKey) and key.name in fields for key in path
    )
