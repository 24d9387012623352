"""Stable-SPAM: adaptive clipping, adaptive norm, momentum reset; and its successor.

Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
<https://arxiv.org/abs/2502.17055>`_, 2025; from its third version on the paper is
`GradientStabilizer`, another transformation.

All statistics are vectors with one number per tensor, in the order of
``jax.tree.leaves``. If a tensor's gradient has no finite coordinate, its statistics do
not change.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _norms, _validate, functional


class AdaClipState(NamedTuple):
    """State of :func:`adaclip`: vectors with one entry per tensor, and counters.

    Attributes:
      adaclip_steps: Number of steps in the running mean.
      adaclip_mean: Running mean of the largest absolute value in the tensor.
      adaclip_clipped_count: Number of coordinates clipped in the last step.
      adaclip_clipped_total: The same, summed over all steps.
      adaclip_nonfinite_count: Number of NaN, infinite or overflowing coordinates in the
        last step.
      adaclip_nonfinite_total: The same, summed over all steps.
    """

    adaclip_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    adaclip_mean: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    adaclip_clipped_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    adaclip_clipped_total: jax.Array | None  # shape=(), dtype=jnp.int32.
    adaclip_nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    adaclip_nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


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


def adaclip(
    gamma3: jax.typing.ArrayLike = 0.999, *, count: bool = False
) -> optax.GradientTransformation:
    r"""Clips each tensor at the running mean of its largest coordinate.

    For each tensor, with :math:`k` the number of steps:

    .. math::
      G &= \max_i |g_i| \\
      M &\leftarrow \gamma_3 M + (1 - \gamma_3) G, \quad
        \hat M = M / (1 - \gamma_3^k) \\
      g_i &\leftarrow \hat M g_i / G \quad \text{where } |g_i| > \hat M

    The largest coordinate becomes :math:`\hat M`. All coordinates above
    :math:`\hat M` are scaled by the same factor. A coordinate just above :math:`\hat M`
    therefore ends up far below one just under :math:`\hat M`. This is as in the paper.
    Non-finite coordinates become 0.

    Args:
      gamma3: Decay of the running mean, in [0, 1).
      count: Whether the state counts coordinates; see :func:`spam_optax.spam`.

    Returns:
      The transformation. Its updates have the dtype of the gradients.

    Raises:
      ValueError: If an argument is out of range; by ``update``, if the number of
        tensors is not that of ``init``.
      TypeError: If an argument is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.adaclip(gamma3=0.9, count=True)
      >>> state = tx.init(jnp.zeros(3))
      >>> gradients, state = tx.update(jnp.array([1.0, -2.0, 0.5]), state)
      >>> gradients, state = tx.update(jnp.array([1.0, -200.0, 0.5]), state)
      >>> print(gradients.round(), optax.tree.get(state, "adaclip_clipped_count"))
      [   1. -106.    0.] 1

    References:
      Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055v2>`_, 2025,
      section 3: AdaClip.
    """
    gamma3 = _validate.check_decay("gamma3", gamma3)
    _validate.check_flags(count=count)

    def init_fn(params: optax.Params) -> AdaClipState:
        steps, mean = _init_statistics(params, 1)
        return AdaClipState(steps, mean, *_moments.init_counters(count, 4))

    def update_fn(
        updates: optax.Updates,
        state: AdaClipState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, AdaClipState]:
        del params
        gradients, structure = _flatten(updates, state.adaclip_steps)
        finite, bad, nonfinite = _screen(gradients)
        clipped, spikes, steps, mean = _adaclip(
            finite, bad, state.adaclip_steps, state.adaclip_mean, gamma3
        )
        totals = state.adaclip_clipped_total, state.adaclip_nonfinite_total
        return jax.tree.unflatten(structure, _cast(clipped, gradients)), AdaClipState(
            steps, mean, *_moments.add_counts([(spikes, nonfinite)], *totals)
        )

    return optax.GradientTransformation(init_fn, update_fn)


def adagn(
    gamma1: jax.typing.ArrayLike = 0.7,
    gamma2: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    total_steps: jax.typing.ArrayLike | None = None,
    count: bool = False,
) -> optax.GradientTransformation:
    r"""Rescales each tensor by the running mean and mean square of its norm.

    For each tensor, with :math:`k` the number of steps:

    .. math::
      n_1 &\leftarrow \gamma_1 n_1 + (1 - \gamma_1) \lVert g \rVert, \quad
        \hat n_1 = n_1 / (1 - \gamma_1^k) \\
      n_2 &\leftarrow \gamma_2 n_2 + (1 - \gamma_2) \lVert g \rVert^2, \quad
        \hat n_2 = n_2 / (1 - \gamma_2^k) \\
      g &\leftarrow \frac{g}{\lVert g \rVert}
        \cdot \frac{\hat n_1}{\sqrt{\hat n_2} + \varepsilon}

    The norm of the result is about 1, whatever the scale of the gradient. Non-finite
    coordinates become 0. A gradient of zeros stays zero.

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
      ValueError: If an argument is out of range; by ``update``, if the number of
        tensors is not that of ``init``.
      TypeError: If an argument is not a number.

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
    gamma1, gamma2, eps, total_steps = _check_norm(gamma1, gamma2, eps, total_steps)
    _validate.check_flags(count=count)

    def init_fn(params: optax.Params) -> AdaGNState:
        return AdaGNState(
            jnp.zeros([], jnp.int32),
            *_init_statistics(params, 2),
            *_moments.init_counters(count, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: AdaGNState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, AdaGNState]:
        del params
        gradients, structure = _flatten(updates, state.adagn_steps)
        finite, bad, nonfinite = _screen(gradients)
        step = optax.safe_increment(state.adagn_count)
        scaled, *statistics = _adagn(
            finite,
            bad,
            (state.adagn_steps, state.adagn_mean, state.adagn_square),
            gamma1 * _decay_scale(step, total_steps),
            gamma2,
            eps,
        )
        return jax.tree.unflatten(structure, _cast(scaled, gradients)), AdaGNState(
            step,
            *statistics,
            *_moments.add_counts([(nonfinite,)], state.adagn_nonfinite_total),
        )

    return optax.GradientTransformation(init_fn, update_fn)


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
      ValueError: If an argument is out of range; by ``update``, if the number of
        tensors is not that of ``init``.
      TypeError: If an argument is not a number.

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
    gamma1, gamma2, *_ = _check_norm(gamma1, gamma2)
    _validate.check_flags(count=count)

    def init_fn(params: optax.Params) -> GradientStabilizerState:
        _, mean, square = _init_statistics(params, 2)
        return GradientStabilizerState(mean, square, *_moments.init_counters(count, 2))

    def update_fn(
        updates: optax.Updates,
        state: GradientStabilizerState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, GradientStabilizerState]:
        del params
        gradients, structure = _flatten(updates, state.stabilizer_mean)
        finite, bad, nonfinite = _screen(gradients)
        norm, usable = _measure(finite, bad)
        mean = _average(state.stabilizer_mean, norm, gamma1, usable)
        square = _average(state.stabilizer_square, norm**2, gamma2, usable)
        wanted = mean / jnp.sqrt(_or_one(square))
        scaled = _rescale(finite, norm, wanted, square > 0)
        return (
            jax.tree.unflatten(structure, _cast(scaled, gradients)),
            GradientStabilizerState(
                mean,
                square,
                *_moments.add_counts([(nonfinite,)], state.stabilizer_nonfinite_total),
            ),
        )

    return optax.GradientTransformation(init_fn, update_fn)


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
    gamma1, gamma2, eps, total_steps = _check_norm(gamma1, gamma2, eps, total_steps)
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
            *_init_statistics(params, 1),
            *_init_statistics(params, 2),
            *_moments.init_counters(count, 4),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByStableSpamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleByStableSpamState]:
        _validate.check_same_tree(updates, state.mu)
        _validate.check_not_complex(updates, state.mu)
        step = optax.safe_increment(state.count)
        scale = _decay_scale(step, total_steps)
        structure = jax.tree.structure(state.mu)
        finite, bad, nonfinite = _screen(structure.flatten_up_to(updates))
        clipped, spikes, max_steps, max_mean = _adaclip(
            finite, bad, state.max_steps, state.max_mean, gamma3
        )
        scaled, norm_steps, norm_mean, norm_square = _adagn(
            clipped,
            bad,
            (state.norm_steps, state.norm_mean, state.norm_square),
            gamma1 * scale,
            gamma2,
            eps,
        )
        position = functional.reset_position(step, reset_interval)
        direction, mu, nu = _adam(
            jax.tree.unflatten(structure, scaled),
            state,
            (b1 * scale, b2, eps),
            position,
        )
        totals = state.clipped_total, state.nonfinite_total
        return _moments.cast_updates(
            direction, updates, params
        ), ScaleByStableSpamState(
            step,
            mu,
            nu,
            max_steps,
            max_mean,
            norm_steps,
            norm_mean,
            norm_square,
            *_moments.add_counts([(spikes, nonfinite)], *totals),
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

    Every gradient goes through :func:`adaclip` and then :func:`adagn`; in step
    :math:`t`, with the result :math:`g`, learning rate :math:`\alpha` and weight decay
    :math:`\lambda`:

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
      ValueError: If an argument is out of range; by ``update``, if the tree of updates
        is not that of the parameters, or weight decay is used without parameters.
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


# Shared helpers. Gradients are lists of tensors, with None for missing gradients.
# Statistics are vectors with one entry per tensor.


def _check_norm(
    gamma1: Any, gamma2: Any, eps: Any = 1.0, total_steps: Any = None
) -> tuple[Any, ...]:
    """Returns the arguments, checked, in the same order."""
    gamma1 = _validate.check_decay("gamma1", gamma1)
    gamma2 = _validate.check_decay("gamma2", gamma2)
    eps = _validate.check_number("eps", eps, above=0)
    if total_steps is not None:
        total_steps = _validate.check_steps("total_steps", total_steps, low=1)
    return gamma1, gamma2, eps, total_steps


def _init_statistics(params: optax.Params, n: int) -> tuple[jax.Array, ...]:
    """Returns zeros: a vector of step counts and `n` vectors of running means."""
    _norms.check_params(params)
    tensors = len(jax.tree.leaves(params))
    zeros = (jnp.zeros([tensors], jnp.float32) for _ in range(n))
    return jnp.zeros([tensors], jnp.int32), *zeros


def _flatten(
    updates: optax.Updates, statistic: jax.Array
) -> tuple[list[jax.Array | None], Any]:
    """Flattens the updates. Raises if their number differs from `statistic`'s."""
    _validate.check_tensors(updates, statistic.shape[0])
    _norms.check_updates(updates)
    return jax.tree.flatten(updates)


def _screen(
    gradients: list[jax.Array | None],
) -> tuple[list[jax.Array | None], jax.Array, jax.Array]:
    """Sets non-finite coordinates to 0.

    A coordinate is non-finite if its square overflows float32, the dtype of the
    statistics.

    Returns:
      The gradients in the compute dtype, the number of non-finite coordinates per
      tensor (1 for a missing gradient), and their number in all gradients.
    """
    finite, bad = _norms.screen(gradients)
    counts = _moments.map_leaves(lambda mask: _arithmetic.totals(mask)[0], bad)
    each = [jnp.ones([]) if count is None else count for count in counts]
    return (
        _moments.map_leaves(_arithmetic.widen, finite),
        _arithmetic.stack(each, jnp.int32),
        _moments.total(jax.tree.leaves(counts)),
    )


def _of_each(
    f: Callable[[jax.Array], jax.Array], tensors: list[jax.Array | None]
) -> jax.Array:
    """Applies `f` to each tensor and stacks the float32 results.

    A missing gradient gives 0.
    """
    numbers = [jnp.zeros([]) if x is None else f(x) for x in tensors]
    return _arithmetic.stack(numbers, jnp.float32)


def _adaclip(
    finite: list[jax.Array | None],
    bad: jax.Array,
    steps: jax.Array,
    mean: jax.Array,
    gamma3: jax.typing.ArrayLike,
) -> tuple[list[jax.Array | None], jax.Array, jax.Array, jax.Array]:
    """Returns the clipped gradients, how many were clipped, and new statistics."""
    largest = _of_each(lambda g: jnp.abs(g).max(initial=0), finite)
    usable = (bad == 0) | (largest > 0)
    steps = steps + usable.astype(jnp.int32)
    mean = _average(mean, largest, gamma3, usable)
    limit = _corrected(mean, gamma3, steps)
    clipped: list[jax.Array | None] = []
    counts: list[jax.Array] = []
    for i, g in enumerate(finite):
        if g is None:
            clipped.append(None)
            continue
        above = jnp.abs(g) > limit[i]
        factor = limit[i] / _or_one(largest[i])
        clipped.append(jnp.where(above, g * factor, g).astype(g.dtype))
        counts += _arithmetic.totals(above)
    return clipped, _moments.total(counts), steps, mean


def _adagn(
    finite: list[jax.Array | None],
    bad: jax.Array,
    statistics: tuple[jax.Array, jax.Array, jax.Array],
    gamma1: jax.typing.ArrayLike,
    gamma2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> tuple[list[jax.Array | None], jax.Array, jax.Array, jax.Array]:
    """Returns the rescaled gradients and the new statistics."""
    steps, mean, square = statistics
    norm, usable = _measure(finite, bad)
    steps = steps + usable.astype(jnp.int32)
    mean = _average(mean, norm, gamma1, usable)
    square = _average(square, norm**2, gamma2, usable)
    root = _arithmetic.root(_corrected(square, gamma2, steps)) + eps
    wanted = _corrected(mean, gamma1, steps) / root
    return _rescale(finite, norm, wanted, steps > 0), steps, mean, square


def _adam(
    gradients: optax.Updates,
    state: ScaleByStableSpamState,
    decays: tuple[Any, Any, Any],
    position: jax.Array,
) -> tuple[optax.Updates, optax.Updates, optax.Updates]:
    """Returns Adam's direction and the new moments."""
    b1, b2, eps = decays
    step = optax.safe_increment(state.count)
    since_reset = jnp.where(position < step, position + 1, step)
    mu, nu = state.mu, state.nu
    mu, nu = (_moments.zero_at_reset(x, position) for x in (mu, nu))
    mu = _moments.move_all(mu, gradients, b1, _arithmetic.widen)
    nu = _moments.move_all(nu, gradients, b2, _arithmetic.abs_sq)
    first = functional.bias_correction(b1, since_reset)
    second = functional.bias_correction(b2, since_reset)

    def direct(m: jax.Array, v: jax.Array) -> jax.Array:
        return (m / first / (_arithmetic.root(v / second) + eps)).astype(m.dtype)

    direction = _moments.map_leaves(direct, mu, nu)
    return (
        direction,
        _moments.cast_like(mu, state.mu),
        _moments.cast_like(nu, state.nu),
    )


def _decay_scale(step: jax.Array, total_steps: Any) -> jax.Array | float:
    """Returns the factor on `b1` and `gamma1` in this step."""
    if total_steps is None:
        return 1.0
    step = jnp.minimum(step, total_steps).astype(float)
    length = jnp.asarray(total_steps).astype(float) + 1.0
    return 0.5 + 0.25 * (1 + jnp.cos(jnp.pi * step / length))


def _measure(
    finite: list[jax.Array | None], bad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the norm of each tensor, and whether its statistics are updated.

    They are not updated if the gradient has non-finite coordinates and is 0 without
    them, or if the square of the norm overflows.
    """
    norm = _of_each(_arithmetic.norm, finite)
    return norm, ((bad == 0) | (norm > 0)) & jnp.isfinite(norm**2)


def _average(
    mean: jax.Array, value: jax.Array, decay: jax.typing.ArrayLike, usable: jax.Array
) -> jax.Array:
    """Updates the running mean where `usable`, and keeps it elsewhere."""
    return jnp.where(usable, _arithmetic.ema(mean, value, decay), mean)


def _corrected(
    mean: jax.Array, decay: jax.typing.ArrayLike, steps: jax.Array
) -> jax.Array:
    """Returns the bias-corrected running mean, which is 0 before the first step."""
    correction = functional.bias_correction(decay, jnp.maximum(steps, 1))
    return (mean / correction).astype(jnp.float32)


def _rescale(
    finite: list[jax.Array | None],
    norm: jax.Array,
    wanted: jax.Array,
    has_history: jax.Array,
) -> list[jax.Array | None]:
    """Rescales every tensor that has a history from its norm to `wanted`."""
    factor = jnp.where(has_history & (norm > 0), wanted / _or_one(norm), 1)
    return _norms.scale(finite, factor)


def _or_one(x: jax.Array) -> jax.Array:
    """Returns a safe divisor: `x`, or 1 where `x` is 0."""
    return jnp.where(x > 0, x, 1)


def _cast(tensors: list[Any], like: list[Any]) -> list[jax.Array]:
    dtypes = [jnp.asarray(x).dtype for x in like]
    return [_arithmetic.cast(x, to) for x, to in zip(tensors, dtypes, strict=True)]
