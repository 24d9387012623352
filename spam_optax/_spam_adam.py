"""Adam with momentum reset, the second half of SPAM.

Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
<https://arxiv.org/abs/2501.06842>`_, ICLR 2025.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _schedule, _validate


class ScaleBySpamAdamState(NamedTuple):
    """State of :func:`scale_by_spam_adam`.

    Attributes:
      count: Number of steps taken.
      mu: First moment.
      nu: Second moment.
      nonfinite_count: Number of NaN, infinite or overflowing coordinates in the last
        step, which were set to 0. None if `count` is False.
      nonfinite_total: The same, summed over all steps.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32.
    mu: optax.Updates
    nu: optax.Updates
    nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def scale_by_spam_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    reset_interval: jax.typing.ArrayLike | None = 500,
    warmup_steps: jax.typing.ArrayLike = 150,
    restart_bias_correction: bool = False,
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescales by Adam with momentum reset and a ramp after each reset.

    This is :func:`spam_adam` without learning rate and weight decay. See there for
    formulas, arguments and errors.

    Returns:
      The transformation. Its updates have the dtype of the parameters, or of the
      gradients if ``update`` gets no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.scale_by_spam_adam()
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([2.0, -0.5]), tx.init(params), params)
      >>> print(updates.round(3))
      [ 1. -1.]
    """
    b1, b2, eps, reset_interval, warmup_steps = check_adam(
        b1, b2, eps, reset_interval, warmup_steps
    )
    _validate.check_flags(
        restart_bias_correction=restart_bias_correction,
        count=count,
    )
    mu_dtype = _validate.check_moment_dtype("mu_dtype", mu_dtype)
    nu_dtype = _validate.check_moment_dtype("nu_dtype", nu_dtype)
    step_scale = functools.partial(
        find_step_scale,
        b1=b1,
        b2=b2,
        reset_interval=reset_interval,
        warmup_steps=warmup_steps,
        restart_bias_correction=restart_bias_correction,
    )

    def init_fn(params: optax.Params) -> ScaleBySpamAdamState:
        return ScaleBySpamAdamState(
            jnp.zeros([], jnp.int32),
            _moments.init_mu(params, mu_dtype),
            _moments.init_nu(params, nu_dtype),
            *_moments.init_counters(count, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleBySpamAdamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleBySpamAdamState]:
        _validate.check_state(state, ScaleBySpamAdamState)
        _validate.check_same_tree(updates, state.mu)
        _validate.check_not_complex(updates, state.mu)
        step = optax.safe_increment(state.count)
        is_reset = _schedule.reset_position(step, reset_interval) == 0
        rates = _moments.AdamRates(b1, step_scale(step), eps)

        def step_tensor(
            g: jax.Array | None, mu: jax.Array, nu: jax.Array
        ) -> tuple[Any, ...]:
            mu, nu = _moments.zero_at_reset((mu, nu), is_reset)
            if g is None:
                return None, mu, nu, ()
            g = _arithmetic.narrow_like(g, nu)
            bad = _arithmetic.is_nonfinite(g)
            counts = _arithmetic.totals(bad) if count else ()
            g = jnp.where(bad, jnp.zeros_like(g), g)
            new_nu = _arithmetic.ema(nu, _arithmetic.abs_sq(g), b2)
            return *_moments.adam_step(g, mu, nu, new_nu, rates), counts

        direction, mu, nu, counts = _moments.map_tensors(
            step_tensor, updates, state.mu, state.nu, n=4
        )
        unflatten = jax.tree.structure(state.mu).unflatten
        direction = _moments.cast_updates(unflatten(direction), updates, params)
        counters = _moments.add_counts(counts, state.nonfinite_total)
        return direction, ScaleBySpamAdamState(
            step, unflatten(mu), unflatten(nu), *counters
        )

    return optax.GradientTransformation(init_fn, update_fn)


def spam_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: _moments.Mask | None = None,
    reset_interval: jax.typing.ArrayLike | None = 500,
    warmup_steps: jax.typing.ArrayLike = 150,
    restart_bias_correction: bool = False,
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with momentum reset and a ramp of the step size after each reset.

    This is SPAM without its clipping, and a complete optimizer. In step :math:`t` with
    gradient :math:`g`, learning rate :math:`\alpha` and weight decay :math:`\lambda`:

    .. math::
      m, v &\leftarrow 0 \quad \text{if } t \bmod D = 0 \\
      m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
      v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
      p &\leftarrow p - \alpha \left( w \,
        \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \,
        \frac{m}{\sqrt v + \varepsilon} + \lambda p \right)

    where :math:`D` is the `reset_interval`. The ramp :math:`w` is that of
    :func:`spam_optax.functional.reset_ramp`. It rises from 0.01 to 1 over the
    `warmup_steps` after each reset, and it is 1 before the first reset.

    .. note::
      As in the paper, the bias correction is *not* restarted by a reset. After a reset
      the moments start from 0 without correction. The root of :math:`v` then grows more
      slowly than :math:`m`, so the steps are longer than Adam's: about 1.9 times on
      average, and at most 2.7 times, in the 136th step after a reset (with the
      defaults). To compare with Adam, tune the learning rate of each. With
      ``restart_bias_correction=True`` the bias corrections count :math:`t` from the
      reset, and apart from the ramp the steps are as long as Adam's.

    A non-finite coordinate (NaN, infinite, or with an overflowing square) is set to 0,
    and ``nonfinite_count`` in the state counts it. This function does not clip spikes:
    use :func:`spam_clip` before it, or :func:`spam`. Other arguments, and the errors,
    are those of :func:`spam`.

    Args:
      reset_interval: Number of steps between momentum resets. None: no resets.
      count: Whether the state counts non-finite coordinates. After :func:`spam_clip`
        there are none, and counting them there takes memory traffic on TPU.

    Returns:
      The optimizer. Its updates have the dtype of the parameters, or of the gradients
      if ``update`` gets no parameters. They are rounded to this dtype before weight
      decay and learning rate are applied, as in Optax.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> f = lambda x: jnp.sum(x**2)
      >>> tx = spam_optax.spam_adam(learning_rate=0.1)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"objective: {f(params):.2f}")
      objective: 12.83
      objective: 11.72
      objective: 10.68

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, algorithm 1.

    .. seealso:: :func:`spam`, :func:`reset_moments`
    """
    return _moments.optimizer(
        scale_by_spam_adam(
            b1,
            b2,
            eps,
            reset_interval=reset_interval,
            warmup_steps=warmup_steps,
            restart_bias_correction=restart_bias_correction,
            count=count,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def check_adam(
    b1: Any, b2: Any, eps: Any, reset_interval: Any, warmup_steps: Any
) -> tuple[Any, ...]:
    """Checks the arguments and returns them in the same order."""
    b1 = _validate.check_decay("b1", b1)
    b2 = _validate.check_decay("b2", b2)
    eps = _validate.check_number("eps", eps, above=0)
    reset_interval, _ = _validate.check_reset(reset_interval)
    warmup_steps = _validate.check_steps("warmup_steps", warmup_steps, low=0)
    return b1, b2, eps, reset_interval, warmup_steps


def find_step_scale(
    step: jax.Array,
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    reset_interval: jax.typing.ArrayLike | None,
    warmup_steps: jax.typing.ArrayLike,
    restart_bias_correction: bool,
) -> jax.Array:
    """Returns the ramp times the bias corrections: a scalar."""
    ramp = _schedule.reset_ramp(step, reset_interval, warmup_steps)
    if restart_bias_correction:
        position = _schedule.reset_position(step, reset_interval)
        step = jnp.where(position < step, position + 1, step)
    first = _schedule.bias_correction(b1, step)
    second = _schedule.bias_correction(b2, step)
    return ramp * jnp.sqrt(second) / first
