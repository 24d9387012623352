"""SPAM: spike-aware clipping and Adam with momentum reset, with one second moment.

Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
<https://arxiv.org/abs/2501.06842>`_, ICLR 2025.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _schedule, _spikes, _validate
from spam_optax._spam_adam import check_adam, find_step_scale
from spam_optax._spam_clip import check_clip
from spam_optax._spikes import SpikeRule


class ScaleBySpamState(NamedTuple):
    """State of :func:`scale_by_spam`. The counters are None without `count`.

    Attributes:
      count: Number of steps taken.
      mu: First moment.
      nu: Second moment. A coordinate is a spike if its square exceeds `threshold` times
        this moment.
      clipped_count: Number of coordinates clipped as spikes in the last step.
      clipped_total: The same, summed over all steps.
      nonfinite_count: Number of NaN, infinite or overflowing coordinates in the last
        step.
      nonfinite_total: The same, summed over all steps.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32.
    mu: optax.Updates
    nu: optax.Updates
    clipped_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    clipped_total: jax.Array | None  # shape=(), dtype=jnp.int32.
    nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def scale_by_spam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    threshold: jax.typing.ArrayLike = 5000.0,
    grace_steps: jax.typing.ArrayLike = 20,
    clip_unseen: bool = False,
    count: bool = False,
    reset_interval: jax.typing.ArrayLike | None = 500,
    warmup_steps: jax.typing.ArrayLike = 150,
    restart_bias_correction: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescales by SPAM: spike-aware clipping and Adam with momentum reset.

    This is :func:`spam` without learning rate and weight decay. See there for
    arguments and errors.

    Returns:
      The transformation. Its updates have the dtype of the parameters, or of the
      gradients if ``update`` gets no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.scale_by_spam()
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([2.0, -0.5]), tx.init(params), params)
      >>> print(updates.round(3))
      [ 1. -1.]
    """
    settings = SpamSettings(
        b1=b1,
        b2=b2,
        eps=eps,
        threshold=threshold,
        grace_steps=grace_steps,
        clip_unseen=clip_unseen,
        count=count,
        reset_interval=reset_interval,
        warmup_steps=warmup_steps,
        restart_bias_correction=restart_bias_correction,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    ).checked()

    def init_fn(params: optax.Params) -> ScaleBySpamState:
        return init_spam(params, settings)

    def update_fn(
        updates: optax.Updates,
        state: ScaleBySpamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleBySpamState]:
        _validate.check_state(state, ScaleBySpamState)
        _validate.check_same_tree(updates, state.mu)
        _validate.check_not_complex(updates, state.mu)
        direction, state = spam_step(updates, state, settings)
        return _moments.cast_updates(direction, updates, params), state

    return optax.GradientTransformation(init_fn, update_fn)


def spam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    threshold: jax.typing.ArrayLike = 5000.0,
    grace_steps: jax.typing.ArrayLike = 20,
    clip_unseen: bool = False,
    count: bool = False,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: _moments.Mask | None = None,
    reset_interval: jax.typing.ArrayLike | None = 500,
    warmup_steps: jax.typing.ArrayLike = 150,
    restart_bias_correction: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SPAM: Adam with spike-aware gradient clipping and momentum reset.

    SPAM is for pre-training in which gradients spike. It computes what
    ``optax.chain(spam_clip(...), spam_adam(...))`` computes; see these functions for
    the formulas. It needs only one second moment, so its state is as large as Adam's.
    Both agree to float32 rounding if the halves have the same `b2`, `reset_interval`
    and `nu_dtype` and the gradients are float32. Clipped 16-bit gradients stay in
    float32 here. The chain rounds them to 16 bits.

    With ``count=True`` the state has counters, which
    ``optax.tree.get(state, "clipped_count")`` and the names ``clipped_total``,
    ``nonfinite_count`` and ``nonfinite_total`` read. A transformation for chains puts
    a name before them: ``spam_clip_clipped_count``.

    How each coordinate of the gradient is handled:

    ============================  ====================================================
    NaN                           0, counted as non-finite
    +-infinite, square overflows  the clip limit where clipping is active and there is
                                  a history, else 0; counted as non-finite
    finite, above the limit       the clip limit where clipping is active, counted as
                                  a spike
    no history (``v = 0``)        passes unclipped, unless `clip_unseen`
    ============================  ====================================================

    Differences from the authors' implementation:

    * A coordinate without history is not clipped to 0; ``clip_unseen=True`` does that.
    * Non-finite gradients do not reach the moments or the parameters.
    * Moments of bfloat16 parameters are float32 by default.
    * ``reset_interval=None`` and intervals of any length work.

    Args:
      learning_rate: The learning rate: a number >= 0 or a schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Term added to the root of the second moment, > 0. It is added before the bias
        correction.
      threshold: Limit on ``g**2 / v``. The default of 5000 allows 70.7 times the
        running root mean square, so 40 times the usual gradient is not a spike.
      grace_steps: Number of steps without clipping from each reset on. The reset step
        is the first of them. At the start of a run it is one less: clipping is active
        from step `grace_steps` on, and steps are counted from 1.
      clip_unseen: Whether a coordinate without history (``v == 0``) is clipped to 0, as
        in the authors' implementation.
      count: Whether the state counts clipped and non-finite coordinates. On a GPU this
        adds a fifth to a half to the step. The counters are sums over whole arrays, so
        leave it off inside ``jax.shard_map``. :func:`track_spikes` has statistics per
        tensor without it.
      weight_decay: Decoupled weight decay, >= 0. It is multiplied by the learning rate,
        and not by the ramp after a reset. 0 adds no decay, and ``update`` then needs no
        parameters.
      mask: Which parameters are decayed: a tree of booleans like the parameters or a
        prefix of it, or a function from parameters to such a tree. None: all.
      reset_interval: Number of steps between momentum resets. It must be larger than
        `grace_steps`. None: no resets.
      warmup_steps: Number of steps after each reset over which the step size rises from
        0.01 to 1. There is no ramp at the start of training. This is not the warm-up of
        the learning rate.
      restart_bias_correction: Whether a reset also restarts the bias corrections. See
        the note in :func:`spam_adam`.
      mu_dtype: Storage dtype of the first moment. None: float32, or float64 for float64
        parameters. Complex parameters keep a complex first moment.
      nu_dtype: Storage dtype of the second moment. It must have the range of float32.
        None: float32, or float64 for float64 and complex128 parameters.

    Returns:
      The optimizer. Its updates have the dtype of the parameters, or of the gradients
      if ``update`` gets no parameters. They are rounded to this dtype before weight
      decay and learning rate are applied, as in Optax.

    Raises:
      ValueError: If an argument is out of range. The message names the argument.
        ``update`` raises it if the tree of updates is not that of the parameters, or if
        weight decay has no parameters.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> f = lambda x: jnp.sum(x**2)
      >>> tx = spam_optax.spam(learning_rate=0.1, grace_steps=2, count=True)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(params)
      >>> for step in range(4):
      ...     gradients = jax.grad(f)(params)
      ...     if step == 2:
      ...         gradients = gradients.at[0].set(1e9)
      ...     updates, state = tx.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     spikes = optax.tree.get(state, "clipped_count")
      ...     print(f"objective: {f(params):.2f}, spikes: {spikes}")
      objective: 12.83, spikes: 0
      objective: 11.72, spikes: 0
      objective: 10.69, spikes: 1
      objective: 9.72, spikes: 0

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025.

    .. seealso::
      :func:`spam_clip`, :func:`spam_adam`, :func:`spam_optax.inject_hyperparams`
    """
    return _moments.optimizer(
        scale_by_spam(
            b1,
            b2,
            eps,
            threshold=threshold,
            grace_steps=grace_steps,
            clip_unseen=clip_unseen,
            count=count,
            reset_interval=reset_interval,
            warmup_steps=warmup_steps,
            restart_bias_correction=restart_bias_correction,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


class SpamSettings(NamedTuple):
    """The arguments of :func:`scale_by_spam` and :func:`scale_by_sparse_spam`."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    threshold: jax.typing.ArrayLike
    grace_steps: jax.typing.ArrayLike
    clip_unseen: bool
    count: bool  # type: ignore[assignment]
    reset_interval: jax.typing.ArrayLike | None
    warmup_steps: jax.typing.ArrayLike
    restart_bias_correction: bool
    mu_dtype: jax.typing.DTypeLike | None
    nu_dtype: jax.typing.DTypeLike | None

    def checked(self) -> "SpamSettings":
        """Returns the settings with Python numbers and canonical dtypes.

        Raises if one is invalid.
        """
        clip = ("threshold", "b2", "reset_interval", "grace_steps")
        adam = ("b1", "b2", "eps", "reset_interval", "warmup_steps")
        numbers: dict[str, Any] = {}
        for check, names in ((check_clip, clip), (check_adam, adam)):
            values = check(*(getattr(self, name) for name in names))
            numbers |= zip(names, values, strict=True)
        flags = ("clip_unseen", "count", "restart_bias_correction")
        _validate.check_flags(**{name: getattr(self, name) for name in flags})
        dtypes: dict[str, Any] = {
            name: _validate.check_moment_dtype(name, getattr(self, name))
            for name in ("mu_dtype", "nu_dtype")
        }
        return self._replace(**numbers, **dtypes)


def init_spam(params: optax.Params, settings: SpamSettings) -> ScaleBySpamState:
    """Returns the initial state of SPAM for moments shaped like `params`."""
    return ScaleBySpamState(
        jnp.zeros([], jnp.int32),
        _moments.init_mu(params, settings.mu_dtype),
        _moments.init_nu(params, settings.nu_dtype),
        *_moments.init_counters(settings.count, 4),
    )


def spam_step(
    gradients: optax.Updates,
    state: ScaleBySpamState,
    settings: SpamSettings,
    nonfinite: Any = None,
) -> tuple[optax.Updates, ScaleBySpamState]:
    """Takes one step of SPAM on trees shaped like the moments.

    Args:
      gradients: The gradients.
      state: The state before the step.
      settings: The hyperparameters.
      nonfinite: Number of non-finite gradient coordinates per entry of the moments, for
        moments that stand for a group. None: computed from `gradients`.

    Returns:
      The direction in the compute dtype, and the new state.
    """
    b1, b2 = settings.b1, settings.b2
    step = optax.safe_increment(state.count)
    position = _schedule.reset_position(step, settings.reset_interval)
    is_reset = position == 0
    is_active = position >= settings.grace_steps
    rule = SpikeRule(settings.threshold, is_active, settings.clip_unseen)
    scale = find_step_scale(
        step,
        b1=b1,
        b2=b2,
        reset_interval=settings.reset_interval,
        warmup_steps=settings.warmup_steps,
        restart_bias_correction=settings.restart_bias_correction,
    )
    rates = _moments.AdamRates(b1, scale, settings.eps)

    def step_tensor(
        g: jax.Array | None,
        mu: jax.Array,
        nu: jax.Array,
        nonfinite: jax.Array | None,
    ) -> tuple[Any, ...]:
        mu, nu = _moments.zero_at_reset((mu, nu), is_reset)
        if g is None:
            return None, mu, nu, ()
        # In the compute dtype: a clipped gradient need not be rounded to bfloat16.
        g = _arithmetic.widen(_arithmetic.narrow_like(g, nu))
        counts: tuple[jax.Array, ...] = ()
        if settings.count:
            bad = _arithmetic.is_nonfinite(g) if nonfinite is None else nonfinite
            nu, counts = _spikes.count(g, nu, bad, rule)
        g, new_nu = _spikes.clip_and_update_nu(g, nu, b2, rule)
        return *_moments.adam_step(g, mu, nu, new_nu, rates), counts

    structure = jax.tree.structure(state.mu)
    if nonfinite is None:
        nonfinite = structure.unflatten([None] * structure.num_leaves)
    direction, mu, nu, counts = _moments.map_tensors(
        step_tensor, gradients, state.mu, state.nu, nonfinite, n=4
    )
    direction, mu, nu = map(structure.unflatten, (direction, mu, nu))
    totals = state.clipped_total, state.nonfinite_total
    counters = _moments.add_counts(counts, *totals)
    return direction, ScaleBySpamState(step, mu, nu, *counters)
