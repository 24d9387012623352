"""Adam-mini: Adam with one second moment for each block of parameters.

Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
<https://arxiv.org/abs/2406.16793>`_, ICLR 2025.

The second moment of a parameter has its rank, and along each axis as many entries as
there are blocks: entry i of an axis stands for the i-th of that many equal parts.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _paths, _validate, functional

Partition = Callable[[optax.Params], Any]

_QUERIES = ("query", "q", "q_proj", "wq")
_KEYS = ("key", "k", "k_proj", "wk")
_VALUES = ("value", "v", "v_proj", "wv")
_OUTS = ("out", "o", "o_proj", "out_proj", "wo")
_FEED_FORWARDS = ("mlp", "ffn", "feed_forward")
_NEURONS = (
    *("wi", "fc", "c_fc", "c_proj", "fc_in", "fc_out", "linear_in"),
    *("gate", "up", "down", "gate_proj", "up_proj", "down_proj"),
)


class ScaleByAdamMiniState(NamedTuple):
    """State of :func:`scale_by_adam_mini`.

    Attributes:
      count: Steps taken.
      mu: First moment, shaped like the parameters.
      nu: Second moment, one value a block: shaped as `partition` said.
      dropped_count: Coordinates of the last gradient that were not finite.
      dropped_total: The same, of all steps.
    """

    count: jax.Array  # shape=(), dtype=jnp.int32.
    mu: optax.Updates
    nu: optax.Updates
    dropped_count: jax.Array  # shape=(), dtype=jnp.int32.
    dropped_total: jax.Array  # shape=(), dtype=jnp.int32.


def scale_by_adam_mini(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    partition: Partition | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescales by Adam with one second moment a block.

    :func:`adam_mini` without learning rate and weight decay; the formulas are there.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Term added to the root of the second moment, > 0.
      partition: Function from parameters to a tree of numbers of blocks, as
        :func:`adam_mini_partition` returns. None: ``adam_mini_partition()``.
      mu_dtype: Storage dtype of the first moment. None: float32, float64 for float64
        parameters.
      nu_dtype: Storage dtype of the second moment, with the range of float32. None: as
        for the first.

    Returns:
      The transformation. Its updates have the dtype of the parameters, or without
      these of the gradients.

    Raises:
      ValueError: If an argument is out of range; by ``init``, if the partition does not
        fit the parameters; by ``update``, if the tree of updates is not theirs.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.scale_by_adam_mini()
      >>> params = {"mlp": {"kernel": jnp.zeros((2, 3))}}
      >>> state = tx.init(params)
      >>> print(state.nu["mlp"]["kernel"].shape)
      (1, 3)
      >>> gradients = {"mlp": {"kernel": jnp.array([[2.0, 0.0, 3.0], [2.0, 0.0, 3.0]])}}
      >>> updates, _ = tx.update(gradients, state, params)
      >>> print(updates["mlp"]["kernel"].round(3))
      [[1. 0. 1.]
       [1. 0. 1.]]
    """
    function = "scale_by_adam_mini"
    b1 = _validate.check_decay(function, "b1", b1)
    b2 = _validate.check_decay(function, "b2", b2)
    eps = _validate.check_number(function, "eps", eps, above=0)
    mu_dtype = _validate.check_moment_dtype(function, "mu_dtype", mu_dtype)
    nu_dtype = _validate.check_moment_dtype(function, "nu_dtype", nu_dtype)
    if not (partition is None or callable(partition)):
        raise TypeError(
            f"{function}: partition must be None or a function from parameters to a "
            "tree of numbers of blocks"
            f"{_validate.instead_of_optax(partition)}, got {partition!r}."
        )
    partition = partition or adam_mini_partition()

    def init_fn(params: optax.Params) -> ScaleByAdamMiniState:
        jax.tree_util.tree_map_with_path(_check_real, params)
        return ScaleByAdamMiniState(
            jnp.zeros([], jnp.int32),
            _moments.init_mu(function, params, mu_dtype),
            _init_nu(params, partition, nu_dtype),
            *_moments.init_counters(True, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByAdamMiniState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleByAdamMiniState]:
        _validate.check_same_tree(function, updates, state.mu)
        _validate.check_not_complex(function, updates, state.mu)
        step = optax.safe_increment(state.count)
        gradients, bad = _moments.screen(updates, state.nu)
        mu = _moments.move_all(state.mu, gradients, b1, _arithmetic.widen)
        nu = _moments.map_moments(
            lambda v, g: _moments.move(v, _mean_square(g, v.shape), b2),
            state.nu,
            gradients,
        )
        mu, nu = _moments.hold(mu, state.mu, bad), _moments.hold(nu, state.nu, bad)
        corrections = [functional.bias_correction(b, step) for b in (b1, b2)]
        direction = _moments.map_leaves(
            lambda bad, m, v: _direction(bad, m, v, corrections, eps), bad, mu, nu
        )
        return _moments.cast_updates(direction, updates, params), ScaleByAdamMiniState(
            step,
            _moments.cast_like(mu, state.mu),
            _moments.cast_like(nu, state.nu),
            *_moments.count(bad, state.dropped_total),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def adam_mini(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    partition: Partition | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: _moments.Mask | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam-mini: Adam with one second moment a block, so with half its memory.

    In step :math:`t`, for each block with gradient :math:`g`, learning rate
    :math:`\alpha` and weight decay :math:`\lambda`:

    .. math::
      m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        \hat m = m / (1 - \beta_1^t) \\
      v &\leftarrow \beta_2 v + (1 - \beta_2) \, \mathrm{mean}(g^2), \quad
        \hat v = v / (1 - \beta_2^t) \\
      p &\leftarrow p - \alpha \left( \frac{\hat m}{\sqrt{\hat v} + \varepsilon}
        + \lambda p \right)

    where :math:`v` is one number for the whole block. A block should be as large as the
    part of the loss's Hessian that is dense. Which blocks there are is for `partition`
    to say; see :func:`adam_mini_partition` for the paper's choice.

    Coordinates that are not finite, or whose square overflows, become 0 first, and
    still count in the mean. A tensor without a finite coordinate keeps its moments, and
    they do not move it. Complex parameters are refused.

    On a mesh the mean over a block that is spread over devices is an all-reduce of
    one number a block. A second moment has the rank of its parameter but fewer entries,
    so a ``PartitionSpec`` of the parameter need not divide it.

    In place of ``optax.inject_hyperparams`` use :func:`spam_optax.inject_hyperparams`.

    Args:
      learning_rate: The learning rate, a number >= 0 or a schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Term added to the root of the second moment, > 0.
      partition: Function from parameters to a tree of numbers of blocks, as
        :func:`adam_mini_partition` returns. None: ``adam_mini_partition()``.
      weight_decay: Decoupled weight decay, >= 0, multiplied by the learning rate. 0
        adds nothing and needs no parameters.
      mask: What is decayed: a tree of booleans shaped like the parameters or a prefix
        of them, or a function from parameters to such a tree. None: everything.
      mu_dtype: Storage dtype of the first moment. None: float32, float64 for float64
        parameters.
      nu_dtype: Storage dtype of the second moment, with the range of float32. None: as
        for the first.

    Returns:
      The optimizer. Its updates have the dtype of the parameters, or of the gradients
      if `params` is not passed.

    Raises:
      ValueError: If an argument is out of range; by ``init``, if the partition does not
        fit the parameters; by ``update``, if the tree of updates is not theirs, or
        weight decay is asked for without parameters.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> partition = spam_optax.adam_mini_partition(num_heads=4)
      >>> tx = spam_optax.adam_mini(learning_rate=0.1, partition=partition)
      >>> params = {"query": {"kernel": jnp.ones((8, 16))}}
      >>> state = tx.init(params)
      >>> print(optax.tree.get(state, "nu")["query"]["kernel"].shape)
      (1, 4)
      >>> updates, state = tx.update(params, state, params)
      >>> print(f"{updates['query']['kernel'][0, 0]:.3f}")
      -0.100

    References:
      Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
      <https://arxiv.org/abs/2406.16793>`_, 2024.
    """
    return _moments.optimizer(
        "adam_mini",
        scale_by_adam_mini(
            b1, b2, eps, partition=partition, mu_dtype=mu_dtype, nu_dtype=nu_dtype
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def adam_mini_partition(
    num_heads: int | None = None, num_kv_heads: int | None = None
) -> Partition:
    """The blocks of a transformer, by the names and ranks of its parameters.

    A partition gives each parameter a tuple: along each of its axes, into how many
    equal parts it is cut. So it is the shape of the second moment too. Here, for
    kernels (in, out) as Flax has them, with any axes of stacked layers in front, every
    layer for itself:

    ==========================================  =======================  ===============
    parameter                                   one block for            tuple
    ==========================================  =======================  ===============
    kernel of queries or keys                   a head                   (1, heads)
    the same, shaped (in, heads, head width)    a head                   (1, heads, 1)
    kernel of values, attention output,         an output neuron         (1, out)
    feed-forward layer
    kernel of an untied head                    a token                  (1, vocabulary)
    embedding (vocabulary, width)               a token                  (vocabulary, 1)
    norm's scale, bias                          the whole (last) axis    (1,)
    ``alpha`` of a WeSaR layer                  a number                 ()
    anything else                               the whole                (1, ..., 1)
    ==========================================  =======================  ===============

    Whole parts of the path are compared, without regard to case, underscores and a
    number at their end: queries are ``query``, ``q``, ``q_proj`` or ``wq``, and so on.
    The rest of the tree tells kernels with an axis of heads from stacked ones.

    Args:
      num_heads: Heads of the queries. None: there must be no queries or keys.
      num_kv_heads: Heads of the keys and values. None: as many as of the queries.

    Returns:
      A function from parameters to a tree of tuples, for `partition`. Call it to see
      the blocks, or write another one in its place.

    Raises:
      ValueError: If a number of heads is not a whole number >= 1; by the function, if
        it does not divide a kernel's outputs, or is needed and None.
      TypeError: If it is not a Python number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> params = {
      ...     "embed": {"embedding": jnp.ones((50, 8))},
      ...     "attention": {"key": {"kernel": jnp.ones((12, 8, 8))}},  # 12 layers
      ...     "norm": {"scale": jnp.ones(8)},
      ... }
      >>> blocks = spam_optax.adam_mini_partition(num_heads=2)(params)
      >>> print(blocks["embed"], blocks["attention"], blocks["norm"])
      {'embedding': (50, 1)} {'key': {'kernel': (12, 1, 2)}} {'scale': (1,)}

    References:
      Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
      <https://arxiv.org/abs/2406.16793>`_, 2024, section 2.3.
    """
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if value is not None:
            _validate.check_static("adam_mini_partition", name, value)
            _validate.check_whole("adam_mini_partition", name, value, low=1)
    key_heads = num_heads if num_kv_heads is None else num_kv_heads
    heads = {"query": num_heads, "key": key_heads}

    def partition(params: optax.Params) -> Any:
        with_roles = [
            (_role(path, p), p)
            for path, p in jax.tree_util.tree_leaves_with_path(params)
        ]
        has_head_axis = any(
            role in ("query", "key") and p.ndim > 2 and p.shape[-2] == heads[role]
            for role, p in with_roles
        )
        return jax.tree_util.tree_map_with_path(
            lambda path, p: _blocks(path, p, heads, has_head_axis), params
        )

    return partition


def _role(path: tuple, p: Any) -> str | None:
    """What a parameter is for, as far as that decides its blocks."""
    is_nnx = isinstance(path[-1], jax.tree_util.GetAttrKey) if path else False
    if is_nnx and path[-1].name == "value":
        path = path[:-1]
    parts = _paths.part_names(path)
    for role, names, least_rank in (
        ("factor", _paths.FACTORS, 1),
        ("vector", _paths.NORMS, 1),
        ("embedding", _paths.EMBEDDINGS, 2),
        # First, for kernels of theirs may be called `out` or `key`, and have no heads.
        ("neurons", _FEED_FORWARDS, 2),
        ("query", _QUERIES, 2),
        ("key", _KEYS, 2),
        ("value", _VALUES, 2),
        ("out", _OUTS, 2),
        ("neurons", _NEURONS + _paths.HEADS, 2),
    ):
        if jnp.ndim(p) >= least_rank and parts & set(map(_paths.plain, names)):
            return role
    return None


def _blocks(
    path: tuple, p: Any, heads: dict[str, int | None], has_head_axis: bool
) -> tuple[int, ...]:
    """Into how many parts each axis is cut."""
    role, shape = _role(path, p), jnp.shape(p)
    if role is None:
        return (1,) * len(shape)
    if role == "factor":
        return shape
    if role in ("vector", "embedding"):
        return (*shape[:-1], 1)
    has_head_axis = has_head_axis and len(shape) > 2
    if role in ("query", "key"):
        parts = _checked_heads(path, shape, heads[role], has_head_axis)
        if has_head_axis:
            return (*shape[:-3], 1, parts, 1)
        return (*shape[:-2], 1, parts)
    if role == "value" and has_head_axis:
        return (*shape[:-3], 1, *shape[-2:])
    if role == "out" and has_head_axis:
        return (*shape[:-3], 1, 1, shape[-1])
    return (*shape[:-2], 1, shape[-1])


def _checked_heads(
    path: tuple, shape: tuple[int, ...], heads: int | None, has_head_axis: bool
) -> int:
    """The number of heads of a kernel; raises if it is not known or does not fit."""
    where = jax.tree_util.keystr(path)
    if heads is None:
        raise ValueError(
            "adam_mini_partition: num_heads must be a whole number >= 1 for the kernel "
            f"at {where}, got None; pass partition=adam_mini_partition(num_heads)."
        )
    outputs = shape[-2] if has_head_axis else shape[-1]
    if outputs % heads:
        raise ValueError(
            f"adam_mini_partition: the number of heads must divide the {outputs} "
            f"outputs of the kernel at {where}, got {heads}."
        )
    return int(heads)


def _check_real(path: tuple, p: Any) -> None:
    dtype = jnp.result_type(p)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"adam_mini: the parameter at {jax.tree_util.keystr(path) or 'the root'} "
            f"must have a floating dtype, got {dtype}."
        )


def _init_nu(params: optax.Params, partition: Partition, dtype: Any) -> optax.Updates:
    """Zeros, one a block, on the devices that the means of the blocks will be on."""
    leaves, structure = jax.tree.flatten(params)
    # Optax calls init on a tree without leaves too, which is not the partition's.
    blocks = structure.flatten_up_to(partition(params)) if leaves else []
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    nu = []
    for path, p, parts in zip(paths, leaves, blocks, strict=True):
        _check_blocks(path, jnp.shape(p), parts)
        zeros = jnp.zeros_like(p, dtype=dtype or _arithmetic.compute_dtype(p))
        nu.append(_mean_square(zeros, parts).astype(zeros.dtype))
    return structure.unflatten(nu)


def _check_blocks(path: tuple, shape: tuple[int, ...], blocks: Any) -> None:
    """Raises unless `blocks` are numbers that divide a parameter's axes."""
    fits = (
        isinstance(blocks, tuple)
        and len(blocks) == len(shape)
        and all(isinstance(n, numbers.Integral) and n >= 1 for n in blocks)
        and all(size % n == 0 for size, n in zip(shape, blocks, strict=True))
    )
    if not fits:
        raise ValueError(
            "adam_mini: partition must give the parameter at "
            f"{jax.tree_util.keystr(path) or 'the root'} a tuple of whole numbers "
            f"that divide its shape {shape}, got {blocks!r}."
        )


def _mean_square(g: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
    """The mean of ``g**2`` over each block."""
    # Divided before they are summed: the sum of the squares could overflow.
    squares = _arithmetic.abs_sq(g) / max(g.size // max(math.prod(blocks), 1), 1)
    for axis, (size, parts) in enumerate(zip(g.shape, blocks, strict=True)):
        if 1 < parts < size:
            shape = squares.shape
            cut = (*shape[:axis], parts, size // parts, *shape[axis + 1 :])
            squares = squares.reshape(cut).sum(axis + 1)
    whole = tuple(axis for axis, parts in enumerate(blocks) if parts == 1)
    return squares.sum(whole, keepdims=True)


def _spread(v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`v` repeated over the coordinates of each block that is cut from an axis.

    Along axes with one block, or one a coordinate, it broadcasts as it is.
    """
    for axis, (parts, size) in enumerate(zip(v.shape, shape, strict=True)):
        if 1 < parts < size:
            v = jnp.repeat(v, size // parts, axis=axis, total_repeat_length=size)
    return v


def _direction(bad, m, v, corrections, eps) -> jax.Array:
    """Adam's, 0 without a finite gradient."""
    first, second = corrections
    step = m / first / _spread(jnp.sqrt(v / second) + eps, m.shape)
    return jnp.where(jnp.all(bad), 0, step).astype(m.dtype)
