"""The clock of momentum resets, the ramp after a reset, and bias correction."""

import jax
import jax.numpy as jnp
import numpy as np

from spam_optax import _schedule, _validate
from spam_optax.functional._arrays import read


def reset_position(
    step: jax.typing.ArrayLike, interval: jax.typing.ArrayLike | None
) -> jax.Array:
    r"""Returns the number of steps since the last momentum reset.

    It is ``step mod interval``.

    Args:
      step: Number of the step, from 1; whole numbers of any shape.
      interval: Number of steps between resets. The moments are set to 0 in steps
        ``interval``, ``2 * interval``, ..., before the gradient of that step enters
        them. None: no resets.

    Returns:
      The position, int32, shaped like `step`. It is 0 in a reset step. Before the
      first reset, and without an interval, it is the step itself.

    Raises:
      AssertionError: If `step` is not an integer.
      ValueError: If `interval` is a number that is not whole or is < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> print(functional.reset_position(jnp.array([1, 499, 500, 501]), 500))
      [  1 499   0   1]

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, algorithm 1.
    """
    step = read("step", step, jnp.integer).astype(jnp.int32)
    if interval is not None:
        interval = _validate.check_steps("interval", interval, low=1)
    return _schedule.reset_position(step, interval)


def reset_ramp(
    step: jax.typing.ArrayLike,
    interval: jax.typing.ArrayLike | None,
    warmup_steps: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Returns the factor on the step size after a reset, which rises from 0.01 to 1.

    .. math::
      1 - \frac{0.99}{2} \left(1 + \cos\frac{\pi c}{N + 1}\right)
      \quad\text{for } c < N, \text{ else } 1

    with :math:`c` the :func:`reset_position` and :math:`N` the `warmup_steps`. Before
    the first reset it is 1: there is no ramp at the start of training.

    Args:
      step: Number of the step, from 1; whole numbers of any shape.
      interval: Number of steps between resets. None: no resets.
      warmup_steps: Number of steps of the ramp. 0: no ramp.

    Returns:
      The factor, shaped like `step`, float32 (float64 with ``jax_enable_x64``).

    Raises:
      AssertionError: If `step` is not an integer.
      ValueError: If `interval` is < 1 or `warmup_steps` < 0, or not whole.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> steps = jnp.array([1, 500, 575, 650])
      >>> print(functional.reset_ramp(steps, 500, 150).round(3))
      [1.   0.01 0.5  1.  ]

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, algorithm 1.
    """
    step = read("step", step, jnp.integer).astype(jnp.int32)
    if interval is not None:
        interval = _validate.check_steps("interval", interval, low=1)
    warmup_steps = _validate.check_steps("warmup_steps", warmup_steps, low=0)
    return _schedule.reset_ramp(step, interval, warmup_steps)


def bias_correction(
    decay: jax.typing.ArrayLike, step: jax.typing.ArrayLike
) -> jax.Array:
    r"""Returns Adam's bias correction :math:`1 - \beta^t`.

    It is computed as ``-expm1(t * log(decay))``, because ``1 - 0.999**1`` has an error
    of 1e-5 in float32.

    Args:
      decay: The decay :math:`\beta` in [0, 1), or an array of decays.
      step: Number of the step, from 1; whole numbers of any shape.

    Returns:
      The correction, shaped like `step`, float32 (float64 with ``jax_enable_x64``).

    Raises:
      ValueError: If `decay` is a number outside [0, 1).

    Examples:
      >>> from spam_optax import functional
      >>> print(functional.bias_correction(0.9, 2).round(6))
      0.19

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, algorithm 1.
    """
    decay = _validate.check_decay("decay", decay, many=True)
    return _schedule.bias_correction(decay, read("step", step, np.generic))
