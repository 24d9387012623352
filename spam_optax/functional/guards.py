"""The rules of the guards: which steps to skip, and how to scale attention heads."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from spam_optax import _spike_history, _validate
from spam_optax._spike_history import SkipRule, StepHistory
from spam_optax.functional._arrays import read, read_static


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
    """Finds the steps of a recorded run that :func:`spam_optax.skip_spikes` would skip.

    It applies the rule of the guard to a log. If the run had no guard, a spike was not
    skipped, and the values recorded after it may be higher than with the guard.

    Args:
      losses: The loss of every step, shape (steps,). None: losses are not watched.
      norms: The global gradient norm of every step, shape (steps,). None: norms are
        not watched.
      window: As in :func:`spam_optax.skip_spikes`, like all arguments below.
      sigma: Number of deviations by which a spike exceeds the median.
      loss_share: Share of the median loss by which a spike must also exceed it.
      norm_share: Share of the median norm by which a spike must also exceed it.
      min_history: Number of accepted steps before a step can be a spike.
      max_consecutive: Largest number of steps in a row that are skipped as spikes.
      robust: Whether the rule uses medians. If False, it uses the mean and the standard
        deviation.

    Returns:
      A :class:`spam_optax.SkipReason` for every step, shape (steps,), int32. It is 0
      for a step that is taken.

    Raises:
      ValueError: If neither losses nor norms are given, or an argument is out of range.
      TypeError: If a series is not an array.
      AssertionError: If the series are not vectors of one length, or are complex.

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
    given = {"losses": losses, "norms": norms}
    series = [_real(name, x) for name, x in given.items() if x is not None]
    if not series:
        raise ValueError("spike_steps: losses or norms must be given, got neither.")
    chex.assert_rank(
        series, 1, custom_message="spike_steps: losses and norms must be vectors"
    )
    chex.assert_equal_shape(
        series, custom_message="spike_steps: losses and norms must have one length"
    )

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
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.
      AssertionError: If `num_kv_heads` does not divide the number of heads, or the
        logits are complex.

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
    threshold = _validate.check_number("threshold", threshold, above=0)
    balance = _validate.check_number("balance", balance, at_least=0, at_most=1)
    logits = _real("logits", logits)
    if logits.ndim < 1 or not logits.shape[-1]:
        raise AssertionError(
            "qk_clip_factors: logits must have the shape (..., heads), got "
            f"{logits.shape}."
        )
    heads = logits.shape[-1]
    if num_kv_heads is None:
        num_kv_heads = heads
    num_kv_heads = read_static("num_kv_heads", num_kv_heads, low=1)
    if heads % num_kv_heads:
        raise AssertionError(
            f"qk_clip_factors: num_kv_heads must divide the number of heads {heads}, "
            f"got {num_kv_heads}."
        )
    return head_factors(logits, num_kv_heads, threshold, balance)


def head_factors(
    logits: jax.Array,
    num_kv_heads: int,
    threshold: jax.typing.ArrayLike,
    balance: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Returns the `qk_clip_factors` of arguments that were checked before."""
    is_above = jnp.isfinite(logits) & (logits > threshold)
    gamma = jnp.where(is_above, threshold / jnp.where(is_above, logits, 1), 1)
    # A factor that rounds to 0 would make the factor of the queries 0 / 0.
    gamma = jnp.maximum(gamma, jnp.finfo(jnp.float32).tiny)
    groups = gamma.reshape(*logits.shape[:-1], num_kv_heads, -1)
    keys = groups.max(-1) ** balance
    return (groups / keys[..., None]).reshape(logits.shape), keys


def _real(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """Returns `value` as float32. Raises unless it is an array of real numbers."""
    array = read(name, value, np.generic)
    if not _validate.is_real(array):
        raise AssertionError(
            f"{_validate.caller()}: {name} must have real numbers, got the dtype "
            f"{array.dtype}."
        )
    return array.astype(jnp.float32)


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
      head_axis: The axis of the heads, or of heads times head width, >= 0.
      layer_axis: The axis of the layers, >= 0. None: there is none.

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
    tensor, factors = read("tensor", tensor), read("factors", factors)
    axes = [axis for axis in (head_axis, layer_axis) if axis is not None]
    if len(set(axes)) != len(axes) or not all(0 <= a < tensor.ndim for a in axes):
        raise AssertionError(
            "scale_heads: head_axis and layer_axis must be different axes of a tensor "
            f"of {tensor.ndim} axes, got {head_axis} and {layer_axis}."
        )
    layers = () if layer_axis is None else (tensor.shape[layer_axis],)
    fits = factors.ndim == len(axes) and factors.shape[:-1] == layers
    if not fits or not factors.size or tensor.shape[head_axis] % factors.shape[-1]:
        raise AssertionError(
            "scale_heads: factors must have the shape (heads,), or (layers, heads) "
            "with a layer_axis, where heads divides the axis of the heads of tensor, "
            f"got {factors.shape} for the tensor of shape {tensor.shape}."
        )
    factors = jnp.repeat(factors, tensor.shape[head_axis] // factors.shape[-1], axis=-1)
    shape = [1] * tensor.ndim
    shape[head_axis] = tensor.shape[head_axis]
    if layer_axis is not None:
        shape[layer_axis] = tensor.shape[layer_axis]
        factors = factors if layer_axis < head_axis else factors.T
    return tensor * factors.reshape(shape).astype(tensor.dtype)
