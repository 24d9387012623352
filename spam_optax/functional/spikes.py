"""Which coordinates of a gradient are spikes or not finite, and clipping them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from spam_optax import _arithmetic, _spikes, _validate
from spam_optax.functional._arrays import read


def _read_pair(gradient: Any, nu: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient and its second moment as arrays of one shape."""
    gradient, nu = read("gradient", gradient), read("nu", nu, jnp.floating)
    chex.assert_equal_shape(
        (gradient, nu), custom_message="nu must have the shape of gradient"
    )
    return gradient, nu


def _check_active(active: Any) -> None:
    """Raises unless `active` is boolean."""
    try:
        dtype = jnp.result_type(active)
    except TypeError:
        dtype = jnp.dtype(object)
    if dtype != jnp.bool_:
        raise TypeError(
            f"{_validate.caller()}: active must be booleans, got "
            f"{_validate.shown(active)}."
        )


def gradient_spike_score(
    gradients: jax.typing.ArrayLike, *, axis: int = 0
) -> jax.Array:
    r"""Computes the gradient spike score of recorded gradients.

    .. math::
      \mathrm{GSS}(g_{i,t}) = \frac{|g_{i,t}|}{\frac1T \sum_{s=1}^{T} |g_{i,s}|}

    Huang et al. call a coordinate a spike if its score exceeds 50. The optimizer's
    threshold of 5000 belongs to another formula, ``g**2 / v``; see
    :func:`online_spike_score`.

    Args:
      gradients: Gradients of ``T`` steps along `axis`, any shape, floating or complex.
      axis: The axis of the steps.

    Returns:
      The scores, shaped like `gradients`, float32 (float64 for float64 input). A
      non-finite entry has the score infinity and does not enter the mean. A coordinate
      that is 0 in all steps has the score 0.

    Raises:
      AssertionError: If `gradients` has no step along `axis`, or is neither floating
        nor complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> gradients = jnp.ones((100, 2)).at[7, 0].set(1000.0)
      >>> score = functional.gradient_spike_score(gradients)
      >>> print(round(float(score[7, 0]), 2), int((score > 50).sum()))
      90.99 1

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025, section 2.
    """
    gradients = read("gradients", gradients)
    chex.assert_axis_dimension_gt(
        gradients,
        axis,
        0,
        custom_message="gradient_spike_score: gradients must have a step along axis",
    )
    size = jnp.abs(_arithmetic.widen(gradients))
    is_finite = jnp.isfinite(size)
    # Divided before the sum, because the sum of the largest spikes could overflow.
    steps = jnp.maximum(is_finite.sum(axis=axis, keepdims=True), 1).astype(size.dtype)
    mean = jnp.sum(size / steps, axis=axis, keepdims=True, where=is_finite)
    # XLA multiplies by the reciprocal, which for 1e38 would be subnormal and flushed.
    scale = jnp.where(mean > 1, 16, 1)
    score = (size / scale) / jnp.where(mean > 0, mean / scale, 1)
    return jnp.where(is_finite, score, jnp.inf)


def online_spike_score(
    gradient: jax.typing.ArrayLike, nu: jax.typing.ArrayLike
) -> jax.Array:
    r"""Computes the spike score that SPAM compares with its threshold.

    .. math::
      \mathrm{score}_i = \frac{|g_i|^2}{v_i}

    The default threshold of 5000 means a gradient of about 70.7 times its running root
    mean square.

    Args:
      gradient: The gradient.
      nu: Its second moment.

    Returns:
      The scores, shaped like `gradient`, float32 (float64 for float64 input). The score
      is 0 where `nu` is 0, because nothing is a spike without a history, and infinity
      for non-finite coordinates (see :func:`nonfinite_mask`).

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> gradient, nu = jnp.array([1.0, 100.0, 7.0]), jnp.array([1.0, 1.0, 0.0])
      >>> print(functional.online_spike_score(gradient, nu))
      [1.e+00 1.e+04 0.e+00]

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, section 3.
    """
    gradient, nu = _read_pair(gradient, nu)
    square = _arithmetic.abs_sq(gradient)
    nu = nu.astype(square.dtype)
    score = jnp.where(nu > 0, square / jnp.where(nu > 0, nu, 1), 0)
    return jnp.where(jnp.isfinite(square), score, jnp.inf)


def nonfinite_mask(gradient: jax.typing.ArrayLike) -> jax.Array:
    """Marks coordinates whose square is not finite.

    Args:
      gradient: The gradient.

    Returns:
      Booleans shaped like `gradient`. Squares are taken in float32 (float64 for
      float64 and complex128), so in float32 the limit is about 1.8e19.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> print(functional.nonfinite_mask(jnp.array([1.0, jnp.nan, -jnp.inf, 1e30])))
      [False  True  True  True]
    """
    return _arithmetic.is_nonfinite(read("gradient", gradient))


def zero_nonfinite(gradient: jax.typing.ArrayLike) -> jax.Array:
    """Sets the coordinates of :func:`nonfinite_mask` to 0.

    Args:
      gradient: The gradient.

    Returns:
      The gradient, same shape and dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> print(functional.zero_nonfinite(jnp.array([1.0, jnp.nan, -jnp.inf])))
      [1. 0. 0.]
    """
    gradient = read("gradient", gradient)
    is_bad = _arithmetic.is_nonfinite(gradient)
    return jnp.where(is_bad, jnp.zeros_like(gradient), gradient)


def spike_mask(
    gradient: jax.typing.ArrayLike,
    nu: jax.typing.ArrayLike,
    threshold: jax.typing.ArrayLike = 5000.0,
    *,
    active: jax.typing.ArrayLike = True,
    clip_unseen: bool = False,
) -> jax.Array:
    r"""Marks gradient spikes.

    .. math::
      S_i = [\, |g_i|^2 > \theta v_i \,]

    with the threshold :math:`\theta`.

    Args:
      gradient: The gradient.
      nu: Its second moment.
      threshold: A coordinate is a spike if its :func:`online_spike_score` exceeds this.
      active: Where clipping is active: booleans, a scalar or shaped like `nu`.
        Elsewhere nothing is a spike.
      clip_unseen: Whether a non-zero coordinate where `nu` is 0 counts as a spike, as
        in the authors' implementation.

    Returns:
      Booleans shaped like `gradient`. A non-finite coordinate is not a spike: see
      :func:`nonfinite_mask`.

    Raises:
      ValueError: If `threshold` is a number that is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> gradient, nu = jnp.array([1.0, -100.0, 7.0]), jnp.array([1.0, 1.0, 0.0])
      >>> print(functional.spike_mask(gradient, nu))
      [False  True False]
      >>> print(functional.spike_mask(gradient, nu, clip_unseen=True))
      [False  True  True]

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, section 3.
    """
    gradient, nu = _read_pair(gradient, nu)
    _check_active(active)
    threshold = _validate.check_number("threshold", threshold, above=0)
    rule = _spikes.SpikeRule(threshold, active, clip_unseen)
    return _spikes.is_spike(gradient, nu, rule)


def clip_spikes(
    gradient: jax.typing.ArrayLike,
    nu: jax.typing.ArrayLike,
    threshold: jax.typing.ArrayLike = 5000.0,
    *,
    active: jax.typing.ArrayLike = True,
    clip_unseen: bool = False,
) -> jax.Array:
    r"""Clips gradient spikes to ``sqrt(threshold)`` times their running RMS.

    .. math::
      g_i \leftarrow \begin{cases}
        \frac{g_i}{|g_i|} \sqrt{\theta v_i} & \text{if } |g_i|^2 > \theta v_i \\
        g_i & \text{else}
      \end{cases}

    The sign, or the phase of a complex number, is kept. An infinite coordinate, or one
    whose square overflows, is clipped in the same way where a limit applies, and
    becomes 0 elsewhere. NaN becomes 0.

    Args:
      gradient: The gradient.
      nu: Its second moment.
      threshold: The spike threshold, see :func:`spike_mask`.
      active: Where clipping is active: booleans, a scalar or shaped like `nu`. They are
        false in the grace steps, for example.
      clip_unseen: Whether coordinates where `nu` is 0 are clipped to 0.

    Returns:
      The clipped gradient, same shape and dtype. It is always finite, and so is its
      square in the compute dtype.

    Raises:
      ValueError: If `threshold` is a number that is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> gradient = jnp.array([1.0, -1000.0, jnp.inf, jnp.nan])
      >>> print(functional.clip_spikes(gradient, jnp.ones(4), 2500.0))
      [  1. -50.  50.   0.]

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, section 3.
    """
    gradient, nu = _read_pair(gradient, nu)
    _check_active(active)
    threshold = _validate.check_number("threshold", threshold, above=0)
    rule = _spikes.SpikeRule(threshold, active, clip_unseen)
    return _spikes.clip(gradient, nu, rule)
