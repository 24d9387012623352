"""Reads the array arguments of functions."""

import operator
from typing import Any

import jax
import jax.numpy as jnp

from spam_optax import _validate

_KINDS = {
    jnp.integer: "integer",
    jnp.floating: "floating",
    jnp.inexact: "floating or complex",
}


def read(name: str, value: Any, kind: Any = jnp.inexact) -> jax.Array:
    """Returns `value` as an array. Raises unless its dtype is of this kind.

    Args:
      name: Name of the argument.
      value: What was passed.
      kind: A key of `_KINDS`, or ``np.generic`` for any dtype.

    Raises:
      TypeError: If `value` is not an array or a number.
      AssertionError: If its dtype is of another kind.
    """
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{_validate.caller()}: {name} must be an array, got "
            f"{_validate.shown(value)}."
        ) from None
    if not jnp.issubdtype(array.dtype, kind):
        raise AssertionError(
            f"{_validate.caller()}: {name} must have {_KINDS[kind]} numbers, got the "
            f"dtype {array.dtype}."
        )
    return array


def read_static(name: str, value: Any, low: int) -> int:
    """Returns `value` as a Python number. Raises unless it is one, whole and >= `low`.

    Under jit such an argument must be static, because it decides shapes.
    """
    value = _validate.check_whole(name, value, low=low)
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{_validate.caller()}: {name} must be a Python whole number >= {low}, "
            f"under jit a static one, got {value!r}."
        ) from None
