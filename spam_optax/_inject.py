"""Hyper-parameters in the state, for factories whose other arguments are known."""

import functools
import inspect
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

from spam_optax import _validate

# Annotations of what may be traced; everything else is static.
_NUMBERS = (
    jax.typing.ArrayLike,
    jax.typing.ArrayLike | None,
    optax.ScalarOrSchedule,
)


def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: jax.typing.DTypeLike | None = jnp.float32,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Puts the numbers a factory was given into the state, where they may change.

    ``optax.inject_hyperparams`` for the factories of this package: it knows which of
    their arguments are no numbers, such as `mask`, `partition`, `density`, `mu_dtype`
    and flags. Optax would take a function among them for a schedule, and a mask that
    was called with the step decays nothing. The numbers are float32, since bfloat16,
    Optax's choice for bfloat16 parameters, turns ``b2 = 0.999`` into 1.

    Args:
      inner_factory: What makes the transformation, for example ``spam_optax.spam``. For
        factories from elsewhere only `static_args` are static, as with Optax.
      static_args: Names of further arguments that stay as they are.
      hyperparam_dtype: The dtype of the numbers; whole numbers stay whole. None: that
        of the parameters.

    Returns:
      A function with the arguments of `inner_factory`, numbers of which may be
      schedules: functions from the step to a number.

    Raises:
      ValueError: If `inner_factory` has no argument of a name in `static_args`.

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
    given = {static_args} if isinstance(static_args, str) else set(static_args)
    make = optax.inject_hyperparams(
        inner_factory, given | _static_arguments(inner_factory), hyperparam_dtype
    )

    @functools.wraps(inner_factory)
    def make_with_plain_numbers(*args, **kwargs):
        # Optax takes a NumPy scalar for no number.
        named = {name: _validate.to_python(x) for name, x in kwargs.items()}
        return make(*map(_validate.to_python, args), **named)

    return make_with_plain_numbers


def _static_arguments(factory: Callable) -> set[str]:
    """Arguments that are no numbers by their annotations, if the factory is ours."""
    function = factory
    while isinstance(function, functools.partial):
        function = function.func
    package = getattr(function, "__module__", None) or ""
    if package.partition(".")[0] != __package__:
        return set()
    parameters = inspect.signature(factory).parameters.values()
    return {p.name for p in parameters if p.annotation not in _NUMBERS}
