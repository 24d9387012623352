"""Hyper-parameters in the state, for factories with other arguments too."""

import functools
import inspect
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
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
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: jax.typing.DTypeLike | None = jnp.float32,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Puts the numbers given to a factory into the state, where they can be changed.

    This is ``optax.inject_hyperparams`` for the factories of this package. It knows
    which arguments must stay out of the state, such as `mask`, `partition`, `density`,
    `mu_dtype` and flags. Optax would call a function among them as a schedule: a mask
    called with the step number decays nothing. The numbers are float32. Optax would
    make them bfloat16 for bfloat16 parameters, which turns ``b2 = 0.999`` into 1.

    Args:
      inner_factory: The function that makes the transformation, for example
        ``spam_optax.spam``. For functions from other packages only `static_args` are
        static, as with Optax.
      static_args: Names of further arguments to keep out of the state.
      hyperparam_dtype: The dtype of the numbers; whole numbers stay whole. None: that
        of the parameters.

    Returns:
      A function with the arguments of `inner_factory`. Each number may also be a
      schedule, a function from the step to a number.

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
        # Optax does not recognize NumPy scalars as numbers.
        named = {name: _validate.to_python(x) for name, x in kwargs.items()}
        return make(*map(_validate.to_python, args), **named)

    return make_with_plain_numbers


def _static_arguments(factory: Callable) -> set[str]:
    """The arguments not annotated as numbers; empty for other packages' factories."""
    function = factory
    while isinstance(function, functools.partial):
        function = function.func
    package = getattr(function, "__module__", None) or ""
    if package.partition(".")[0] != __package__:
        return set()
    parameters = inspect.signature(factory).parameters.values()
    return {p.name for p in parameters if p.annotation not in _NUMBERS}
