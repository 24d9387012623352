"""Keeps spike statistics of every tensor in the state of any transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _paths, _tensor_statistics, _validate


class TrackSpikesState(NamedTuple):
    """State of :func:`track_spikes`.

    The vectors have one entry per tensor, in the order of :func:`tensor_names`.

    Attributes:
      tensor_grad_norm: Norm of the gradient's finite coordinates in the last step.
      tensor_update_norm: Norm of the update in the last step.
      tensor_mean_norm: Running mean of the gradient norm, the last step included.
      tensor_spike_score: Gradient norm of the last step divided by the running mean
        before it. It is 0 without a history, and infinity for a non-finite gradient.
      tensor_spike_steps: Number of steps whose spike score exceeded the threshold.
      tensor_nonfinite: Number of non-finite gradient coordinates in the last step.
      tensor_steps: Number of steps in the running mean.
      inner_state: State of the inner transformation.
    """

    tensor_grad_norm: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    tensor_update_norm: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    tensor_mean_norm: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    tensor_spike_score: jax.Array  # shape=(tensors,), dtype=jnp.float32.
    tensor_spike_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    tensor_nonfinite: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    tensor_steps: jax.Array  # shape=(tensors,), dtype=jnp.int32.
    inner_state: optax.OptState


def track_spikes(
    inner: optax.GradientTransformation,
    *,
    threshold: jax.typing.ArrayLike = 10.0,
    decay: jax.typing.ArrayLike = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps a transformation and keeps spike statistics of every tensor in its state.

    The updates are the inner transformation's, unchanged. Per tensor, with the gradient
    norm :math:`n_t`, the spike score is the norm over its running mean

    .. math::
      s_t = n_t / \mu_{t-1}, \qquad
      \mu_t = \mu_{t-1} + \frac{\min(n_t, \theta \mu_{t-1}) - \mu_{t-1}}
        {\min(t, 1 / (1 - \beta))}

    with `threshold` :math:`\theta` and `decay` :math:`\beta`: the plain mean at first,
    an exponential moving average later. A spike enters the mean clipped at
    :math:`\theta \mu_{t-1}`. It therefore does not hide the next spike, but after a
    lasting rise of the norm the steps are not counted as spikes for ever. A non-finite
    gradient does not enter the mean, and :math:`t` counts only the steps in the mean.

    Read the statistics by name. :func:`tensor_names` returns the name of each index.
    The statistics are vectors and not trees, so they are not sharded like parameters.
    On TPU the norm of the update is a separate pass over memory. It costs at least half
    as much as :func:`spam_optax.spam`.

    Args:
      inner: The transformation to watch, for example ``spam(1e-3)``.
      threshold: Spike score above which a step counts in ``tensor_spike_steps``, > 1.
      decay: Decay of the running mean, in [0, 1).

    Returns:
      The wrapped transformation. It passes extra arguments on to `inner`, with the
      global norm of the gradient as ``grad_norm``, so that :func:`skip_spikes` inside
      need not measure it again. A ``grad_norm`` that ``update`` gets is kept.

    Raises:
      ValueError: If an argument is out of range; by ``update``, if the number of
        tensors is not that of ``init``.
      TypeError: If an argument, or the dtype of an update, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> tx = spam_optax.track_spikes(optax.sgd(0.1))
      >>> params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
      >>> state = tx.init(params)
      >>> gradients = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(gradients, state, params)
      >>> gradients["kernel"] *= 30
      >>> updates, state = tx.update(gradients, state, params)
      >>> score = optax.tree.get(state, "tensor_spike_score")
      >>> print(spam_optax.tensor_names(params)[score.argmax()], score.max())
      kernel 30.0

    .. seealso:: ``optax.monitor`` for other measurements.
    """
    threshold = _validate.check_number("threshold", threshold, above=1)
    decay = _validate.check_decay("decay", decay)
    _validate.check_transformation(inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> TrackSpikesState:
        tensors = len(jax.tree.leaves(params))
        floats = (jnp.zeros([tensors], jnp.float32) for _ in range(4))
        ints = (jnp.zeros([tensors], jnp.int32) for _ in range(3))
        return TrackSpikesState(*floats, *ints, inner.init(params))  # type: ignore[call-arg]

    def update_fn(
        updates: optax.Updates,
        state: TrackSpikesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackSpikesState]:
        _validate.check_state(state, TrackSpikesState)
        gradients, _ = _tensor_statistics.flatten(updates, state.tensor_steps)
        norm, nonfinite = _tensor_statistics.finite_norms(
            gradients, _arithmetic.is_nonfinite
        )
        # The norm of float64 gradients may overflow float32.
        valid = (nonfinite == 0) & jnp.isfinite(norm)
        if extra_args.get("grad_norm") is None:
            squares = jnp.where(valid, norm**2, jnp.inf)
            extra_args["grad_norm"] = jnp.sqrt(jnp.sum(squares))
        new_updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        mean = state.tensor_mean_norm
        score = jnp.where(mean > 0, norm / jnp.where(mean > 0, mean, 1), 0)
        score = jnp.where(valid, score, jnp.inf)
        # A zero gradient is not history: the first nonzero norm is the mean.
        has_history = valid & ((mean > 0) | (norm > 0))
        steps = state.tensor_steps + has_history.astype(jnp.int32)
        limited = jnp.where(mean > 0, jnp.minimum(norm, threshold * mean), norm)
        steps_so_far = jnp.maximum(steps, 1).astype(jnp.float32)
        rate = 1 / jnp.minimum(steps_so_far, 1 / (1 - decay))
        rate = jnp.where(mean > 0, rate, 1)
        new_mean = (mean + rate * (limited - mean)).astype(jnp.float32)
        return new_updates, TrackSpikesState(
            tensor_grad_norm=norm,
            tensor_update_norm=_update_norms(new_updates),
            tensor_mean_norm=jnp.where(valid, new_mean, mean),
            tensor_spike_score=score,
            tensor_spike_steps=state.tensor_spike_steps
            + (score > threshold).astype(jnp.int32),
            tensor_nonfinite=nonfinite,
            tensor_steps=steps,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _update_norms(updates: optax.Updates) -> jax.Array:
    """Returns one float32 norm per update, also if the squares overflow."""
    unit = 2.0**-96  # In this unit the largest float32 have finite squares.

    def squares(u: jax.Array) -> tuple[jax.Array, ...]:
        parts = _arithmetic.abs_sq(u), _arithmetic.abs_sq(_arithmetic.widen(u) * unit)
        return tuple(map(jnp.sum, parts))

    total, scaled = map(
        _arithmetic.root,
        _tensor_statistics.measure(
            squares, jax.tree.leaves(updates), missing=(0.0, 0.0)
        ),
    )
    norms = jnp.where(jnp.isfinite(total), total, scaled / unit)
    return norms.astype(jnp.float32)


def tensor_names(params: optax.Params) -> tuple[str, ...]:
    """Returns the names of the tensors, in the order of the statistics.

    Args:
      params: The tree of parameters that ``init`` was called with.

    Returns:
      The path of each tensor, its parts joined by ``/``. The ``value`` at the end of an
      NNX path is left out. All names are different.

    Raises:
      ValueError: If two tensors have the same name, as would those of
        ``{"a/b": x, "a": {"b": y}}``.

    Examples:
      >>> import spam_optax
      >>> spam_optax.tensor_names({"layer": {"kernel": 1.0, "bias": 0.0}})
      ('layer/bias', 'layer/kernel')
    """
    return _paths.names(params)
