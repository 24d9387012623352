"""Adam-mini: Adam with one second moment for each block of parameters.

Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
<https://arxiv.org/abs/2406.16793>`_, ICLR 2025.

A second moment has the rank of its parameter, and along each axis one entry per block.
Each axis is cut into blocks of equal size.
"""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _paths, _validate
from spam_optax._adam_mini_partition import Partition, adam_mini_partition


class ScaleByAdamMiniState(NamedTuple):
    """State of :func:`scale_by_adam_mini`.

    Attributes:
      count: Number of steps taken.
      mu: First moments, shaped like the parameters.
      nu: Second moments, one per block. `partition` gives their shape.
      nonfinite_count: Number of NaN, infinite or overflowing coordinates in the last
        step.
      nonfinite_total: The same, summed over all steps.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32.
    mu: optax.Updates
    nu: optax.Updates
    nonfinite_count: jax.Array | None  # shape=(), dtype=jnp.int32.
    nonfinite_total: jax.Array | None  # shape=(), dtype=jnp.int32.


def scale_by_adam_mini(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    partition: Partition | None = None,
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescales by Adam with one second moment per block.

    This is :func:`adam_mini` without learning rate and weight decay. See there for
    formulas and arguments.

    Returns:
      The transformation. Its updates have the dtype of the parameters, or of the
      gradients if ``update`` gets no parameters.

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
    b1 = _validate.check_decay("b1", b1)
    b2 = _validate.check_decay("b2", b2)
    eps = _validate.check_number("eps", eps, above=0)
    _validate.check_flags(count=count)
    mu_dtype = _validate.check_moment_dtype("mu_dtype", mu_dtype)
    nu_dtype = _validate.check_moment_dtype("nu_dtype", nu_dtype)
    if not (partition is None or callable(partition)):
        raise TypeError(
            f"{_validate.caller()}: "
            "partition must be None or a function from parameters to a "
            "tree of numbers of blocks"
            f"{_validate.instead_of_optax(partition)}, got {partition!r}."
        )
    partition = partition or adam_mini_partition()

    def init_fn(params: optax.Params) -> ScaleByAdamMiniState:
        jax.tree_util.tree_map_with_path(_check_real, params)
        return ScaleByAdamMiniState(
            jnp.zeros([], jnp.int32),
            _moments.init_mu(params, mu_dtype),
            _init_nu(params, partition, nu_dtype),
            *_moments.init_counters(count, 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByAdamMiniState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleByAdamMiniState]:
        _validate.check_state(state, ScaleByAdamMiniState)
        _validate.check_same_tree(updates, state.mu)
        _validate.check_not_complex(updates, state.mu)
        step = optax.safe_increment(state.count)
        rates = _moments.adam_rates(b1, b2, eps, step)

        def step_tensor(
            g: jax.Array | None, mu: jax.Array, nu: jax.Array
        ) -> tuple[Any, ...]:
            if g is None:
                return None, mu, nu, ()
            g = _arithmetic.narrow_like(g, nu)
            bad = _arithmetic.is_nonfinite(g)
            counts = _arithmetic.totals(bad) if count else ()
            g = jnp.where(bad, jnp.zeros_like(g), g)
            new_nu = _arithmetic.ema(nu, _mean_square(g, nu.shape), b2)
            moved = _moments.adam_step(
                g,
                *(mu, nu, new_nu, rates),
                is_held=jnp.all(bad),
                spread=lambda v: _spread(v, like=mu),
            )
            return *moved, counts

        # The state's second moments have no boxes. They get the structure of `mu`.
        old_nu = jax.tree.structure(state.mu).unflatten(jax.tree.leaves(state.nu))
        direction, mu, nu, counts = _moments.map_tensors(
            step_tensor, updates, state.mu, old_nu, n=4
        )
        unflatten = jax.tree.structure(state.mu).unflatten
        return (
            _moments.cast_updates(unflatten(direction), updates, params),
            ScaleByAdamMiniState(
                step,
                unflatten(mu),
                jax.tree.structure(state.nu).unflatten(nu),
                *_moments.add_counts(counts, state.nonfinite_total),
            ),
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
    count: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam-mini: Adam with one second moment per block, in half of Adam's memory.

    In step :math:`t`, for each block with gradient :math:`g`, learning rate
    :math:`\alpha` and weight decay :math:`\lambda`:

    .. math::
      m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        \hat m = m / (1 - \beta_1^t) \\
      v &\leftarrow \beta_2 v + (1 - \beta_2) \, \mathrm{mean}(g^2), \quad
        \hat v = v / (1 - \beta_2^t) \\
      p &\leftarrow p - \alpha \left( \frac{\hat m}{\sqrt{\hat v} + \varepsilon}
        + \lambda p \right)

    where :math:`v` is one number for the whole block. A block should be a part of the
    parameter with a dense Hessian, such as one head. `partition` defines the blocks.
    See :func:`adam_mini_partition` for the blocks of the paper.

    Coordinates that are not finite, or whose square overflows, become 0 first and are
    included in the mean. If a tensor has no finite coordinate, its moments do not
    change and its update is 0, apart from weight decay. Complex parameters raise a
    TypeError.

    On a mesh the mean over a block on several devices needs an all-reduce. For heads
    this is one number per output. A second moment has the rank of its parameter but
    fewer entries. It therefore keeps the parameter's sharding only along axes with one
    block per entry. Along the others every device has all of it.

    Other arguments are those of :func:`spam`.

    Args:
      eps: Term added to the root of the second moment, > 0.
      partition: Function from parameters to a tree of tuples. Each tuple has the number
        of blocks along each axis. None: ``adam_mini_partition()``.

    Returns:
      The optimizer. Its updates have the dtype of the parameters, or of the gradients
      if ``update`` gets no parameters.

    Raises:
      ValueError: If an argument is out of range. ``init`` raises it if the partition
        does not fit the parameters. ``update`` raises it if the tree of updates is not
        that of the parameters, or if weight decay has no parameters.
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

    .. seealso:: :func:`inject_hyperparams` in place of ``optax.inject_hyperparams``.
    """
    return _moments.optimizer(
        scale_by_adam_mini(
            b1,
            b2,
            eps,
            partition=partition,
            count=count,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def _check_real(path: tuple[Any, ...], p: Any) -> None:
    """Raises unless a parameter has a floating dtype."""
    _validate.check_inexact(path, p)
    if jnp.iscomplexobj(p):
        raise TypeError(
            f"{_validate.caller()}: the parameter at {_validate.place(path)} must have "
            f"a floating dtype, got {jnp.result_type(p)}."
        )


def _init_nu(params: optax.Params, partition: Partition, dtype: Any) -> optax.Updates:
    """Returns one zero per block, with the sharding of the block means.

    They are not in Flax's boxes, because a box describes the axes of the parameter and
    not those of the blocks.
    """
    leaves, structure = jax.tree.flatten(params)
    # Optax also calls init with a tree without leaves, which has no partition.
    blocks = structure.flatten_up_to(partition(params)) if leaves else []
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    nu = []
    for path, p, parts in zip(paths, leaves, blocks, strict=True):
        _check_blocks(path, jnp.shape(p), parts)
        zeros = jnp.zeros_like(p, dtype=dtype or _arithmetic.compute_dtype(p))
        nu.append(_mean_square(zeros, parts).astype(zeros.dtype))
    return jax.tree.unflatten(jax.tree.structure(_paths.unboxed(params)), nu)


def _check_blocks(path: tuple[Any, ...], shape: tuple[int, ...], blocks: Any) -> None:
    """Raises unless `blocks` are numbers that divide a parameter's axes."""
    fits = (
        isinstance(blocks, tuple)
        and len(blocks) == len(shape)
        and all(isinstance(n, numbers.Integral) and int(n) >= 1 for n in blocks)
        and all(size % n == 0 for size, n in zip(shape, blocks, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{_validate.caller()}: partition must give the parameter at "
            f"{_validate.place(path)} a tuple of whole numbers "
            f"that divide its shape {shape}, got {blocks!r}."
        )


def _mean_square(g: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
    """Returns the mean of ``g**2`` over each block."""
    # Divided before the sum, because the sum of the squares could overflow.
    squares = _arithmetic.abs_sq(g) / max(g.size // max(math.prod(blocks), 1), 1)
    whole = tuple(axis for axis, parts in enumerate(blocks) if parts == 1)
    squares = squares.sum(whole, keepdims=True)
    for axis, (size, parts) in enumerate(zip(g.shape, blocks, strict=True)):
        if 1 < parts < size:
            # A block may be spread over devices. At this point only few numbers must be
            # gathered.
            squares = _reshard(squares, axis, None)
            shape = squares.shape
            cut = (*shape[:axis], parts, size // parts, *shape[axis + 1 :])
            squares = squares.reshape(cut).sum(axis + 1)
    return squares


def _spread(v: jax.Array, like: jax.Array) -> jax.Array:
    """Repeats `v` over the coordinates of each block.

    Axes with one block, or with one block per coordinate, are left to broadcasting.
    """
    for axis, (parts, size) in enumerate(zip(v.shape, like.shape, strict=True)):
        if 1 < parts < size:
            v = jnp.repeat(
                _reshard(v, axis, None),
                size // parts,
                axis=axis,
                total_repeat_length=size,
                out_sharding=_sharding(v, axis, jax.typeof(like).sharding.spec[axis]),
            )
    return v


def _sharding(x: jax.Array, axis: int, names: Any) -> jax.NamedSharding | None:
    """Returns `x`'s sharding with `names` along `axis`, or None without a mesh."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return None
    spec = [*sharding.spec]
    spec[axis] = names
    return jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def _reshard(x: jax.Array, axis: int, names: Any) -> jax.Array:
    """Shards `x` by `names` along `axis`, if the mesh is explicit."""
    if jax.typeof(x).sharding.spec[axis] == names:
        return x
    return jax.sharding.reshard(x, _sharding(x, axis, names))
