"""SPAM's spike-aware clipping, for use before any optimizer.

Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
<https://arxiv.org/abs/2501.06842>`_, ICLR 2025.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _schedule, _spikes, _validate
from spam_optax._spikes import SpikeRule


class SpamClipState(NamedTuple):
    """State of :func:`spam_clip`. The counters are None without `count`.

    Attributes:
      clip_step: Number of steps taken.
      clip_nu: Second moment of the clipped gradients.
      spam_clip_clipped_count: Number of coordinates clipped as spikes in the last step.
      spam_clip_clipped_total: The same, summed over all steps.
      spam_clip_nonfinite_count: Number of NaN, infinite or overflowing coordinates in
        the last step.
      spam_clip_nonfinite_total: The same, summed over all steps.
    """

    clip_step: jax.Array  # shape=(), dtype=jnp.int32.
    clip_nu: optax.Updates
    spam_clip_clipped_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    spam_clip_clipped_total: jax.Array | None  # shape=(), dtype=jnp.int32.
    spam_clip_nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    spam_clip_nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def spam_clip(
    threshold: jax.typing.ArrayLike = 5000.0,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    reset_interval: jax.typing.ArrayLike | None = 500,
    grace_steps: jax.typing.ArrayLike = 20,
    clip_unseen: bool = False,
    count: bool = False,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Clips each coordinate of the gradient by its own second moment.

    Each coordinate :math:`g` of the gradient is clipped by its second moment
    :math:`v`:

    .. math::
      g &\leftarrow \mathrm{sign}(g) \sqrt{\theta v}
        \quad \text{where } g^2 > \theta v \\
      v &\leftarrow \beta_2 v + (1 - \beta_2) g^2

    where :math:`\theta` is the `threshold`. The second moment is set to 0 every
    `reset_interval` steps. Nothing is clipped in the first ``grace_steps - 1`` steps of
    a run, nor in `grace_steps` steps from each reset on. The updates are always finite.
    NaN becomes 0. An infinite coordinate, or one whose square overflows, becomes the
    limit :math:`\sqrt{\theta v}` where clipping is active and :math:`v > 0`, and 0
    elsewhere.

    Use it before any optimizer: ``optax.chain(spam_clip(), optax.adamw(1e-3))``. In
    place of ``optax.chain(spam_clip(), spam_adam())`` use :func:`spam`, which needs
    only one second moment for both. Other arguments are those of :func:`spam`.

    Args:
      threshold: Limit on ``g**2 / v``. The default of 5000 allows 70.7 times the
        running root mean square. The 50 of
        :func:`spam_optax.functional.gradient_spike_score` belongs to another formula.
        Keep the threshold above ``1 / (1 - b2**n)`` with
        ``n = max(grace_steps - 1, 1)``, which is 53.1 with the defaults. Below it,
        gradients of constant size are clipped right after the grace steps, because
        ``v`` is not bias corrected.
      clip_unseen: Whether a coordinate without history (``v == 0``) is clipped to 0, as
        in the authors' implementation. Such a coordinate then stays at 0 until the next
        reset. An example is an embedding row whose token first occurs after the grace
        steps.

    Returns:
      The transformation. Its updates have the dtype of the gradients.

    Raises:
      ValueError: If an argument is out of range; by ``update``, if the tree of updates
        is not that of the parameters.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.spam_clip(grace_steps=1, count=True)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> gradients, state = tx.update(jnp.array([1.0, 1.0]), state)
      >>> gradients, state = tx.update(jnp.array([1.0, -1e6]), state)
      >>> print(gradients.round(3), optax.tree.get(state, "spam_clip_clipped_count"))
      [ 1.    -2.236] 1

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025, section 3.
    """
    threshold, b2, reset_interval, grace_steps = check_clip(
        threshold, b2, reset_interval, grace_steps
    )
    _validate.check_flags(clip_unseen=clip_unseen, count=count)
    nu_dtype = _validate.check_moment_dtype("nu_dtype", nu_dtype)

    def init_fn(params: optax.Params) -> SpamClipState:
        return SpamClipState(
            jnp.zeros([], jnp.int32),
            _moments.init_nu(params, nu_dtype),
            *_moments.init_counters(count, 4),
        )

    def update_fn(
        updates: optax.Updates,
        state: SpamClipState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, SpamClipState]:
        del params
        _validate.check_state(state, SpamClipState)
        _validate.check_same_tree(updates, state.clip_nu)
        step = optax.safe_increment(state.clip_step)
        position = _schedule.reset_position(step, reset_interval)
        is_reset = position == 0
        rule = SpikeRule(threshold, position >= grace_steps, clip_unseen)

        def clip_tensor(g: jax.Array | None, old_nu: jax.Array) -> tuple[Any, ...]:
            nu = _moments.zero_at_reset(old_nu, is_reset)
            if g is None:
                return None, nu, ()
            narrow = _arithmetic.narrow_like(g, nu)
            counts: tuple[jax.Array, ...] = ()
            if count:
                bad = _arithmetic.is_nonfinite(narrow)
                nu, counts = _spikes.count(narrow, nu, bad, rule)
            clipped, nu = _spikes.clip_and_update_nu(narrow, nu, b2, rule)
            clipped = _arithmetic.cast(clipped, jnp.asarray(g).dtype)
            return clipped, _arithmetic.cast(nu, old_nu.dtype), counts

        clipped, nu, counts = _moments.map_tensors(
            clip_tensor, updates, state.clip_nu, n=3
        )
        totals = state.spam_clip_clipped_total, state.spam_clip_nonfinite_total
        counters = _moments.add_counts(counts, *totals)
        unflatten = jax.tree.structure(state.clip_nu).unflatten
        return unflatten(clipped), SpamClipState(step, unflatten(nu), *counters)

    return optax.GradientTransformation(init_fn, update_fn)


def check_clip(
    threshold: Any, b2: Any, reset_interval: Any, grace_steps: Any
) -> tuple[Any, ...]:
    """Checks the arguments and returns them in the same order."""
    threshold = _validate.check_number("threshold", threshold, above=0)
    b2 = _validate.check_decay("b2", b2)
    return threshold, b2, *_validate.check_reset(reset_interval, grace_steps)
