"""Metrics of curves, gradients, embeddings and layers."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spam_optax import _arithmetic, _paths, _validate
from spam_optax.functional._arrays import read, read_static


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
    values = read("values", values, jnp.floating)
    chex.assert_rank(values, 1, custom_message="spike_score: values must be a vector")
    window = read_static("window", window, low=2)
    deviations = _validate.check_number("deviations", deviations, above=0)
    judged = values.shape[0] - window
    if judged < 1:
        raise ValueError(
            f"spike_score: window must be < the number of values "
            f"({values.shape[0]}), got {window}."
        )
    values = _arithmetic.widen(values)
    is_finite = jnp.abs(values) < jnp.finfo(values.dtype).max / 16

    def is_spike(start: jax.Array) -> jax.Array:
        history = jax.lax.dynamic_slice_in_dim(values, start, window)
        known = jax.lax.dynamic_slice_in_dim(is_finite, start, window)
        # Divided by the largest, because the variance of a norm of 1e25 overflows.
        largest = jnp.abs(history).max(
            where=known, initial=jnp.finfo(values.dtype).tiny
        )
        history = history / largest
        distance = jnp.abs(values[start + window] / largest - history.mean(where=known))
        far = distance >= deviations * history.std(where=known)
        return (far & (distance > 0)) | ~is_finite[start + window]

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
    leaves = zip(names, jax.tree.leaves(gradients), strict=True)
    tensors = {name: read(f"the gradient {name}", x) for name, x in leaves}
    parts = {part for name in tensors for part in name.split("/")}
    for name in stacked:
        if name not in parts:
            raise ValueError(
                f"{_validate.caller()}: stacked must have names of parts of the "
                f"tensors' paths, got {name!r}, which is in none."
            )

    def norms(name: str, gradient: jax.Array) -> jax.Array:
        if set(name.split("/")).isdisjoint(stacked):
            return _arithmetic.norm(gradient)
        chex.assert_axis_dimension_gt(
            gradient,
            layer_axis,
            0,
            custom_message=f"layer_gradient_norms: the gradient {name} must have "
            "a layer along layer_axis",
        )
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
    embedding = read("embedding", embedding, jnp.floating)
    chex.assert_rank(
        embedding,
        2,
        custom_message="token_embedding_variability: embedding must be a matrix",
    )
    chex.assert_axis_dimension_gt(
        embedding,
        1,
        0,
        custom_message="token_embedding_variability: embedding must have columns",
    )
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
        _validate.check_number(name, value, above=0, many=True)
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
    width = _validate.check_number("width", width, above=0, many=True)
    std_out = _validate.check_number("std_out", std_out, above=0, many=True)
    residual_std = _validate.check_number(
        "residual_std", residual_std, above=0, many=True
    )
    attention_norm = _validate.check_number(
        "attention_norm", attention_norm, many=True, at_least=0
    )
    return 1 + std_out / residual_std * 2 * jnp.sqrt(width) * attention_norm  # type: ignore[return-value]


def jacobian_norm(
    f: Callable[[Any], Any], x: Any, *, iterations: jax.typing.ArrayLike = 100
) -> jax.Array:
    r"""Returns the spectral norm of the Jacobian of a function.

    .. math::
      \|J\|_2 = \max_{\|v\|_2 = 1} \|J v\|_2, \qquad
      J = \frac{\partial f(x)}{\partial x}

    It is found by power iteration on :math:`J^\top J`. An iteration costs one product
    with :math:`J` and one with :math:`J^\top`, and :math:`J` is never stored. The first
    :math:`v` has fixed pseudo-random normal numbers, so results are reproducible.

    The result is never above the norm but for rounding, and approaches it from below.
    It approaches the norm slowly if other singular values are almost as large.

    Args:
      f: A function of `x` that JAX can differentiate forward. It returns a floating
        array or a tree of them, of any shapes.
      x: A floating array or a tree of them. All arrays together are one vector. They
        are passed to `f` as float32, or float64 if one of them is 64-bit.
      iterations: Number of iterations, 1 or more.

    Returns:
      The norm: a scalar of the dtype that is passed to `f`, in units of `f` per unit of
      `x`. It is 0 for a Jacobian of zeros, and not finite if an entry of the Jacobian
      is not.

    Raises:
      AssertionError: If an array in `x` or in the result of `f` is not floating.
      ValueError: If `iterations` is not a whole number >= 1.
      TypeError: If `f` is not a function, or a leaf of a tree is not an array.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from spam_optax import functional
      >>> matrix = jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
      >>> print(functional.jacobian_norm(lambda x: matrix @ x, jnp.ones(3)))
      4.0
      >>> stretch = jax.vmap(lambda x: functional.jacobian_norm(jnp.square, x))
      >>> print(stretch(jnp.array([[1.0, 2.0], [5.0, 0.0]])))
      [ 4. 10.]

    .. seealso:: :func:`ffn_jacobian_bound` and :func:`attention_jacobian_bound` for
      bounds on it at initialization.
    """
    if not callable(f):
        raise TypeError(
            f"jacobian_norm: f must be a function, got {_validate.shown(f)}."
        )
    iterations = _validate.check_steps("iterations", iterations, low=1)
    x = jax.tree.map(lambda leaf: read("x", leaf, jnp.floating), x)
    dtype = functools.reduce(
        _arithmetic.promote_types,
        map(_arithmetic.compute_dtype, jax.tree.leaves(x)),
        np.dtype(jnp.float32),
    )

    def cast(tree: Any, name: str) -> Any:
        return jax.tree.map(
            lambda leaf: read(name, leaf, jnp.floating).astype(dtype), tree
        )

    x = cast(x, "x")
    _, push = jax.linearize(lambda x: cast(f(x), "the result of f"), x)
    pull = jax.linear_transpose(push, x)

    def iterate(_: Any, v: Any) -> Any:
        along, _ = _direction(push(v), dtype)
        (back,) = pull(along)
        return _direction(back, dtype)[0]

    start = optax.tree.random_like(jax.random.key(0), x)
    v = jax.lax.fori_loop(0, iterations, iterate, _direction(start, dtype)[0])
    return _direction(push(v), dtype)[1]


def _direction(tree: Any, dtype: Any) -> tuple[Any, jax.Array]:
    """Divides a tree by its norm and returns both. A tree of zeros stays as it is.

    It is first divided by its largest entry, so that no square over- or underflows.
    """
    sizes = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
    largest = functools.reduce(jnp.maximum, sizes, jnp.zeros([], dtype))
    divisor = jnp.where(largest == 0, 1, largest)
    tree = jax.tree.map(lambda x: x / divisor, tree)
    squares = [jnp.sum(x * x) for x in jax.tree.leaves(tree)]
    norm = _arithmetic.root(sum(squares, start=jnp.zeros([], dtype)))
    length = jnp.where(norm == 0, 1, norm)
    return jax.tree.map(lambda x: x / length, tree), largest * norm
