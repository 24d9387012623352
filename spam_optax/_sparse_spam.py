"""SPAM with momentum for a fraction of each matrix: the transformation.

:mod:`spam_optax._sparse_layout` describes which entries form a group.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import (
    _arithmetic,
    _moments,
    _paths,
    _schedule,
    _spam,
    _sparse_layout,
    _validate,
)

SparseParams = Any | Callable[[optax.Params], Any]


class ScaleBySparseSpamState(NamedTuple):
    """State of :func:`scale_by_sparse_spam`.

    Attributes:
      mask_seeds: Seed of the current masks, stored as `row_blocks` numbers whose sum is
        the seed. The length of the vector is the `row_blocks` of the state.
      inner_state: The state of SPAM on the entries with momentum.
    """

    mask_seeds: jax.Array  # shape=(row_blocks,), dtype=jnp.uint32.
    inner_state: _spam.ScaleBySpamState


def scale_by_sparse_spam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    density: float = 0.25,
    sparse_params: SparseParams | None = None,
    key: jax.Array | int = 0,
    row_blocks: int = 1,
    threshold: jax.typing.ArrayLike = 5000.0,
    grace_steps: jax.typing.ArrayLike = 20,
    clip_unseen: bool = False,
    count: bool = False,
    reset_interval: jax.typing.ArrayLike | None = 500,
    warmup_steps: jax.typing.ArrayLike = 150,
    restart_bias_correction: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescales by SPAM with momentum for a fraction of each matrix.

    This is :func:`sparse_spam` without learning rate and weight decay. See there for
    arguments and errors.

    Returns:
      The transformation. Its updates have the dtype of the parameters, or of the
      gradients if ``update`` gets no parameters. Entries without momentum get 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.scale_by_sparse_spam(density=0.5)
      >>> params = {"kernel": jnp.zeros((4, 2))}
      >>> updates, _ = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
      >>> print(updates["kernel"].sum().round(3))
      4.0
    """
    settings = _spam.SpamSettings(
        b1=b1,
        b2=b2,
        eps=eps,
        threshold=threshold,
        grace_steps=grace_steps,
        clip_unseen=clip_unseen,
        count=count,
        reset_interval=reset_interval,
        warmup_steps=warmup_steps,
        restart_bias_correction=restart_bias_correction,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    ).checked()
    masks = _MaskSettings(density, sparse_params, key, row_blocks).checked()

    def init_fn(params: optax.Params) -> ScaleBySparseSpamState:
        _paths.names(params)  # Raises if two are equal.
        inner_state = _spam.init_spam(_compact(params, masks), settings)
        return ScaleBySparseSpamState(masks.seeds(0), inner_state)

    def update_fn(
        updates: optax.Updates,
        state: ScaleBySparseSpamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleBySparseSpamState]:
        _validate.check_state(state, ScaleBySparseSpamState)
        _check_update(updates, state, params, masks)
        updates = _moments.map_leaves(jnp.asarray, updates)
        seeds = state.mask_seeds
        if settings.reset_interval is not None:
            step = optax.safe_increment(state.inner_state.count)
            is_reset = _schedule.reset_position(step, settings.reset_interval) == 0
            fresh = masks.seeds(step // settings.reset_interval)
            seeds = jnp.where(is_reset, fresh, seeds)
        old = state.inner_state
        unflatten = jax.tree.structure(old.mu).unflatten
        lanes = _select_for(old.mu, seeds, updates)

        def pick(
            g: jax.Array | None, nu: jax.Array, lanes: jax.Array | None
        ) -> tuple[jax.Array | None, jax.Array | None]:
            if g is None:
                return None, None
            g = _arithmetic.narrow_like(g, nu)
            if lanes is None:
                return g, _arithmetic.is_nonfinite(g)
            layout = _sparse_layout.of_moments(g.shape, nu.shape, masks.row_blocks)
            bad = _sparse_layout.count(layout, _arithmetic.is_nonfinite, g)
            return _sparse_layout.pick(layout, g, lanes), bad

        def place(
            direction: Any,
            mu: jax.Array,
            lanes: jax.Array | None,
            g: jax.Array | None,
        ) -> tuple[jax.Array | None]:
            if g is None or lanes is None:
                return (direction,)
            layout = _sparse_layout.of_moments(g.shape, mu.shape, masks.row_blocks)
            return (_sparse_layout.place(layout, direction, lanes),)

        picked, bad = _moments.map_tensors(pick, updates, old.nu, lanes, n=2)
        direction, new = _spam.spam_step(
            unflatten(picked), old, settings, unflatten(bad)
        )
        direction = _moments.cast_updates(direction, updates, params)
        (placed,) = _moments.map_tensors(place, direction, old.mu, lanes, updates, n=1)
        return unflatten(placed), ScaleBySparseSpamState(seeds, new)

    return optax.GradientTransformation(init_fn, update_fn)


def sparse_spam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    density: float = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    sparse_params: SparseParams | None = None,
    key: jax.Array | int = 0,
    row_blocks: int = 1,
    threshold: jax.typing.ArrayLike = 5000.0,
    grace_steps: jax.typing.ArrayLike = 20,
    clip_unseen: bool = False,
    count: bool = False,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: _moments.Mask | None = None,
    reset_interval: jax.typing.ArrayLike | None = 500,
    warmup_steps: jax.typing.ArrayLike = 150,
    restart_bias_correction: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SPAM with sparse momentum: moments for a fraction of each chosen matrix.

    It is for training with little memory. About ``1 / density`` evenly spaced entries
    of a column form a group. One entry of each group has momentum and is updated by
    :func:`spam_optax.spam`. The other entries do not change, bit for bit. At each
    momentum reset a new entry of each group is drawn. Parameters without sparse
    momentum are updated by :func:`spam_optax.spam`.

    With density :math:`\rho` the two moments of a matrix take :math:`8 \rho` bytes per
    float32 entry, where Adam's take 8. Random masks take no memory, because every step
    computes them from a few numbers in the state.

    :func:`momentum_mask` returns which entries have momentum now. The actual density
    may differ from `density`: a block of :math:`R` rows has
    :math:`n = \max(1, \mathrm{round}(\rho R))` rows of moments, and :math:`n` of 128 or
    more is rounded to a multiple of 8. A group has at most 4095 entries.
    :func:`momentum_density` returns the actual density. Within a group all entries are
    equally likely. If :math:`n` does not divide :math:`R`, some groups have one entry
    less, and each of their entries is drawn a little more often. Above a density of 1/2
    such a group has a single entry, which always has momentum.

    Statistics are in the state as in :func:`spam_optax.spam`. ``clipped_count`` counts
    only entries with momentum, because the others have no second moment.
    ``nonfinite_count`` counts all entries.

    Other arguments are those of :func:`spam_optax.spam`. A matrix with sparse momentum
    must be real.

    Args:
      density: Fraction of each chosen matrix that has momentum, in (0, 1]. It decides
        shapes, so it must be a Python number.
      sparse_params: Which parameters have sparse momentum: a tree of booleans like the
        parameters or a prefix of it, or a function from parameters to such a tree.
        None: :func:`matrices_only`. Parameters with fewer than 2 dimensions are always
        dense. Parameters with more are stacks of matrices along the leading axes, so
        the rows are axis -2. In MaxText's stacked kernels this is the axis of layers,
        and in Flax's attention kernels the axis of heads. A group then has entries of
        several layers or heads. The length of this axis limits the possible densities.
      key: PRNG key of the masks, or a number to make one from. The key is not stored in
        the state, so pass the same key when you resume a run.
      row_blocks: Number of blocks of rows in each matrix. Every group lies within one
        block. If rows are sharded, use a multiple of the number of shards, so that each
        group stays on one device. It decides the layout of the state, so do not change
        it during a run. The same key and `row_blocks` give the same masks on any number
        of devices. If it does not divide the number of rows, the greatest common
        divisor of both is used.
      weight_decay: As in :func:`spam_optax.spam`, but only for entries with momentum.
      reset_interval: Number of steps between momentum resets. It must be larger than
        `grace_steps`. None: no resets, and the masks do not change.

    Returns:
      The optimizer. Its updates have the dtype of the parameters, or of the gradients
      if ``update`` gets no parameters.

    Raises:
      ValueError: If an argument is out of range. ``init`` raises it if `sparse_params`
        is not a tree like the parameters, if two parameters have the same name, or if
        the rows of the moments cannot be sharded like those of the parameter.
        ``update`` raises it if the tree of updates is not that of the parameters, if
        the state has another layout of the masks, or if parameters are needed and not
        passed.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type, for
        example a traced `density` or a complex matrix with sparse momentum.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> f = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> tx = spam_optax.sparse_spam(learning_rate=0.1, density=0.25)
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"objective: {f(params):.2f}")
      objective: 30.48
      objective: 29.13
      objective: 27.94
      >>> moments = optax.tree.get(state, "mu")["kernel"]
      >>> print((params["kernel"] != 1).sum(), moments.shape)
      8 (2, 4)

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025, section 3: sparse momentum. In the
      paper the mask is drawn over the whole matrix, here within groups.

    .. seealso::
      :func:`spam_optax.spam`, :func:`matrices_only`, :func:`momentum_mask`,
      :func:`spam_optax.inject_hyperparams`
    """
    learning_rate, weight_decay = _moments.check_optimizer(learning_rate, weight_decay)
    scale = scale_by_sparse_spam(
        b1,
        b2,
        eps,
        density=density,
        sparse_params=sparse_params,
        key=key,
        row_blocks=row_blocks,
        threshold=threshold,
        grace_steps=grace_steps,
        clip_unseen=clip_unseen,
        count=count,
        reset_interval=reset_interval,
        warmup_steps=warmup_steps,
        restart_bias_correction=restart_bias_correction,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    decay = _moments.decay_weights(weight_decay, mask)
    return optax.chain(
        scale if decay is None else _decay_entries_with_momentum(scale, decay),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(_moments.cast_to_params),
    )


class _MaskSettings(NamedTuple):
    """The arguments of :func:`sparse_spam` that decide which entries have momentum."""

    density: float
    sparse_params: SparseParams | None
    key: jax.Array | int
    row_blocks: int

    def checked(self) -> "_MaskSettings":
        """Returns the settings with defaults filled in. Raises if one is invalid."""
        for name in ("density", "row_blocks"):
            _validate.check_static(name, getattr(self, name))
        _validate.check_number("density", self.density, above=0, at_most=1)
        _validate.check_whole(
            "row_blocks", self.row_blocks, low=1, high=_sparse_layout.MOST_BLOCKS
        )
        _validate.check_key(self.key)
        chosen = (
            _paths.matrices_only() if self.sparse_params is None else self.sparse_params
        )
        return self._replace(
            density=float(self.density),
            sparse_params=chosen,
            row_blocks=int(self.row_blocks),
        )

    def layout(self, shape: tuple[int, ...]) -> _sparse_layout.Layout:
        """Returns the layout of a matrix of this shape."""
        return _sparse_layout.at_density(shape, self.density, self.row_blocks)

    def seeds(self, window: jax.typing.ArrayLike) -> jax.Array:
        """Returns the seeds of the masks of a window, from one reset to the next."""
        key = jax.random.fold_in(_validate.make_key(self.key), window)
        return jax.random.bits(key, (self.row_blocks,), jnp.uint32)


def _decay_entries_with_momentum(
    scale: optax.GradientTransformation, decay: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adds weight decay, which has no state, to the entries with momentum.

    It computes the selection in the same way as `scale`, and compilers merge both
    computations.
    """
    caller = _validate.caller()

    def init_fn(params: optax.Params) -> ScaleBySparseSpamState:
        decay.init(params)  # This raises an error if its mask does not fit.
        return scale.init(params)

    def update_fn(
        updates: optax.Updates,
        state: ScaleBySparseSpamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleBySparseSpamState]:
        if params is None:
            raise ValueError(f"{caller}: weight_decay needs params, got None.")
        updates, state = scale.update(updates, state, params)
        # init gets the updates: some leaves of the parameters may not be arrays.
        decayed, _ = decay.update(updates, decay.init(updates), params)
        mu = state.inner_state.mu
        lanes = _select_for(mu, state.mask_seeds, updates)

        def keep(
            x: jax.Array | None, mu: jax.Array, lanes: jax.Array | None
        ) -> tuple[jax.Array | None]:
            if x is None or lanes is None:
                return (x,)
            layout = _sparse_layout.of_moments(x.shape, mu.shape, len(state.mask_seeds))
            return (jnp.where(_sparse_layout.mask(layout, lanes), x, 0),)

        (kept,) = _moments.map_tensors(keep, decayed, mu, lanes, n=1)
        return jax.tree.structure(mu).unflatten(kept), state

    return optax.GradientTransformation(init_fn, update_fn)


def select(
    seeds: jax.Array,
    names: Sequence[str],
    tensors: Sequence[Any],
    moments: Sequence[Any],
) -> list[jax.Array | None]:
    """Returns the selected members of the groups of each tensor.

    Args:
      seeds: The seeds in the state.
      names: The names of the tensors.
      tensors: Arrays shaped like the parameters, or None.
      moments: The moments, or nodes without a shape.

    Returns:
      One array per tensor. None for a tensor that is dense or missing.
    """
    layouts = [
        _sparse_layout.of_moments(jnp.shape(x), moment.shape, seeds.size)
        if x is not None and hasattr(moment, "shape") and moment.shape != jnp.shape(x)
        else None
        for x, moment in zip(tensors, moments, strict=True)
    ]
    seed = seeds.sum(dtype=jnp.uint32)  # A scalar, because the seeds may be sharded.
    # JAX traces the function once for each layout.
    random_lanes = jax.jit(_sparse_layout.random_lanes, static_argnums=0)
    return [
        random_lanes(layout, seed, salt, moment) if layout else None
        for layout, salt, moment in zip(
            layouts, _sparse_layout.salts(names), moments, strict=True
        )
    ]


def _select_for(mu: optax.Updates, seeds: jax.Array, updates: optax.Updates) -> Any:
    """Returns the selected members as a tree like the first moments."""
    structure = jax.tree.structure(mu)
    columns = map(structure.flatten_up_to, (updates, mu))
    return structure.unflatten(select(seeds, _paths.names(mu), *columns))


def _chosen(params: optax.Params, sparse_params: SparseParams) -> Any:
    """Returns a tree of booleans: which parameters have sparse momentum."""
    argument = f"{_validate.caller()}: sparse_params"
    tree = _validate.booleans(argument, sparse_params, params)
    return jax.tree.map(
        lambda is_sparse, part: jax.tree.map(lambda _: is_sparse, part), tree, params
    )


def _compact(params: optax.Params, masks: _MaskSettings) -> optax.Params:
    """Replaces parameters with sparse momentum by the shapes of their moments."""
    # `optax.tree.map_params` calls init with a placeholder that has no leaves.
    if not jax.tree.leaves(params):
        return params

    def compact(path: tuple[Any, ...], p: Any, is_sparse: bool) -> Any:
        if not is_sparse or jnp.ndim(p) < 2 or 0 in p.shape:
            return p
        where = _validate.place(path)
        if jnp.iscomplexobj(p):
            raise TypeError(
                f"{_validate.caller()}: the parameter at {where} must have a floating "
                f"dtype for sparse momentum, got {p.dtype}; leave it out of "
                "sparse_params."
            )
        layout = masks.layout(p.shape)
        if layout.moment_shape == p.shape:
            return p
        return _moments_like(where, p, layout)

    chosen = _chosen(params, masks.sparse_params)
    return jax.tree_util.tree_map_with_path(compact, params, chosen)


def _moments_like(
    where: str, p: jax.Array, layout: _sparse_layout.Layout
) -> jax.ShapeDtypeStruct:
    """Returns the shape of the moments, with the dtype and the sharding of `p`."""
    shape = layout.moment_shape
    sharding = getattr(p, "sharding", None)
    if isinstance(p, jax.core.Tracer):
        sharding = jax.typeof(p).sharding
    elif isinstance(p, jax.Array) and not p.committed:
        sharding = None
    if not isinstance(sharding, jax.NamedSharding) or sharding.mesh.empty:
        return jax.ShapeDtypeStruct(shape, p.dtype)
    # This is checked on explicit meshes only. On others XLA may move parts of groups
    # between devices.
    rows_of_a_device = jax.typeof(p).sharding.shard_shape(p.shape)[-2]
    try:
        sharding.shard_shape(shape)
        fits = rows_of_a_device % layout.rows == 0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{_validate.caller()}: row_blocks must be a multiple of the number of "
            "shards of the rows, because no group may be spread over devices; the "
            f"parameter at {where} has the shape {p.shape} in {layout.blocks} blocks "
            f"and the sharding {sharding.spec}."
        )
    return jax.ShapeDtypeStruct(shape, p.dtype, sharding=sharding)


def _check_update(
    updates: optax.Updates,
    state: ScaleBySparseSpamState,
    params: optax.Params | None,
    masks: _MaskSettings,
) -> None:
    """Raises unless the updates and the parameters fit the state and the settings."""
    mu = state.inner_state.mu
    _validate.check_same_structure(updates, mu)
    _validate.check_not_complex(updates, mu)
    _validate.check_params(params, updates)
    if params is not None:
        _validate.check_same_tree(updates, params)
    if state.mask_seeds.shape != (masks.row_blocks,):
        raise ValueError(
            f"{_validate.caller()}: row_blocks must be {state.mask_seeds.shape[0]}, "
            f"with which the state was made, got {masks.row_blocks}."
        )

    def check(path: tuple[Any, ...], g: Any, moment: Any) -> None:
        if g is None or jnp.shape(g) == moment.shape:
            return
        start = f"{_validate.caller()}: the update at {_validate.place(path)}"
        if moment.ndim < 2:
            raise ValueError(
                f"{start} must have the shape {moment.shape} of its parameter, got "
                f"{jnp.shape(g)}."
            )
        if jnp.ndim(g) < 2 or moment.shape != masks.layout(jnp.shape(g)).moment_shape:
            raise ValueError(
                f"{start} must have the shape of its parameter, got {jnp.shape(g)}, "
                f"whose moments cannot have the shape {moment.shape} with density "
                f"{masks.density} and row_blocks {masks.row_blocks}."
            )

    jax.tree_util.tree_map_with_path(check, updates, mu, is_leaf=lambda x: x is None)
