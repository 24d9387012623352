"""Checks of arguments: one line naming the function, the argument and what it may be.

Only Python and NumPy numbers are checked. Arrays and tracers pass, since
`optax.inject_hyperparams` hands those in and their values are unknown while tracing.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_number(
    function: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Raises unless `value` is an array or a finite number within the given bounds.

    Args:
      function: Name of the function that was called, for the message.
      name: Name of the argument.
      value: What was passed.
      above: Open lower bound.
      at_least: Closed lower bound.
      below: Open upper bound.
      at_most: Closed upper bound.
      whole: Whether only whole numbers are allowed.

    Raises:
      TypeError: If `value` is neither a real number nor an array.
      ValueError: If it is a number out of bounds.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    bounds = [
        (sign, bound, holds)
        for sign, bound, holds in (
            (">", above, lambda x, b: x > b),
            (">=", at_least, lambda x, b: x >= b),
            ("<", below, lambda x, b: x < b),
            ("<=", at_most, lambda x, b: x <= b),
        )
        if bound is not None
    ]
    kind = "a whole number" if whole else "a finite number"
    limits = " and ".join(f"{sign} {bound}" for sign, bound, _ in bounds)
    message = f"{function}: {name} must be {kind} {limits}".rstrip()
    message = f"{message}, got {value!r}."
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(message)
    fits = _is_finite(value) and all(holds(value, b) for _, b, holds in bounds)
    if not fits or (whole and value != int(value)):
        raise ValueError(message)


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # A Python integer beyond the largest float.
        return False


def check_whole(
    function: str, name: str, value: Any, *, low: int, high: int = 2**31 - 1
) -> None:
    """Raises unless `value` is an array or a whole number from `low` to `high`."""
    check_number(function, name, value, at_least=low, at_most=high, whole=True)


def check_decay(function: str, name: str, value: Any) -> None:
    """Raises unless `value` is an array or a number in [0, 1)."""
    check_number(function, name, value, at_least=0, below=1)


def check_choice(function: str, name: str, value: Any, choices: tuple) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{function}: {name} must be one of {allowed}, got {value!r}.")


def check_learning_rate(function: str, value: Any) -> None:
    """Raises unless `value` is a schedule, an array or a number >= 0."""
    if not callable(value):
        check_number(function, "learning_rate", value, at_least=0)


def check_reset(function: str, reset_interval: Any, grace_steps: Any = 0) -> None:
    """Raises unless the interval is None, or leaves steps outside the grace window."""
    check_whole(function, "grace_steps", grace_steps, low=0)
    if reset_interval is None:
        return
    check_whole(function, "reset_interval", reset_interval, low=1)
    known = all(isinstance(x, numbers.Real) for x in (reset_interval, grace_steps))
    if known and grace_steps and reset_interval <= grace_steps:
        raise ValueError(
            f"{function}: reset_interval must be None or > grace_steps "
            f"({grace_steps}), or nothing would ever be clipped; "
            f"got {reset_interval!r}."
        )


def check_moment_dtype(function: str, name: str, dtype: Any) -> np.dtype | None:
    """Returns `dtype` canonicalised; raises unless it is None or a real float type."""
    if dtype is None:
        return None
    try:
        canonical = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        canonical = None
    if canonical is None or not jnp.issubdtype(canonical, jnp.floating):
        raise ValueError(
            f"{function}: {name} must be None or a floating dtype, got {dtype!r}."
        )
    return canonical


def check_inexact(function: str, path: tuple, leaf: Any) -> np.dtype:
    """Returns the dtype arithmetic on `leaf` is done in; raises if it is no float."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{function}: the parameter at {jax.tree_util.keystr(path) or 'the root'} "
            f"must have a floating or complex dtype, got {dtype}."
        )
    return jnp.promote_types(dtype, jnp.float32)


def check_same_tree(function: str, updates: Any, moments: Any) -> None:
    """Raises unless `updates` has the leaves and shapes of the state's `moments`.

    A leaf may be None in `updates` alone: a parameter without a gradient.
    """
    is_none = lambda x: x is None  # noqa: E731
    flatten = jax.tree_util.tree_flatten_with_path
    got, got_structure = flatten(updates, is_leaf=is_none)
    want, want_structure = flatten(moments, is_leaf=is_none)
    got_paths, want_paths = dict(got), dict(want)
    for path in [*want_paths, *got_paths]:
        if (path in got_paths) != (path in want_paths):
            where = jax.tree_util.keystr(path) or "the root"
            missing = "has no leaf" if path in want_paths else "has a leaf"
            other = "has one" if path in want_paths else "has none"
            raise ValueError(
                f"{function}: the tree of updates {missing} at {where} where the "
                f"optimizer state {other}; pass gradients shaped like the parameters."
            )
    if got_structure != want_structure:
        raise ValueError(
            f"{function}: the tree of updates must have the containers of init's "
            f"parameters {want_structure}, got {got_structure}."
        )
    for path, want_leaf in want_paths.items():
        got_leaf = got_paths[path]
        if got_leaf is None or want_leaf is None:
            continue
        if jnp.shape(got_leaf) != jnp.shape(want_leaf):
            raise ValueError(
                f"{function}: the update at {jax.tree_util.keystr(path) or 'the root'} "
                f"must have the shape {jnp.shape(want_leaf)} of its parameter, "
                f"got {jnp.shape(got_leaf)}."
            )
