"""Skips the steps whose loss or gradient norm is a spike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import (
    _arithmetic,
    _spike_history,
    _tensor_statistics,
    _validate,
)
from spam_optax._spike_history import SkipRule, StepHistory


class SkipSpikesState(NamedTuple):
    """State of :func:`skip_spikes`.

    Attributes:
      history: The accepted losses and norms, :class:`StepHistory`.
      skip_reason: Why the last step was skipped: a :class:`SkipReason`. 0 if it was
        taken.
      skipped_total: Number of steps skipped so far.
      inner_state: State of the inner transformation.
    """

    history: StepHistory
    skip_reason: jax.Array  # shape=(), dtype=jnp.int32.
    skipped_total: jax.Array  # shape=(), dtype=jnp.int32.
    inner_state: optax.OptState


def skip_spikes(
    inner: optax.GradientTransformation,
    window: int = 128,
    sigma: jax.typing.ArrayLike = 6.0,
    *,
    loss_share: jax.typing.ArrayLike = 0.2,
    norm_share: jax.typing.ArrayLike = 2.0,
    min_history: jax.typing.ArrayLike = 32,
    max_consecutive: jax.typing.ArrayLike = 8,
    needs_loss: bool = False,
    robust: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips the steps whose loss or gradient norm is a spike among the recent ones.

    A skipped step changes nothing: its updates are 0 and the inner state keeps every
    bit. A step is skipped if its loss or its global gradient norm is not finite. It is
    also skipped if one of them is a spike: with the median :math:`m` and the median
    absolute deviation :math:`d` of the last `window` accepted values,

    .. math::
      x - m > \max(\sigma \cdot 1.4826 d, \; s |m|)

    where :math:`s` is `loss_share` or `norm_share`. A value far below the others is not
    a spike. Values of skipped steps do not enter the windows.

    Pass the loss to ``update`` as ``value=loss`` or ``loss=loss``. Without it only the
    norm decides. If the norm before any clipping is known, pass it as ``grad_norm=``.
    This saves a pass over the gradient. All extra arguments go to `inner`. The loss
    must be that of the whole batch, and the same on every device.

    If the loss or the norm rises for good, for example with a new data mix, every step
    would be skipped. Therefore, after `max_consecutive` skipped steps in a row, the
    next spike is accepted and the windows start again. A step whose loss or norm is not
    finite is never accepted.

    The wrapper can be added or removed at any checkpoint. To add it, use
    ``tx.init(params)._replace(inner_state=old)``. To remove it, use
    ``state.inner_state``.

    Inside ``optax.MultiSteps`` the norm is that of the accumulated gradient, and the
    loss is that of the last micro-batch. Pass no loss there, or the mean of the losses.
    Also pass ``should_skip_update_fn=optax.skip_not_finite`` to ``optax.MultiSteps``.
    Without it, one gradient that is not finite stays in its sum, and every later step
    is skipped.

    Args:
      inner: The optimizer, for example ``spam(1e-3)``.
      window: Number of accepted steps that a step is compared with, from 2 to
        65536. It decides shapes, so it must be a Python number.
      sigma: Number of deviations by which a spike exceeds the median, > 0.
      loss_share: Share of the median loss by which a spike must also exceed it, >= 0.
      norm_share: Share of the median norm by which a spike must also exceed it, >= 0.
      min_history: Number of accepted steps before a step can be a spike, from 2 to
        `window`.
      max_consecutive: Largest number of steps in a row that are skipped as spikes,
        >= 1.
      needs_loss: Whether ``update`` raises without a loss.
      robust: Whether to use the rule above. If False, a value is a spike if it exceeds
        the mean of the window by `sigma` standard deviations, and every finite value
        enters the window, as published. One outlier then hides the next ones.

    Returns:
      The wrapped optimizer.

    Raises:
      ValueError: If an argument is out of range; by ``update``, if `needs_loss` is True
        and there is no loss, if ``value`` and ``loss`` are both passed, or if the state
        has another window.
      TypeError: If an argument is of the wrong type; by ``update``, if the loss or the
        norm is not a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.skip_spikes(optax.sgd(0.1), window=8, min_history=4)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for loss in (3.0, 3.1, 2.9, 3.0, 9.0, 3.0):
      ...     updates, state = tx.update(jnp.ones(2), state, params, value=loss)
      ...     reason = spam_optax.SkipReason(int(state.skip_reason))
      ...     print(f"{updates[0]:.1f} {reason.name or 'taken'}")
      -0.1 taken
      -0.1 taken
      -0.1 taken
      -0.1 taken
      0.0 LOSS_SPIKE
      -0.1 taken

    References:
      OLMo Team, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2025: steps
      beyond six standard deviations are skipped.

    .. seealso:: :func:`track_spikes` for statistics of every tensor.
    """
    rule = SkipRule.checked(
        window, sigma, loss_share, norm_share, min_history, max_consecutive, robust
    )
    _validate.check_flags(needs_loss=needs_loss)
    _validate.check_transformation(inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> SkipSpikesState:
        return SkipSpikesState(
            _spike_history.init(rule.window),
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: SkipSpikesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipSpikesState]:
        _validate.check_state(state, SkipSpikesState)
        _spike_history.check_window(state.history.skip_losses, rule.window)
        loss = _loss(extra_args, needs_loss)
        if (norm := extra_args.get("grad_norm")) is None:
            _tensor_statistics.check_updates(updates)
            norm = _tensor_statistics.global_norm(updates)
        norm = _scalar("grad_norm", norm)
        reason, history = _spike_history.judge(state.history, loss, norm, rule)
        is_taken = reason == 0
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )

        # Selected, not multiplied: 0 * NaN is NaN.
        def if_taken(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(is_taken, new, old)

        total = _arithmetic.saturating_add(
            state.skipped_total, (~is_taken).astype(jnp.int32)
        )
        return (
            jax.tree.map(lambda u: if_taken(u, jnp.zeros_like(u)), updates),
            SkipSpikesState(
                history,
                reason,
                total,
                jax.tree.map(if_taken, inner_state, state.inner_state),
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _loss(extra_args: dict[str, Any], needs_loss: bool) -> jax.Array | None:
    """Returns the loss among the extra arguments as float32, or None without one."""
    given = {name: extra_args.get(name) for name in ("value", "loss")}
    given = {name: loss for name, loss in given.items() if loss is not None}
    if len(given) > 1:
        raise ValueError(
            f"{_validate.caller()}: update must get the loss as value= or as loss=, "
            "got both."
        )
    if not given:
        if needs_loss:
            raise ValueError(
                f"{_validate.caller()}: update needs the loss as value=loss or "
                "loss=loss, got None; with needs_loss=False only the norm is watched."
            )
        return None
    ((name, loss),) = given.items()
    return _scalar(name, loss)


def _scalar(name: str, value: Any) -> jax.Array:
    """Returns `value` as a float32 scalar. Raises if it is not a real scalar."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        array = None
    if array is None or array.ndim or not _validate.is_real(array):
        raise TypeError(
            f"{_validate.caller()}: {name} must be a real scalar, got "
            f"{_validate.shown(value)}."
        )
    return array.astype(jnp.float32)
