"""Clips updates by the norms of the recent updates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _spike_history, _tensor_statistics, _validate
from spam_optax._spike_history import SpikeTest


class ClipUpdateNormState(NamedTuple):
    """State of :func:`clip_update_norm`.

    Attributes:
      update_norms: The global norms of the last updates before clipping: a ring buffer.
      update_norm_count: Number of norms that have entered it.
      update_norm: Global norm of the last update before clipping.
      update_norm_scale: Factor on the last update, at most 1.
    """

    update_norms: jax.Array  # shape=(window,), dtype=jnp.float32.
    update_norm_count: jax.Array  # shape=(), dtype=jnp.int32.
    update_norm: jax.Array  # shape=(), dtype=jnp.float32.
    update_norm_scale: jax.Array  # shape=(), dtype=jnp.float32.


def clip_update_norm(
    window: int = 128,
    sigma: jax.typing.ArrayLike = 2.0,
    *,
    share: jax.typing.ArrayLike = 0.0,
    min_history: jax.typing.ArrayLike = 32,
    robust: bool = True,
) -> optax.GradientTransformation:
    r"""Clips the global norm of the updates by the norms of the recent updates.

    Updates grow a few steps before the loss does, when several gradients in a row have
    similar directions. With the median :math:`m` and the median absolute deviation
    :math:`d` of the last `window` norms, the norm :math:`n` of an update :math:`u` is
    limited:

    .. math::
      u \leftarrow u \min\left(1, \frac{m + \max(\sigma \cdot 1.4826 d, \; s m)}{n}
      \right)

    where :math:`s` is the `share`. Every finite norm above 0, taken before clipping,
    enters the window. An update whose norm is not finite becomes 0.

    Use it after an optimizer, but before its learning rate: after ``scale_by_spam()``,
    before ``optax.scale_by_learning_rate(1e-3)``. There it compares directions. After
    the learning rate the window follows the schedule, and the updates of a warm-up are
    clipped because they grow.

    Args:
      window: Number of updates that an update is compared with, from 2 to
        65536. It decides shapes, so it must be a Python number.
      sigma: Number of deviations by which a norm may exceed the median, > 0.
      share: Share of the median norm by which a norm may always exceed it, >= 0.
      min_history: Number of updates in the window before one is clipped, from 2 to
        `window`.
      robust: Whether to use median and median deviation. If False, the limit is the
        mean of the window plus `sigma` standard deviations, as in Levanter.

    Returns:
      The transformation. Its updates keep their dtype.

    Raises:
      ValueError: If an argument is out of range, or in ``update``, if the state has
        another window.
      TypeError: If an argument, or the dtype of an update, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.clip_update_norm(window=8, min_history=4)
      >>> state = tx.init(jnp.zeros(1))
      >>> for size in (1.0, 1.1, 0.9, 1.0, 5.0):
      ...     updates, state = tx.update(jnp.array([size]), state)
      >>> print(f"{updates[0]:.3f} {state.update_norm:.1f}")
      1.148 5.0

    References:
      Marin, `Marin 32B retrospective
      <https://marin.readthedocs.io/en/latest/reports/marin-32b-retro/>`_, 2025.

    .. seealso:: :func:`skip_spikes`
    """
    window, test = SpikeTest.checked(window, sigma, share, min_history, robust)

    def init_fn(params: optax.Params) -> ClipUpdateNormState:
        del params
        return ClipUpdateNormState(
            jnp.zeros([window], jnp.float32),
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.float32),
            jnp.ones([], jnp.float32),
        )

    def update_fn(
        updates: optax.Updates,
        state: ClipUpdateNormState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ClipUpdateNormState]:
        del params
        _validate.check_state(state, ClipUpdateNormState)
        _spike_history.check_window(state.update_norms, window)
        _tensor_statistics.check_updates(updates)
        norm = _tensor_statistics.global_norm(updates)
        is_finite = jnp.isfinite(norm)
        values, count = state.update_norms, state.update_norm_count
        limit = _spike_history.limit(values, count, test)
        scale = jnp.where(is_finite, _tensor_statistics.clip_factor(norm, limit), 0)

        def clip(u: jax.Array) -> jax.Array:
            # `where`: an update within the limit keeps its bits, and 0 * NaN is NaN.
            u = jnp.asarray(u)
            scaled = _arithmetic.widen(u) * scale
            scaled = jnp.where(is_finite, scaled, 0).astype(u.dtype)
            return jnp.where(scale == 1, u, scaled)

        values, count = _spike_history.push(values, count, norm, is_finite & (norm > 0))
        return jax.tree.map(clip, updates), ClipUpdateNormState(
            values, count, norm, scale
        )

    return optax.GradientTransformation(init_fn, update_fn)
