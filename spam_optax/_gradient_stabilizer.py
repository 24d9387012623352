"""GradientStabilizer: the successor of Stable-SPAM.

Huang et al., `GradientStabilizer <https://arxiv.org/abs/2502.17055>`_, 2026.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import (
    _adagn,
    _moments,
    _tensor_statistics,
    _validate,
)


class GradientStabilizerState(NamedTuple):
    """State of :func:`gradient_stabilizer`.

    It has vectors with one entry per tensor, and counters.

    Attributes:
      stabilizer_mean: Running mean of the norm, not bias corrected.
      stabilizer_square: Running mean of the squared norm, not bias corrected.
      stabilizer_nonfinite_count: Number of NaN, infinite or overflowing coordinates in
        the last step.
      stabilizer_nonfinite_total: The same, summed over all steps.
    """

    stabilizer_mean: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    stabilizer_square: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    stabilizer_nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    stabilizer_nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def gradient_stabilizer(
    gamma1: jax.typing.ArrayLike = 0.6,
    gamma2: jax.typing.ArrayLike = 0.999,
    *,
    count: bool = False,
) -> optax.GradientTransformation:
    r"""Rescales each tensor by the running mean and root mean square of its norm.

    The norm of each tensor becomes the ratio of the two:

    .. math::
      m &\leftarrow \gamma_1 m + (1 - \gamma_1) \lVert g \rVert \\
      v &\leftarrow \gamma_2 v + (1 - \gamma_2) \lVert g \rVert^2 \\
      g &\leftarrow \frac{g}{\lVert g \rVert} \cdot \frac{m}{\sqrt v}

    This is the successor of :func:`stable_spam`. It has no clip, no reset and no bias
    correction. Without bias correction the norm of the result starts at 12.6 (with the
    defaults) and falls towards 1 in the first thousand steps. Non-finite coordinates
    become 0. A gradient of zeros stays zero. Use it before any optimizer:
    ``optax.chain(gradient_stabilizer(), optax.adamw(1e-3))``.

    Args:
      gamma1: Decay of the running mean of the norm, in [0, 1).
      gamma2: Decay of the running mean of the squared norm, in [0, 1).
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
      >>> tx = spam_optax.gradient_stabilizer()
      >>> state = tx.init(jnp.zeros(2))
      >>> gradients, state = tx.update(jnp.array([3.0, 4.0]), state)
      >>> print(f"{gradients[0]:.2f} {gradients[1]:.2f}")
      7.59 10.12

    References:
      Huang et al., `GradientStabilizer <https://arxiv.org/abs/2502.17055>`_, 2026.
    """
    gamma1, gamma2, *_ = _adagn.check_arguments(gamma1, gamma2)
    _validate.check_flags(count=count)

    def init_fn(params: optax.Params) -> GradientStabilizerState:
        _, mean, square = _tensor_statistics.init(params, 2)
        return GradientStabilizerState(mean, square, *_moments.init_counters(count, 2))

    def update_fn(
        updates: optax.Updates,
        state: GradientStabilizerState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, GradientStabilizerState]:
        del params
        _validate.check_state(state, GradientStabilizerState)
        gradients, structure = _tensor_statistics.flatten(
            updates, state.stabilizer_mean
        )
        norm, nonfinite = _tensor_statistics.finite_norms(gradients)
        usable = _tensor_statistics.is_usable(norm, nonfinite)
        average = _tensor_statistics.average
        mean = average(state.stabilizer_mean, norm, gamma1, usable)
        square = average(state.stabilizer_square, norm**2, gamma2, usable)
        wanted = mean / jnp.sqrt(_tensor_statistics.or_one(square))
        factor = _tensor_statistics.rescale_factor(norm, wanted, square > 0)
        return (
            structure.unflatten(_adagn.rescale(gradients, factor)),
            GradientStabilizerState(
                mean,
                square,
                *_tensor_statistics.add_nonfinite(
                    gradients, nonfinite, state.stabilizer_nonfinite_total
                ),
            ),
        )

    return optax.GradientTransformation(init_fn, update_fn)
