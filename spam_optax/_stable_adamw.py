"""StableAdamW: AdamW with Adafactor's update clipping.

Wortsman et al., `Stable and low-precision training for large-scale vision-language
models <https://arxiv.org/abs/2304.13013>`_, NeurIPS 2023.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _schedule, _validate


class ScaleByStableAdamWState(NamedTuple):
    """State of :func:`scale_by_stable_adamw`.

    Attributes:
      count: Number of steps taken.
      mu: First moments.
      nu: Second moments.
      update_rms: Root mean square of each tensor's gradient divided by the root of its
        second moment, in the last step. The update was divided by it if it was above 1.
        One entry per tensor, in the order of :func:`tensor_names`; 0 for a gradient
        without a finite coordinate.
      nonfinite_count: Number of NaN, infinite or overflowing coordinates in the last
        step.
      nonfinite_total: The same, summed over all steps.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32.
    mu: optax.Updates
    nu: optax.Updates
    update_rms: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def scale_by_stable_adamw(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescales by Adam with update clipping.

    This is :func:`stable_adamw` without learning rate and weight decay. See there for
    formulas and arguments.

    Returns:
      The transformation. Its updates have the dtype of the parameters, or of the
      gradients if ``update`` gets no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.scale_by_stable_adamw()
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([2.0, -0.5]), tx.init(params), params)
      >>> print(updates.round(3))
      [ 1. -1.]
    """
    b1 = _validate.check_decay("b1", b1)
    b2 = _validate.check_decay("b2", b2)
    eps = _validate.check_number("eps", eps, above=0)
    _validate.check_flags(count=count)
    mu_dtype = _validate.check_moment_dtype("mu_dtype", mu_dtype)
    nu_dtype = _validate.check_moment_dtype("nu_dtype", nu_dtype)

    def init_fn(params: optax.Params) -> ScaleByStableAdamWState:
        return ScaleByStableAdamWState(
            jnp.zeros([], jnp.int32),
            _moments.init_mu(params, mu_dtype),
            _moments.init_nu(params, nu_dtype),
            jnp.zeros([len(jax.tree.leaves(params))], jnp.float32),
            *_moments.init_counters(count, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByStableAdamWState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleByStableAdamWState]:
        _validate.check_state(state, ScaleByStableAdamWState)
        _validate.check_same_tree(updates, state.mu)
        _validate.check_not_complex(updates, state.mu)
        step = optax.safe_increment(state.count)
        rates = _moments.adam_rates(b1, b2, eps, step)
        second = _schedule.bias_correction(b2, step)

        def step_tensor(
            g: jax.Array | None, mu: jax.Array, nu: jax.Array
        ) -> tuple[Any, ...]:
            if g is None:
                return None, mu, nu, jnp.zeros([]), ()
            g = _arithmetic.narrow_like(g, nu)
            bad = _arithmetic.is_nonfinite(g)
            counts = _arithmetic.totals(bad) if count else ()
            g = jnp.where(bad, jnp.zeros_like(g), g)
            new_nu = _arithmetic.ema(nu, _arithmetic.abs_sq(g), b2)
            # Without a finite coordinate it is 0, so it need not wait for `jnp.all`.
            rms = _rms(g, new_nu / second, eps)
            clipped = rates._replace(scale=rates.scale / jnp.maximum(rms, 1))
            moved = _moments.adam_step(g, mu, nu, new_nu, clipped, is_held=jnp.all(bad))
            return *moved, rms, counts

        direction, mu, nu, rms, counts = _moments.map_tensors(
            step_tensor, updates, state.mu, state.nu, n=5
        )
        unflatten = jax.tree.structure(state.mu).unflatten
        return (
            _moments.cast_updates(unflatten(direction), updates, params),
            ScaleByStableAdamWState(
                step,
                unflatten(mu),
                unflatten(nu),
                _arithmetic.stack(rms, jnp.float32),
                *_moments.add_counts(counts, state.nonfinite_total),
            ),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def stable_adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: _moments.Mask | None = None,
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with smaller steps for tensors whose gradient suddenly grows.

    Adam's step is too long while its second moment lags behind the gradient. In step
    :math:`t`, for each tensor with gradient :math:`g`, learning rate :math:`\alpha` and
    weight decay :math:`\lambda`:

    .. math::
      m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        \hat m = m / (1 - \beta_1^t) \\
      v &\leftarrow \beta_2 v + (1 - \beta_2) |g|^2, \quad
        \hat v = v / (1 - \beta_2^t) \\
      \mathrm{RMS} &= \sqrt{\mathrm{mean}(|g|^2 / \max(\hat v, \varepsilon^2))} \\
      p &\leftarrow p - \alpha \left( \frac{1}{\max(1, \mathrm{RMS})} \,
        \frac{\hat m}{\sqrt{\hat v} + \varepsilon} + \lambda p \right)

    The paper corrects the bias with decays that change over time. The result is the
    same. The RMS is in the state as ``update_rms``.

    Coordinates that are not finite, or whose square overflows, become 0 first. If a
    tensor has no finite coordinate, its moments do not change and its update is 0,
    apart from weight decay.

    In two ways this function differs from the paper. The weight decay is multiplied by
    the learning rate and not by ``1 / max(1, RMS)``, and it is 0 by default. `b2` and
    `eps` are those of the authors' implementation.

    Other arguments are those of :func:`spam`.

    Args:
      eps: Term added to the root of the second moment, > 0. It is also the lower limit
        of this root in the RMS.

    Returns:
      The optimizer. Its updates have the dtype of the parameters, or of the gradients
      if ``update`` gets no parameters.

    Raises:
      ValueError: If an argument is out of range. ``update`` raises it if the tree of
        updates is not that of the parameters, or if weight decay has no parameters.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.stable_adamw(learning_rate=0.1)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for size in (1.0, 1.0, 30.0):
      ...     updates, state = tx.update(jnp.full(2, size), state, params)
      ...     (rms,) = optax.tree.get(state, "update_rms")
      ...     print(f"{updates[0]:.3f} {rms:.2f}")
      -0.100 1.00
      -0.100 1.00
      -0.039 1.72

    References:
      Wortsman et al., `Stable and low-precision training for large-scale
      vision-language models <https://arxiv.org/abs/2304.13013>`_, 2023, algorithm 2.
    """
    return _moments.optimizer(
        scale_by_stable_adamw(
            b1, b2, eps, count=count, mu_dtype=mu_dtype, nu_dtype=nu_dtype
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def _rms(g: jax.Array, v_hat: jax.Array, eps: jax.typing.ArrayLike) -> jax.Array:
    """Returns the root mean square of a gradient over the root of its moment."""
    # eps**2 may underflow to 0, and 0 / 0 is NaN.
    floor = jnp.maximum(jnp.square(eps), jnp.finfo(v_hat.dtype).tiny)
    ratio = _arithmetic.abs_sq(g) / jnp.maximum(v_hat, floor)
    return _arithmetic.root(jnp.sum(ratio) / max(g.size, 1))
