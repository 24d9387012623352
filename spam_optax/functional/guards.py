"""Which steps of a recorded run a guard would skip."""

import chex
import jax
import jax.numpy as jnp

from spam_optax import _spike_history
from spam_optax._spike_history import SkipRule, StepHistory


def spike_steps(
    losses: jax.Array | None = None,
    norms: jax.Array | None = None,
    window: int = 128,
    sigma: jax.typing.ArrayLike = 6.0,
    *,
    loss_share: jax.typing.ArrayLike = 0.2,
    norm_share: jax.typing.ArrayLike = 2.0,
    min_history: jax.typing.ArrayLike = 32,
    max_consecutive: jax.typing.ArrayLike = 8,
    robust: bool = True,
) -> jax.Array:
    """Returns which steps of a recorded run :func:`spam_optax.skip_spikes` would skip.

    This is the very rule of the guard, applied to a log. The log is that of a run
    without the guard: after a spike that was not skipped the recorded values may be
    higher than they would have been.

    Args:
      losses: The loss of every step, shape (steps,). None: losses are not watched.
      norms: The global gradient norm of every step, shape (steps,). None: norms are
        not watched.
      window: See :func:`spam_optax.skip_spikes`, as for the arguments below.
      sigma: Number of deviations.
      loss_share: Share of the median loss.
      norm_share: Share of the median norm.
      min_history: Number of accepted steps before any step is a spike.
      max_consecutive: Number of steps in a row that spikes can skip.
      robust: Whether the rule is that of the median.

    Returns:
      A :class:`spam_optax.SkipReason` for every step, shape (steps,), int32; 0 for a
      step that is taken.

    Raises:
      ValueError: If neither losses nor norms are given, or an argument is out of range.
      AssertionError: If the series are not vectors of one length.

    Examples:
      >>> import numpy as np
      >>> from spam_optax import functional
      >>> losses = np.full(100, 3.0)
      >>> losses[[70, 80]] = 5.0, np.nan
      >>> reasons = functional.spike_steps(losses)
      >>> print(np.flatnonzero(reasons), reasons[70], reasons[80])
      [70 80] 1 4
    """
    rule = SkipRule.checked(
        window, sigma, loss_share, norm_share, min_history, max_consecutive, robust
    )
    series = [x for x in (losses, norms) if x is not None]
    if not series:
        raise ValueError("spike_steps: losses or norms must be given, got neither.")
    series = [jnp.asarray(x, jnp.float32) for x in series]
    chex.assert_rank(series, 1)
    chex.assert_equal_shape(series)

    def step(
        history: StepHistory, values: list[jax.Array]
    ) -> tuple[StepHistory, jax.Array]:
        loss = values[0] if losses is not None else None
        norm = values[-1] if norms is not None else None
        reason, history = _spike_history.judge(history, loss, norm, rule)
        return history, reason

    return jax.lax.scan(step, _spike_history.init(rule.window), series)[1]
