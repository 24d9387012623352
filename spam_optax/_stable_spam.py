"""Stable-SPAM: adaptive clipping, adaptive norm, momentum reset.

Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
<https://arxiv.org/abs/2502.17055v2>`_, 2025; from its third version on the paper is
`GradientStabilizer`, another transformation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import (
    _adaclip,
    _adagn,
    _arithmetic,
    _moments,
    _schedule,
    _tensor_statistics,
    _validate,
)


class ScaleByStableSpamState(NamedTuple):
    """State of :func:`scale_by_stable_spam`.

    The vectors have one entry per tensor.

    Attributes:
      count: Number of steps taken.
      mu: First moments.
      nu: Second moments.
      max_steps: Number of steps in `max_mean`.
      max_mean: Running mean of the largest absolute value in the tensor.
      norm_steps: Number of steps in `norm_mean` and `norm_square`.
      norm_mean: Running mean of the norm.
      norm_square: Running mean of the squared norm.
      clipped_count: Number of coordinates that the adaptive clip clipped in the last
        step.
      clipped_total: The same, summed over all steps.
      nonfinite_count: Number of NaN, infinite or overflowing coordinates in the last
        step.
      nonfinite_total: The same, summed over all steps.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32.
    mu: optax.Updates
    nu: optax.Updates
    max_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    max_mean: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    norm_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    norm_mean: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    norm_square: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    clipped_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    clipped_total: jax.Array | None  # shape=(), dtype=jnp.int32.
    nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def scale_by_stable_spam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    gamma1: jax.typing.ArrayLike = 0.7,
    gamma2: jax.typing.ArrayLike = 0.9,
    gamma3: jax.typing.ArrayLike = 0.999,
    reset_interval: jax.typing.ArrayLike | None = 1000,
    total_steps: jax.typing.ArrayLike | None = None,
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescales by Stable-SPAM: adaptive clip, adaptive norm, Adam with momentum reset.

    This is :func:`stable_spam` without learning rate and weight decay. See there for
    formulas and arguments.

    Returns:
      The transformation. Its updates have the dtype of the parameters, or of the
      gradients if ``update`` gets no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.scale_by_stable_spam()
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([2.0, -0.5]), tx.init(params), params)
      >>> print(updates.round(3))
      [ 1. -1.]
    """
    gamma1, gamma2, eps, total_steps = _adagn.check_arguments(
        gamma1, gamma2, eps, total_steps
    )
    b1 = _validate.check_decay("b1", b1)
    b2 = _validate.check_decay("b2", b2)
    gamma3 = _validate.check_decay("gamma3", gamma3)
    reset_interval, _ = _validate.check_reset(reset_interval)
    _validate.check_flags(count=count)
    mu_dtype = _validate.check_moment_dtype("mu_dtype", mu_dtype)
    nu_dtype = _validate.check_moment_dtype("nu_dtype", nu_dtype)

    def init_fn(params: optax.Params) -> ScaleByStableSpamState:
        return ScaleByStableSpamState(
            jnp.zeros([], jnp.int32),
            _moments.init_mu(params, mu_dtype),
            _moments.init_nu(params, nu_dtype),
            *_tensor_statistics.init(params, 1),
            *_tensor_statistics.init(params, 2),
            *_moments.init_counters(count, 4),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByStableSpamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleByStableSpamState]:
        _validate.check_state(state, ScaleByStableSpamState)
        _validate.check_same_tree(updates, state.mu)
        _validate.check_not_complex(updates, state.mu)
        step = optax.safe_increment(state.count)
        decay_scale = _adagn.decay_scale(step, total_steps)
        structure = jax.tree.structure(state.mu)
        gradients = structure.flatten_up_to(updates)
        limits = _adaclip.find_limits(
            gradients, state.max_steps, state.max_mean, gamma3
        )
        limit, clip_factor = _tensor_statistics.split(limits.limit, limits.factor)

        def clipped_square(
            g: jax.Array, limit: jax.Array, clip_factor: jax.Array
        ) -> tuple[jax.Array]:
            clipped, _ = _adaclip.clip(g, limit, clip_factor)
            return (_arithmetic.sum_of_squares(clipped),)

        (squares,) = _tensor_statistics.measure(
            clipped_square, *(gradients, limit, clip_factor), missing=(0.0,)
        )
        norm = _tensor_statistics.roots(squares, gradients)
        factor, norms = _adagn.find_factors(
            norm,
            limits.usable & jnp.isfinite(norm**2),
            _adagn.NormStatistics(state.norm_steps, state.norm_mean, state.norm_square),
            gamma1 * decay_scale,
            gamma2,
            eps,
        )
        (factors,) = _tensor_statistics.split(factor)
        position = _schedule.reset_position(step, reset_interval)
        is_reset = position == 0
        since_reset = jnp.where(position < step, position + 1, step)
        rates = _moments.adam_rates(b1 * decay_scale, b2, eps, since_reset)

        def step_tensor(
            g: jax.Array | None,
            mu: jax.Array,
            nu: jax.Array,
            limit: jax.Array,
            clip_factor: jax.Array,
            factor: jax.Array,
        ) -> tuple[Any, ...]:
            mu, nu = _moments.zero_at_reset((mu, nu), is_reset)
            if g is None:
                return None, mu, nu, ()
            clipped, above = _adaclip.clip(g, limit, clip_factor)
            counts: tuple[jax.Array, ...] = ()
            if count:
                bad = _tensor_statistics.is_nonfinite(g)
                counts = _arithmetic.totals(above, bad)
            scaled = _tensor_statistics.scale(clipped, factor)
            new_nu = _arithmetic.ema(nu, _arithmetic.abs_sq(scaled), b2)
            return *_moments.adam_step(scaled, mu, nu, new_nu, rates), counts

        direction, mu, nu, counts = _moments.map_lists(
            step_tensor,
            gradients,
            *map(jax.tree.leaves, (state.mu, state.nu)),
            *(limit, clip_factor, factors),
            n=4,
        )
        direction, mu, nu = map(structure.unflatten, (direction, mu, nu))
        totals = state.clipped_total, state.nonfinite_total
        direction = _moments.cast_updates(direction, updates, params)
        return direction, ScaleByStableSpamState(
            step,
            mu,
            nu,
            limits.steps,
            limits.mean,
            *norms,
            *_moments.add_counts(counts, *totals),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def stable_spam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    gamma1: jax.typing.ArrayLike = 0.7,
    gamma2: jax.typing.ArrayLike = 0.9,
    gamma3: jax.typing.ArrayLike = 0.999,
    reset_interval: jax.typing.ArrayLike | None = 1000,
    total_steps: jax.typing.ArrayLike | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: _moments.Mask | None = None,
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stable-SPAM: adaptive clipping, adaptive norm, and Adam with momentum reset.

    Every gradient goes through :func:`adaclip` and then :func:`adagn`. With the result
    :math:`g`, the learning rate :math:`\alpha` and the weight decay :math:`\lambda`,
    step :math:`t` computes

    .. math::
      m, v &\leftarrow 0, \; k \leftarrow 0 \quad \text{if } t \bmod D = 0 \\
      k &\leftarrow k + 1 \\
      m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
      v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
      p &\leftarrow p - \alpha \left( \frac{m / (1 - \beta_1^k)}
        {\sqrt{v / (1 - \beta_2^k)} + \varepsilon} + \lambda p \right)

    Unlike in :func:`spam`, a reset also restarts the bias corrections, and no ramp
    follows. The defaults are those for training in 4 bits. For bfloat16 the paper uses
    ``gamma1=0.85, gamma2=0.99999``.

    The adaptive clip compares each tensor with the running mean of its own maximum, so
    it clips something in about every other step. ``clipped_count`` is therefore not a
    count of rare spikes.

    Resets differ from those of the authors' implementation. There a reset step uses the
    old moments once more and loses its gradient, and the bias corrections of the
    adaptive clip and norm restart although their running means do not.

    Other arguments are those of :func:`spam`.

    Args:
      eps: Term added to the denominators, here and in the adaptive norm, > 0.
      gamma1: Decay of the running mean of the norm in the adaptive norm, in [0, 1).
      gamma2: Decay of the running mean of the squared norm, in [0, 1).
      gamma3: Decay of the running mean of the maxima in the adaptive clip, in [0, 1).
      reset_interval: Number of steps between resets of the moments. None: no resets.
      total_steps: Number of steps :math:`T` of the run. `b1` and `gamma1` fall to half
        along a cosine, times ``0.5 + 0.25 * (1 + cos(pi * t / (T + 1)))``, until step
        T, and stay there. None: they are constant.

    Returns:
      The optimizer. Its updates have the dtype of the parameters, or of the gradients
      if ``update`` gets no parameters.

    Raises:
      ValueError: If an argument is out of range. ``update`` raises it if the tree of
        updates is not that of the parameters, or if weight decay has no parameters.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> f = lambda x: jnp.sum(x**2)
      >>> tx = spam_optax.stable_spam(learning_rate=0.1)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(params)
      >>> for step in range(4):
      ...     gradients = jax.grad(f)(params)
      ...     if step == 2:
      ...         gradients = gradients.at[0].set(1e9)
      ...     updates, state = tx.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"objective: {f(params):.2f}")
      objective: 12.83
      objective: 11.72
      objective: 10.88
      objective: 10.08

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055v2>`_, 2025, algorithm 1.

    .. seealso:: :func:`spam`, :func:`gradient_stabilizer`
    """
    return _moments.optimizer(
        scale_by_stable_spam(
            b1,
            b2,
            eps,
            gamma1=gamma1,
            gamma2=gamma2,
            gamma3=gamma3,
            reset_interval=reset_interval,
            total_steps=total_steps,
            count=count,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        learning_rate,
        weight_decay,
        mask,
    )
