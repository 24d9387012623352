r"""Decides whether a value of a series is a spike among its recent values.

A window is a ring buffer of the last `window` accepted values. With their median
:math:`m` and median absolute deviation :math:`d`, a value :math:`x` is a spike if

.. math::
  x - m > \max(\sigma \cdot 1.4826 d, \; s |m|)

for `sigma` :math:`\sigma` and `share` :math:`s`. For normally distributed values
:math:`1.4826 d` is the standard deviation. The share is needed because the gradient
norms of real runs have heavy tails. One outlier in the window changes the limit little.

In the published form, which SkipStep of OLMo uses, a value is a spike if
:math:`x > \mathrm{mean} + \sigma \cdot \mathrm{std}`, and every finite value enters the
window. One outlier then hides all others until it has left the window.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spam_optax import _arithmetic, _validate

_NORMAL = 1.4826  # Standard deviation of normal values over their median deviation.
_LARGEST_COUNT = 2**30


class SkipReason(enum.IntFlag):
    """Why a step was skipped: the sum of all reasons, and 0 if it was taken."""

    LOSS_SPIKE = 1
    NORM_SPIKE = 2
    LOSS_NONFINITE = 4
    NORM_NONFINITE = 8


class StepHistory(NamedTuple):
    """The accepted losses and gradient norms of the recent steps.

    Attributes:
      skip_losses: The last accepted losses: a ring buffer.
      skip_loss_count: Number of losses that have entered it.
      skip_norms: The last accepted gradient norms: a ring buffer.
      skip_norm_count: Number of norms that have entered it.
      skipped_in_a_row: Number of steps skipped since the last one that was taken.
    """

    skip_losses: jax.Array  # shape=(window,), dtype=jnp.float32.
    skip_loss_count: jax.Array  # shape=(), dtype=jnp.int32.
    skip_norms: jax.Array  # shape=(window,), dtype=jnp.float32.
    skip_norm_count: jax.Array  # shape=(), dtype=jnp.int32.
    skipped_in_a_row: jax.Array  # shape=(), dtype=jnp.int32.


class SpikeTest(NamedTuple):
    """The arguments that decide whether a value of one series is a spike."""

    sigma: jax.typing.ArrayLike
    share: jax.typing.ArrayLike
    min_history: jax.typing.ArrayLike
    robust: bool

    @classmethod
    def checked(
        cls,
        window: int,
        sigma: jax.typing.ArrayLike,
        share: jax.typing.ArrayLike,
        min_history: jax.typing.ArrayLike,
        robust: bool,
        name: str = "share",
    ) -> tuple[int, "SpikeTest"]:
        """Returns the window and the test. Raises if an argument is invalid."""
        _validate.check_static("window", window)
        window = int(_validate.check_whole("window", window, low=2, high=2**16))
        sigma = _validate.check_number("sigma", sigma, above=0)
        share = _validate.check_number(name, share, at_least=0)
        min_history = _validate.check_whole(
            "min_history", min_history, low=2, high=window
        )
        _validate.check_flags(robust=robust)
        return window, cls(sigma, share, min_history, robust)


class SkipRule(NamedTuple):
    """The arguments that decide whether a step is skipped."""

    window: int
    loss: SpikeTest
    norm: SpikeTest
    max_consecutive: jax.typing.ArrayLike

    @classmethod
    def checked(
        cls,
        window: int,
        sigma: jax.typing.ArrayLike,
        loss_share: jax.typing.ArrayLike,
        norm_share: jax.typing.ArrayLike,
        min_history: jax.typing.ArrayLike,
        max_consecutive: jax.typing.ArrayLike,
        robust: bool,
    ) -> "SkipRule":
        """Returns the rule. Raises if an argument is invalid."""
        rest = min_history, robust
        window, loss = SpikeTest.checked(window, sigma, loss_share, *rest, "loss_share")
        _, norm = SpikeTest.checked(window, sigma, norm_share, *rest, "norm_share")
        most = _validate.check_steps("max_consecutive", max_consecutive, low=1)
        return cls(window, loss, norm, most)


def init(window: int) -> StepHistory:
    """Returns a history without steps.

    Its arrays are different buffers, so the history can be donated.
    """
    return StepHistory(
        jnp.zeros([window], jnp.float32),
        jnp.zeros([], jnp.int32),
        jnp.zeros([window], jnp.float32),
        jnp.zeros([], jnp.int32),
        jnp.zeros([], jnp.int32),
    )


def check_window(values: jax.Array, window: int) -> None:
    """Raises if the history of a state has another length.

    That length would be used in place of the window. If it is below `min_history`, no
    value would ever be a spike.
    """
    if jnp.shape(values) != (window,):
        raise ValueError(
            f"{_validate.caller()}: window must be the length of the history in the "
            f"state, which has shape {jnp.shape(values)}, got {window}; pass that "
            "length, or begin a new history."
        )


def judge(
    history: StepHistory,
    loss: jax.Array | None,
    norm: jax.Array | None,
    rule: SkipRule,
) -> tuple[jax.Array, StepHistory]:
    """Decides whether a step is skipped.

    Args:
      history: The history before the step.
      loss: The step's loss, a float32 scalar. None: it is not watched.
      norm: The step's global gradient norm, a float32 scalar. None: it is not watched.
      rule: The rule.

    Returns:
      The :class:`SkipReason` as an int32 scalar, and the history after the step.
    """
    losses = history.skip_losses, history.skip_loss_count
    norms = history.skip_norms, history.skip_norm_count
    r = SkipReason
    series = (
        (losses, loss, rule.loss, r.LOSS_SPIKE, r.LOSS_NONFINITE),
        (norms, norm, rule.norm, r.NORM_SPIKE, r.NORM_NONFINITE),
    )
    reason = jnp.zeros([], jnp.int32)
    for (values, count), value, test, spike, nonfinite in series:
        if value is not None:
            code = jnp.where(value > limit(values, count, test), int(spike), 0)
            reason |= jnp.where(jnp.isfinite(value), code, int(nonfinite))
    is_finite = reason & int(r.LOSS_NONFINITE | r.NORM_NONFINITE) == 0
    in_a_row = history.skipped_in_a_row
    has_new_level = is_finite & (reason > 0) & (in_a_row >= rule.max_consecutive)
    reason = jnp.where(has_new_level, 0, reason)
    # In the published form spikes enter the windows too.
    enters = (reason == 0) if rule.loss.robust else is_finite
    windows = []
    for (values, count), value, *_ in series:
        if value is not None:
            count = jnp.where(has_new_level, 0, count)
            values, count = push(values, count, value, enters)
        windows += [values, count]
    in_a_row = jnp.where(reason == 0, 0, jnp.minimum(in_a_row, _LARGEST_COUNT) + 1)
    return reason, StepHistory._make([*windows, in_a_row])


def limit(values: jax.Array, count: jax.Array, test: SpikeTest) -> jax.Array:
    """Returns the largest value that is not a spike.

    It is infinite if the history is too short.

    Args:
      values: The window, of shape ``(window,)`` and dtype float32.
      count: Number of values that have entered it.
      test: The arguments of the rule.
    """
    number = jnp.minimum(count, len(values))
    # An empty window has one place filled, since a mean of nothing is NaN.
    is_filled = jnp.arange(len(values)) < jnp.maximum(number, 1)
    if test.robust:
        center = _median(values, is_filled, number)
        deviation = _median(jnp.abs(values - center), is_filled, number)
        distance = jnp.maximum(
            test.sigma * _NORMAL * deviation, test.share * jnp.abs(center)
        )
    else:
        center = jnp.mean(values, where=is_filled)
        variance = jnp.var(values, where=is_filled)
        distance = jnp.asarray(test.sigma * _arithmetic.root(variance))
    return jnp.where(number >= test.min_history, center + distance, jnp.inf).astype(
        jnp.float32
    )


def push(
    values: jax.Array, count: jax.Array, value: jax.Array, enters: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds `value` to the window if it `enters`. Returns the window and its count."""
    is_here = jnp.arange(len(values)) == count % len(values)
    values = jnp.where(is_here & enters, value, values)
    # A count that would overflow is lowered. Its place in the ring stays the same.
    count = count + enters.astype(jnp.int32)
    lowered = len(values) + count % len(values)
    return values, jnp.where(count >= _LARGEST_COUNT, lowered, count)


def _median(values: jax.Array, is_filled: jax.Array, number: jax.Array) -> jax.Array:
    """Returns the median of the filled values, which are the first `number`."""
    ordered = jnp.sort(jnp.where(is_filled, values, jnp.inf))
    last = jnp.maximum(number - 1, 0)
    low, high = (
        jnp.sum(jnp.where(jnp.arange(len(values)) == i, ordered, 0))
        for i in (last // 2, (last + 1) // 2)
    )
    # Halved before the sum, because the sum of two large values could overflow.
    return low / 2 + high / 2
