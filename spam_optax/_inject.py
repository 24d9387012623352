"""Puts hyperparameters into the state, also for factories with other arguments."""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spam_optax import _validate

# Annotations of arguments that may be traced; all others are static.
_NUMBERS = (
    jax.typing.ArrayLike,
    jax.typing.ArrayLike | None,
    optax.ScalarOrSchedule,
)


def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Collection[str] = (),
    hyperparam_dtype: jax.typing.DTypeLike | None = jnp.float32,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Puts the numbers given to a factory into the state, where they can be changed.

    This is ``optax.inject_hyperparams`` for the factories of this package; use it in
    place of Optax's. It leaves arguments that are not hyperparameters out of the state,
    such as `mask`, `partition`, `density`, `mu_dtype` and flags. Optax calls a function
    among the arguments as a schedule. A mask would be called with the step number, and
    nothing would be decayed. The numbers are float32. Optax would make them bfloat16
    for bfloat16 parameters, which turns ``b2 = 0.999`` into 1. A weight decay in the
    state needs parameters in ``update``, also if it is 0, unless `static_args` names
    it.

    Args:
      inner_factory: The function that returns the transformation, for example
        ``spam_optax.spam``. For functions from other packages only `static_args` are
        static, as in Optax.
      static_args: Names of further arguments to keep out of the state.
      hyperparam_dtype: The dtype of the numbers. Whole numbers stay integers. None: the
        dtype of the parameters.

    Returns:
      A function with the arguments of `inner_factory`. Each number may also be a
      schedule, a function from the step to a number.

    Raises:
      ValueError: If a name in `static_args` is not an argument of `inner_factory`, or
        `hyperparam_dtype` is not a floating dtype; by the returned function, if a
        number is out of range for a factory of this package.
      TypeError: If an argument is of the wrong type; by the returned function, if a
        factory of this package does not return a transformation.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> make = spam_optax.inject_hyperparams(spam_optax.spam)
      >>> tx = make(1e-3, b2=lambda step: 1 - 1 / (step + 2), mu_dtype=jnp.bfloat16)
      >>> params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
      >>> state = tx.init(params)
      >>> state.hyperparams["learning_rate"] = jnp.asarray(5e-4)
      >>> updates, state = tx.update(params, state, params)
      >>> print(updates["kernel"][0, 0], state.hyperparams["b2"])
      -0.000499725 0.5
    """
    try:
        parameters = inspect.signature(inner_factory).parameters
    except (TypeError, ValueError):
        raise TypeError(
            f"{_validate.caller()}: inner_factory must be a function that makes a "
            f"transformation, such as spam_optax.spam, got "
            f"{_validate.shown(inner_factory)}."
        ) from None
    given = {static_args} if isinstance(static_args, str) else static_args
    _validate.check_names("static_args", given, kind="arguments")
    if unknown := sorted(set(given) - set(parameters)):
        raise ValueError(
            f"{_validate.caller()}: static_args must be names of arguments of "
            f"inner_factory, which are {', '.join(parameters)}; got "
            f"{', '.join(unknown)}."
        )
    if hyperparam_dtype is not None:
        _validate.check_moment_dtype("hyperparam_dtype", hyperparam_dtype)
    static = {*given, *_static_arguments(inner_factory)}
    make = optax.inject_hyperparams(inner_factory, static, hyperparam_dtype)

    @functools.wraps(inner_factory)
    def make_with_plain_numbers(*args: Any, **kwargs: Any) -> Any:
        # Optax does not recognize NumPy scalars as numbers.
        plain = [*map(_validate.to_python, args)]
        kwargs = {name: _validate.to_python(x) for name, x in kwargs.items()}
        if _is_ours(inner_factory):
            _check_arguments(inner_factory, static, plain, kwargs)
        return make(*plain, **kwargs)

    return make_with_plain_numbers


def _check_arguments(
    factory: Callable[..., Any],
    static: set[str],
    args: list[Any],
    kwargs: dict[str, Any],
) -> None:
    """Calls the factory with the plain numbers to check them.

    Optax passes arrays, which are not checked. Schedules are replaced by an array,
    because their values are unknown.
    """
    try:
        bound = inspect.signature(factory).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{_validate.caller()}: the arguments must be those of inner_factory; "
            f"{error}."
        ) from None
    for name, value in bound.arguments.items():
        if name not in static and callable(value):
            bound.arguments[name] = np.ones(())
    made = factory(*bound.args, **bound.kwargs)
    _validate.check_transformation(made, name="what inner_factory makes")


def _is_ours(factory: Callable[..., Any]) -> bool:
    """Checks whether a factory, or the function of a partial, is of this package."""
    function = factory
    while isinstance(function, functools.partial):
        function = function.func
    package = getattr(function, "__module__", None) or ""
    return package.partition(".")[0] == __package__


def _static_arguments(factory: Callable[..., Any]) -> set[str]:
    """Returns the arguments whose annotation is not a number.

    For factories of other packages it returns none.
    """
    if not _is_ours(factory):
        return set()
    parameters = inspect.signature(factory).parameters.values()
    return {p.name for p in parameters if p.annotation not in _NUMBERS}
