"""AdaGN: rescales each tensor by the running statistics of its norm.

Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
<https://arxiv.org/abs/2502.17055v2>`_, 2025.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _tensor_statistics, _validate
from spam_optax._adaclip import widen_finite


class AdaGNState(NamedTuple):
    """State of :func:`adagn`: vectors with one entry per tensor, and counters.

    Attributes:
      adagn_count: Number of steps taken.
      adagn_steps: Number of steps in the running means.
      adagn_mean: Running mean of the norm.
      adagn_square: Running mean of the squared norm.
      adagn_nonfinite_count: Number of NaN, infinite or overflowing coordinates in the
        last step.
      adagn_nonfinite_total: The same, summed over all steps.
    """

    adagn_count: jax.Array  # shape=(), dtype=jnp.int32.
    adagn_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    adagn_mean: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    adagn_square: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    adagn_nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    adagn_nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def adagn(
    gamma1: jax.typing.ArrayLike = 0.7,
    gamma2: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    total_steps: jax.typing.ArrayLike | None = None,
    count: bool = False,
) -> optax.GradientTransformation:
    r"""Rescales each tensor by the running mean and mean square of its norm.

    This is done for each tensor, with :math:`k` the number of steps:

    .. math::
      n_1 &\leftarrow \gamma_1 n_1 + (1 - \gamma_1) \lVert g \rVert, \quad
        \hat n_1 = n_1 / (1 - \gamma_1^k) \\
      n_2 &\leftarrow \gamma_2 n_2 + (1 - \gamma_2) \lVert g \rVert^2, \quad
        \hat n_2 = n_2 / (1 - \gamma_2^k) \\
      g &\leftarrow \frac{g}{\lVert g \rVert}
        \cdot \frac{\hat n_1}{\sqrt{\hat n_2} + \varepsilon}

    The norm of the result is about 1, whatever the scale of the gradient, unless the
    squares of its entries underflow. Non-finite coordinates become 0. A gradient of
    zeros stays zero.

    Args:
      gamma1: Decay of the running mean of the norm, in [0, 1). The paper uses 0.7 for
        training in 4 bits and 0.85 for bfloat16.
      gamma2: Decay of the running mean of the squared norm, in [0, 1). The paper uses
        0.9 for training in 4 bits and 0.99999 for bfloat16.
      eps: Term added to the denominator, > 0.
      total_steps: Number of steps :math:`T` of the run. `gamma1` falls to half along
        a cosine, ``gamma1 * (0.5 + 0.25 * (1 + cos(pi * t / (T + 1))))``, until step T,
        and stays there. None: `gamma1` is constant.
      count: Whether the state counts coordinates; see :func:`spam_optax.spam`.

    Returns:
      The transformation. Its updates have the dtype of the gradients.

    Raises:
      ValueError: If an argument is out of range. ``update`` raises it if the number of
        tensors is not that of ``init``.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.adagn()
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradients in jnp.array([[3.0, 4.0], [3.0, 4.0], [3e6, 4e6]]):
      ...     gradients, state = tx.update(gradients, state)
      ...     print(f"{gradients[0]:.2f} {gradients[1]:.2f}")
      0.60 0.80
      0.60 0.80
      0.45 0.60

    References:
      Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055v2>`_, 2025,
      section 3: AdaGN.
    """
    gamma1, gamma2, eps, total_steps = check_arguments(gamma1, gamma2, eps, total_steps)
    _validate.check_flags(count=count)

    def init_fn(params: optax.Params) -> AdaGNState:
        return AdaGNState(
            jnp.zeros([], jnp.int32),
            *_tensor_statistics.init(params, 2),
            *_moments.init_counters(count, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: AdaGNState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, AdaGNState]:
        del params
        _validate.check_state(state, AdaGNState)
        gradients, structure = _tensor_statistics.flatten(updates, state.adagn_steps)
        step = optax.safe_increment(state.adagn_count)
        norm, nonfinite = _tensor_statistics.finite_norms(gradients)
        scaling = find_factors(
            norm,
            _tensor_statistics.is_usable(norm, nonfinite),
            NormStatistics(state.adagn_steps, state.adagn_mean, state.adagn_square),
            gamma1 * decay_scale(step, total_steps),
            gamma2,
            eps,
        )
        scaled = rescale(gradients, scaling[0])
        return structure.unflatten(scaled), AdaGNState(
            step,
            *scaling[1],
            *_tensor_statistics.add_nonfinite(
                gradients, nonfinite, state.adagn_nonfinite_total
            ),
        )

    return optax.GradientTransformation(init_fn, update_fn)


class NormStatistics(NamedTuple):
    """Running statistics of the norm of every tensor.

    Attributes:
      steps: Number of steps in the running means.
      mean: Running mean of the norm.
      square: Running mean of the squared norm.
    """

    steps: jax.Array
    mean: jax.Array
    square: jax.Array


def find_factors(
    norm: jax.Array,
    usable: jax.Array,
    statistics: NormStatistics,
    gamma1: jax.typing.ArrayLike,
    gamma2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> tuple[jax.Array, NormStatistics]:
    """Returns the factor on every tensor, and the new statistics."""
    steps = statistics.steps + usable.astype(jnp.int32)
    average, corrected = _tensor_statistics.average, _tensor_statistics.corrected
    mean = average(statistics.mean, norm, gamma1, usable)
    square = average(statistics.square, norm**2, gamma2, usable)
    root = _arithmetic.root(corrected(square, gamma2, steps)) + eps
    wanted = corrected(mean, gamma1, steps) / root
    factor = _tensor_statistics.rescale_factor(norm, wanted, steps > 0)
    return factor, NormStatistics(steps, mean, square)


def rescale(gradients: Sequence[jax.Array], factors: jax.Array) -> list[jax.Array]:
    """Multiplies the finite part of each gradient by its factor."""

    def of_tensor(g: jax.Array, factor: jax.Array) -> tuple[jax.Array]:
        scaled = _tensor_statistics.scale(widen_finite(g), factor)
        return (_arithmetic.cast(scaled, jnp.asarray(g).dtype),)

    (scaled,) = _moments.map_lists(
        of_tensor, gradients, *_tensor_statistics.split(factors), n=1
    )
    return scaled


def check_arguments(
    gamma1: Any, gamma2: Any, eps: Any = 1.0, total_steps: Any = None
) -> tuple[Any, ...]:
    """Returns the arguments, checked, in the same order."""
    gamma1 = _validate.check_decay("gamma1", gamma1)
    gamma2 = _validate.check_decay("gamma2", gamma2)
    eps = _validate.check_number("eps", eps, above=0)
    if total_steps is not None:
        total_steps = _validate.check_steps("total_steps", total_steps, low=1)
    return gamma1, gamma2, eps, total_steps


def decay_scale(step: jax.Array, total_steps: Any) -> jax.Array | float:
    """Returns the factor on `b1` and `gamma1` in this step."""
    if total_steps is None:
        return 1.0
    step = jnp.minimum(step, total_steps).astype(float)
    length = jnp.asarray(total_steps).astype(float) + 1.0
    return 0.5 + 0.25 * (1 + jnp.cos(jnp.pi * step / length))
