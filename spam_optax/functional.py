r"""Pure functions of arrays: spike detection, clipping, the reset clock, the metrics.

The optimizers use the same code, so measurements in a notebook match what an optimizer
does. The functions keep no state. chex checks shapes and dtypes during tracing, which
costs nothing at run time. The functions raise AssertionError if a shape or a dtype is
not as described.

Throughout, ``g`` is the gradient of one step (`gradient`, any shape, floating or
complex), ``v`` its second moment before this step (`nu`, the same shape, floating; an
exponential moving average of ``|g|**2``, not bias corrected), and steps are counted
from 1.
"""

import math
import operator
from collections.abc import Collection
from typing import Any

import chex
import jax
import jax.numpy as jnp

from spam_optax import _arithmetic, _paths, _spike_history, _spikes, _validate
from spam_optax._spike_history import SkipRule, StepHistory

__all__ = (
    "attention_jacobian_bound",
    "bias_correction",
    "clip_spikes",
    "ffn_jacobian_bound",
    "gradient_spike_score",
    "layer_gradient_norms",
    "nonfinite_mask",
    "online_spike_score",
    "reset_position",
    "reset_ramp",
    "spike_mask",
    "spike_score",
    "spike_steps",
    "token_embedding_variability",
    "zero_nonfinite",
)


def _check_inexact(x: jax.Array) -> None:
    if not jnp.iscomplexobj(x):
        chex.assert_type(x, float)


def _check_gradient_and_nu(gradient: jax.Array, nu: jax.Array) -> None:
    _check_inexact(gradient)
    chex.assert_type(nu, float)
    chex.assert_equal_shape((gradient, nu))


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
    gradients = jnp.asarray(gradients)
    _check_inexact(gradients)
    chex.assert_axis_dimension_gt(gradients, axis, 0)
    size = jnp.abs(_arithmetic.widen(gradients))
    finite = jnp.isfinite(size)
    # Divided before the sum, because the sum of the largest spikes could overflow.
    steps = jnp.maximum(finite.sum(axis=axis, keepdims=True), 1).astype(size.dtype)
    mean = jnp.sum(size / steps, axis=axis, keepdims=True, where=finite)
    # XLA multiplies by the reciprocal, which for 1e38 would be subnormal and flushed.
    unit = jnp.where(mean > 1, 16, 1)
    score = (size / unit) / jnp.where(mean > 0, mean / unit, 1)
    return jnp.where(finite, score, jnp.inf)


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
    gradient, nu = jnp.asarray(gradient), jnp.asarray(nu)
    _check_gradient_and_nu(gradient, nu)
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
    gradient = jnp.asarray(gradient)
    _check_inexact(gradient)
    return _arithmetic.is_nonfinite(gradient)


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
    gradient = jnp.asarray(gradient)
    return jnp.where(nonfinite_mask(gradient), jnp.zeros_like(gradient), gradient)


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
    gradient, nu = jnp.asarray(gradient), jnp.asarray(nu)
    _check_gradient_and_nu(gradient, nu)
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
    gradient, nu = jnp.asarray(gradient), jnp.asarray(nu)
    _check_gradient_and_nu(gradient, nu)
    threshold = _validate.check_number("threshold", threshold, above=0)
    rule = _spikes.SpikeRule(threshold, active, clip_unseen)
    return _spikes.clip(gradient, nu, rule)


def reset_position(
    step: jax.typing.ArrayLike, interval: jax.typing.ArrayLike | None
) -> jax.Array:
    r"""Returns the number of steps since the last momentum reset.

    It is ``step mod interval``.

    Args:
      step: Number of the step, from 1; whole numbers of any shape.
      interval: Number of steps between resets. The moments are set to 0 in steps
        ``interval``, ``2 * interval``, ..., before the gradient of that step enters
        them. None: no resets.

    Returns:
      The position, int32, shaped like `step`. It is 0 in a reset step. Before the
      first reset, and without an interval, it is the step itself.

    Raises:
      AssertionError: If `step` is not an integer.
      ValueError: If `interval` is a number that is not whole or is < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> print(functional.reset_position(jnp.array([1, 499, 500, 501]), 500))
      [  1 499   0   1]

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, algorithm 1.
    """
    step = jnp.asarray(step)
    chex.assert_type(step, int)
    step = step.astype(jnp.int32)
    if interval is None:
        return step
    interval = _validate.check_steps("interval", interval, low=1)
    return step % jnp.asarray(interval, jnp.int32)


def reset_ramp(
    step: jax.typing.ArrayLike,
    interval: jax.typing.ArrayLike | None,
    warmup_steps: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Returns the factor on the step size after a reset, which rises from 0.01 to 1.

    .. math::
      1 - \frac{0.99}{2} \left(1 + \cos\frac{\pi c}{N + 1}\right)
      \quad\text{for } c < N, \text{ else } 1

    with :math:`c` the :func:`reset_position` and :math:`N` the `warmup_steps`. Before
    the first reset it is 1: there is no ramp at the start of training.

    Args:
      step: Number of the step, from 1; whole numbers of any shape.
      interval: Number of steps between resets. None: no resets.
      warmup_steps: Number of steps of the ramp. 0: no ramp.

    Returns:
      The factor, shaped like `step`, float32 (float64 with ``jax_enable_x64``).

    Raises:
      AssertionError: If `step` is not an integer.
      ValueError: If `interval` is < 1 or `warmup_steps` < 0, or not whole.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> steps = jnp.array([1, 500, 575, 650])
      >>> print(functional.reset_ramp(steps, 500, 150).round(3))
      [1.   0.01 0.5  1.  ]

    References:
      Huang et al., `SPAM <https://arxiv.org/abs/2501.06842>`_, 2025, algorithm 1.
    """
    warmup_steps = _validate.check_steps("warmup_steps", warmup_steps, low=0)
    position = reset_position(step, interval)
    ramping = (position < warmup_steps) & (position < step)
    length = jnp.asarray(warmup_steps).astype(float) + 1.0
    angle = jnp.pi * position.astype(float) / length
    ramp = 1 - 0.99 * (1 + jnp.cos(angle)) / 2
    return jnp.where(ramping, ramp, 1.0)


def bias_correction(
    decay: jax.typing.ArrayLike, step: jax.typing.ArrayLike
) -> jax.Array:
    r"""Returns Adam's bias correction :math:`1 - \beta^t`.

    It is computed as ``-expm1(t * log(decay))``, because ``1 - 0.999**1`` has an error
    of 1e-5 in float32.

    Args:
      decay: The decay :math:`\beta` in [0, 1).
      step: Number of the step, from 1; whole numbers of any shape.

    Returns:
      The correction, shaped like `step`, float32 (float64 with ``jax_enable_x64``).

    Raises:
      ValueError: If `decay` is a number outside [0, 1).

    Examples:
      >>> from spam_optax import functional
      >>> print(functional.bias_correction(0.9, 2).round(6))
      0.19

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, algorithm 1.
    """
    decay = _validate.check_decay("decay", decay)
    log_decay: jax.typing.ArrayLike
    if isinstance(decay, float):
        # Computed in float64, because rounding 0.999 to float32 first loses digits.
        log_decay = math.log(decay) if decay > 0 else -math.inf
    else:
        log_decay = jnp.log(jnp.asarray(decay).astype(float))
    return -jnp.expm1(jnp.asarray(step).astype(float) * log_decay)


def spike_score(
    values: jax.typing.ArrayLike,
    *,
    window: int = 1000,
    deviations: jax.typing.ArrayLike = 10.0,
) -> jax.Array:
    r"""Returns the percentage of spikes in a curve of a loss or a gradient norm.

    A value is a spike if it lies at least `deviations` standard deviations above or
    below the mean of the `window` values before it:

    .. math::
      |x_t - \mu_t| \ge k \sigma_t, \quad x_t \ne \mu_t

    A value is also a spike if it is not finite or its size is at least a sixteenth of
    the dtype's largest number. Such values enter no mean. Compare runs with the same
    `window` only.

    Args:
      values: One value per step, shape ``(steps,)``, floating.
      window: Number of earlier values in the mean and the (population) standard
        deviation. The first `window` values are never spikes and are not counted.
      deviations: Number of standard deviations :math:`k` that make a spike.

    Returns:
      The percentage of the later values that are spikes, 0 to 100: a float32 scalar.

    Raises:
      AssertionError: If `values` is not a vector of floats.
      ValueError: If `window` is < 2 or not less than the number of values, or
        `deviations` is not > 0.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> loss = 2 + 0.01 * jax.random.normal(jax.random.key(0), (300,))
      >>> print(functional.spike_score(loss.at[250].set(9.0), window=100))
      0.5

    References:
      Wang et al., `AdaGC <https://arxiv.org/abs/2502.11034>`_, 2025.
    """
    values = jnp.asarray(values)
    chex.assert_rank(values, 1)
    chex.assert_type(values, float)
    window = _validate.check_whole("window", window, low=2)
    try:
        window = operator.index(window)
    except TypeError:
        raise TypeError(
            "spike_score: window must be a Python whole number >= 2, under jit a "
            f"static one, got {window!r}."
        ) from None
    deviations = _validate.check_number("deviations", deviations, above=0)
    judged = values.shape[0] - window
    if judged < 1:
        raise ValueError(
            f"spike_score: window must be < the number of values "
            f"({values.shape[0]}), got {window}."
        )
    values = _arithmetic.widen(values)
    finite = jnp.abs(values) < jnp.finfo(values.dtype).max / 16

    def is_spike(start: jax.Array) -> jax.Array:
        history = jax.lax.dynamic_slice_in_dim(values, start, window)
        known = jax.lax.dynamic_slice_in_dim(finite, start, window)
        # Scaled by the largest value, because the variance of a norm of 1e25 overflows.
        unit = jnp.abs(history).max(where=known, initial=jnp.finfo(values.dtype).tiny)
        history = history / unit
        distance = jnp.abs(values[start + window] / unit - history.mean(where=known))
        far = distance >= deviations * history.std(where=known)
        return (far & (distance > 0)) | ~finite[start + window]

    # Batched, so that a long curve does not need (steps, window) values at once.
    spikes = jax.lax.map(is_spike, jnp.arange(judged), batch_size=min(judged, 256))
    return 100 * spikes.astype(jnp.float32).mean()


def layer_gradient_norms(
    gradients: Any, stacked: Collection[str] = (), *, layer_axis: int = 0
) -> dict[str, jax.Array]:
    r"""Returns the gradient norm of every tensor, and of every layer in stacked ones.

    .. math::
      \|g^{(l)}\|_2 = \sqrt{\sum_i |g^{(l)}_i|^2}

    for each layer :math:`l` of a tensor with stacked layers. Such tensors come from
    ``scan`` and ``vmap``. The norms show where in the depth of a model a gradient grows
    or vanishes. The norm of the whole tensor does not show this.

    Args:
      gradients: A tree of arrays, floating or complex: of Linen, of NNX (an
        ``nnx.State`` or a module), or any other. ``None`` leaves are skipped.
      stacked: Names of parts of paths, such as ``("blocks",)``. A tensor with one of
        these names in its path has an axis of layers.
      layer_axis: The axis of layers in stacked tensors.

    Returns:
      The norms by name, as of :func:`spam_optax.tensor_names`: of shape ``(layers,)``
      for a stacked tensor, a scalar for another; float32 (float64 for 64-bit input), in
      units of the gradient. The norm of a layer with a non-finite entry is not finite.

    Raises:
      AssertionError: If a tensor is neither floating nor complex, or a stacked one has
        no layer along `layer_axis`.
      ValueError: If a name in `stacked` is part of no path, or two tensors have the
        same name.
      TypeError: If `stacked` is not a collection of strings.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> kernel = jnp.ones((3, 2, 8)) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
      >>> gradients = {"blocks": {"kernel": kernel}, "head": jnp.ones((2, 8))}
      >>> norms = functional.layer_gradient_norms(gradients, ("blocks",))
      >>> print(norms["blocks/kernel"], norms["head"])
      [  4.  40. 400.] 4.0

    .. seealso:: :func:`spam_optax.track_spikes` for the norm of each whole tensor.
    """
    _validate.check_names("stacked", stacked)
    names = _paths.names(gradients)
    tensors = dict(
        zip(names, map(jnp.asarray, jax.tree.leaves(gradients)), strict=True)
    )
    parts = {part for name in tensors for part in name.split("/")}
    for name in stacked:
        if name not in parts:
            raise ValueError(
                f"{_validate.caller()}: "
                "stacked must have names of parts of the tensors' paths, "
                f"got {name!r}, which is in none."
            )

    def norms(name: str, gradient: jax.Array) -> jax.Array:
        _check_inexact(gradient)
        if set(name.split("/")).isdisjoint(stacked):
            return _arithmetic.norm(gradient)
        chex.assert_axis_dimension_gt(gradient, layer_axis, 0)
        return jax.vmap(_arithmetic.norm, in_axes=layer_axis)(gradient)

    return {name: norms(name, gradient) for name, gradient in tensors.items()}


def token_embedding_variability(embedding: jax.typing.ArrayLike) -> jax.Array:
    r"""Returns the standard deviation of each token's embedding (TEV).

    TEV is the token embedding variability:

    .. math::
      \mathrm{TEV}_i = \sqrt{\frac1d \sum_{j=1}^{d} (e_{ij} - \bar e_i)^2}, \qquad
      \bar e_i = \frac1d \sum_{j=1}^{d} e_{ij}

    The paper reports the mean and the standard deviation over tokens: ``tev.mean()``
    and ``tev.std()``. In Chung et al., pre-norm models with a lower TEV trained more
    stably. It needs one pass over the table and no gradients.

    Args:
      embedding: The table, of shape ``(tokens, width)``, floating.

    Returns:
      The deviation of each row, of shape ``(tokens,)``, in units of the table: float32
      (float64 for float64 input). The squares are divided by :math:`d`; PyTorch's
      ``std`` would divide by :math:`d - 1`.

    Raises:
      AssertionError: If `embedding` is not a matrix of floats, or without columns.

    Examples:
      >>> import jax
      >>> from spam_optax import functional, initializers
      >>> table = initializers.stable_embedding(256)(jax.random.key(0), (1000, 256))
      >>> tev = functional.token_embedding_variability(table)
      >>> print(tev.shape, f"{tev.mean():.4f} +- {tev.std():.4f}")
      (1000,) 0.0394 +- 0.0017

    References:
      Chung et al., `Stable Language Model Pre-training by Reducing Embedding
      Variability <https://arxiv.org/abs/2409.07787>`_, EMNLP 2024.
    """
    embedding = jnp.asarray(embedding)
    chex.assert_rank(embedding, 2)
    chex.assert_type(embedding, float)
    chex.assert_axis_dimension_gt(embedding, 1, 0)
    return _arithmetic.root(jnp.var(_arithmetic.widen(embedding), axis=1))


def ffn_jacobian_bound(
    width: jax.typing.ArrayLike,
    ffn_width: jax.typing.ArrayLike,
    std_in: jax.typing.ArrayLike,
    std_out: jax.typing.ArrayLike,
    residual_std: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Returns a bound on the Jacobian of a Pre-LN feed-forward sub-layer.

    It bounds the spectral norm:

    .. math::
      \left\| \frac{\partial\, (x + \mathrm{FFN}(\mathrm{LN}(x)))}{\partial x}
      \right\|_2 \le
      1 + \frac{\sigma_1 \sigma_2}{\sigma_x} \left(\sqrt d + \sqrt{d_{ffn}}\right)^2

    It holds for a plain feed-forward network of two matrices, not for a gated one.

    Args:
      width: Model width :math:`d`.
      ffn_width: Hidden width :math:`d_{ffn}`.
      std_in: Standard deviation :math:`\sigma_1` of the first matrix's entries.
      std_out: Standard deviation :math:`\sigma_2` of the second matrix's entries.
      residual_std: Standard deviation :math:`\sigma_x` of the residual stream
        :math:`x` that enters the sub-layer.

    Returns:
      The bound: a float32 scalar for numbers, or an array for arrays.

    Raises:
      ValueError: If an argument is a number that is not > 0.

    Examples:
      >>> from spam_optax import functional
      >>> std = (0.4 / 1024) ** 0.5  # Spike No More: variance 2 / (5 * width)
      >>> bound = functional.ffn_jacobian_bound(
      ...     1024, 4096, std_in=std, std_out=std / 48**0.5, residual_std=0.4**0.5)
      >>> print(f"{bound:.3f}")
      1.822

    References:
      Takase et al., `Spike No More: Stabilizing the Pre-training of Large Language
      Models <https://arxiv.org/abs/2312.16903>`_, 2025, section 3.
    """
    arguments = {
        "width": width,
        "ffn_width": ffn_width,
        "std_in": std_in,
        "std_out": std_out,
        "residual_std": residual_std,
    }
    width, ffn_width, std_in, std_out, residual_std = (
        _validate.check_number(name, value, above=0)
        for name, value in arguments.items()
    )
    matrices = (jnp.sqrt(width) + jnp.sqrt(ffn_width)) ** 2
    return 1 + std_in * std_out / residual_std * matrices  # type: ignore[return-value]


def attention_jacobian_bound(
    width: jax.typing.ArrayLike,
    std_out: jax.typing.ArrayLike,
    residual_std: jax.typing.ArrayLike,
    attention_norm: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Returns a bound on the Jacobian of a Pre-LN attention sub-layer.

    It bounds the spectral norm:

    .. math::
      \left\| \frac{\partial\, (x + \mathrm{Attn}(\mathrm{LN}(x)))}{\partial x}
      \right\|_2 \le
      1 + \frac{\sigma_O}{\sigma_x} \, 2 \sqrt d \, \|J_Z\|_2

    Args:
      width: Model width :math:`d`.
      std_out: Standard deviation :math:`\sigma_O` of the output projection's entries.
      residual_std: Standard deviation :math:`\sigma_x` of the residual stream
        :math:`x` that enters the sub-layer.
      attention_norm: Spectral norm of :math:`J_Z`, the Jacobian of the concatenated
        heads with respect to the normalised input.

    Returns:
      The bound: a float32 scalar for numbers, or an array for arrays.

    Raises:
      ValueError: If an argument is a number that is not > 0 (`attention_norm`: >= 0).

    Examples:
      >>> from spam_optax import functional
      >>> bound = functional.attention_jacobian_bound(
      ...     1024, std_out=0.003, residual_std=1.0, attention_norm=1.5)
      >>> print(f"{bound:.3f}")
      1.288

    References:
      Takase et al., `Spike No More <https://arxiv.org/abs/2312.16903>`_, 2025,
      section 3.
    """
    width = _validate.check_number("width", width, above=0)
    std_out = _validate.check_number("std_out", std_out, above=0)
    residual_std = _validate.check_number("residual_std", residual_std, above=0)
    attention_norm = _validate.check_number(
        "attention_norm", attention_norm, at_least=0
    )
    return 1 + std_out / residual_std * 2 * jnp.sqrt(width) * attention_norm  # type: ignore[return-value]


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
