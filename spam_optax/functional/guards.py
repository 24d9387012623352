"""The rules of the guards: which steps to skip, and how to scale attention heads."""

import chex
import jax
import jax.numpy as jnp

from spam_optax import _spike_history
from spam_optax._spike_history import SkipRule, StepHistory


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


def qk_clip_factors(
    logits: jax.Array,
    num_kv_heads: int | None = None,
    threshold: jax.typing.ArrayLike = 100.0,
    balance: jax.typing.ArrayLike = 0.5,
) -> tuple[jax.Array, jax.Array]:
    r"""Returns the factors by which QK-clip scales queries and keys.

    With the largest logit :math:`S_h` of head :math:`h`, the `threshold` :math:`\tau`
    and the `balance` :math:`\alpha`, and with keys of group :math:`g` that serve
    several heads of queries:

    .. math::
      \gamma_h = \min(1, \tau / S_h) \qquad
      c_g = \max_{h \in g} \gamma_h^\alpha \qquad
      q_h \leftarrow (\gamma_h / c_g) \, q_h \qquad k_g \leftarrow c_g k_g

    A logit that is not finite gives no clipping: :math:`\gamma_h = 1`.

    Args:
      logits: The largest attention logit of every head, shape (..., heads).
      num_kv_heads: Number of heads of the keys; a divisor of heads. None: as many.
      threshold: Largest allowed logit, > 0.
      balance: Share of the factor's logarithm that goes to the keys, in [0, 1].

    Returns:
      The factors of the queries, shape (..., heads), and of the keys, shape
      (..., num_kv_heads). Both are float32 and at most 1.

    Raises:
      AssertionError: If `num_kv_heads` does not divide the number of heads.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> queries, keys = functional.qk_clip_factors(
      ...     jnp.array([50.0, 400.0, 400.0, 1600.0]), num_kv_heads=2
      ... )
      >>> print(queries, keys)
      [1.    0.25  0.5   0.125] [1.  0.5]

    References:
      Kimi Team, `Kimi K2 <https://arxiv.org/abs/2507.20534>`_, 2025, section 2.1.
    """
    chex.assert_axis_dimension_gt(logits, -1, 0)
    heads = logits.shape[-1]
    num_kv_heads = heads if num_kv_heads is None else num_kv_heads
    chex.assert_is_divisible(heads, num_kv_heads)
    logits = logits.astype(jnp.float32)
    is_above = jnp.isfinite(logits) & (logits > threshold)
    gamma = jnp.where(is_above, threshold / jnp.where(is_above, logits, 1), 1)
    groups = gamma.reshape(*logits.shape[:-1], num_kv_heads, -1)
    keys = groups.max(-1) ** balance
    return (groups / keys[..., None]).reshape(logits.shape), keys


def scale_heads(
    tensor: jax.Array,
    factors: jax.Array,
    head_axis: int,
    layer_axis: int | None = None,
) -> jax.Array:
    """Multiplies the part of each attention head in a kernel or bias by a factor.

    Args:
      tensor: The kernel or bias.
      factors: The factors, shape (heads,), or (layers, heads) for a stack of layers.
      head_axis: The axis of the heads, or of heads times head width.
      layer_axis: The axis of the layers. None: there is none.

    Returns:
      The scaled tensor.

    Raises:
      AssertionError: If the shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> kernel = jnp.ones((2, 4))  # two heads of width 2
      >>> print(functional.scale_heads(kernel, jnp.array([1.0, 0.5]), head_axis=1))
      [[1.  1.  0.5 0.5]
       [1.  1.  0.5 0.5]]
    """
    chex.assert_rank(factors, 1 if layer_axis is None else 2)
    chex.assert_is_divisible(tensor.shape[head_axis], factors.shape[-1])
    factors = jnp.repeat(factors, tensor.shape[head_axis] // factors.shape[-1], axis=-1)
    shape = [1] * tensor.ndim
    shape[head_axis] = tensor.shape[head_axis]
    if layer_axis is not None:
        chex.assert_axis_dimension(tensor, layer_axis, factors.shape[0])
        shape[layer_axis] = tensor.shape[layer_axis]
        factors = factors if layer_axis < head_axis else factors.T
    return tensor * factors.reshape(shape).astype(tensor.dtype)
