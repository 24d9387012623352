r"""SPAM with momentum for a fraction of each matrix.

The layout. A matrix of `rows` rows is cut into `row_blocks` blocks of rows, and a block
of :math:`R` rows into slabs of :math:`n = \mathrm{round}(\rho R)` rows, for the density
:math:`\rho`; the last slab may be shorter. Row :math:`r` of a block's moments stands
for rows :math:`r, n + r, 2n + r, \dots` of the block. In each column these entries form
a group. One of them, the selected member or *lane*, has momentum. Gathering gradients
and placing updates are therefore elementwise operations over the slabs, without
indices. On a mesh every group can stay on one device.
"""

import functools
import math
import zlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spam_optax import (
    _arithmetic,
    _moments,
    _paths,
    _spam,
    _validate,
    functional,
)

SparseParams = Any | Callable[[optax.Params], Any]

_SELECTIONS = ("random", "max_gradient", "max_weight")
_MOST_LANES = 2**16 - 1
_MOST_BLOCKS = 2**16
_MOST_SLICES = 32
_TILE = 8  # Rows of a tile of TPU memory.


class ScaleBySparseSpamState(NamedTuple):
    """State of :func:`scale_by_sparse_spam`.

    Attributes:
      mask_seeds: Seed of the current random masks, stored as `row_blocks` numbers whose
        sum is the seed. Their number shows which `row_blocks` the state was made with.
      mask_lanes: The selected members, shaped like the moments, if `selection` depends
        on size; None for dense parameters. With random selection the whole field is
        None, because the selection is computed from `mask_seeds` in every step.
      inner_state: The state of SPAM on the entries with momentum.
    """

    mask_seeds: jax.Array  # shape=(row_blocks,), dtype=jnp.uint32.
    mask_lanes: Any
    inner_state: _spam.ScaleBySpamState


def scale_by_sparse_spam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    density: float = 0.25,
    sparse_params: SparseParams | None = None,
    key: jax.Array | int = 0,
    selection: str = "random",
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
    formulas, arguments and errors.

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
    return _scale_and_decay(
        _spam.SpamSettings(
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
        ),
        _MaskSettings(density, sparse_params, key, selection, row_blocks),
    )


def sparse_spam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    density: float = 0.25,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    sparse_params: SparseParams | None = None,
    key: jax.Array | int = 0,
    selection: str = "random",
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
    more is rounded to a multiple of 8. :func:`momentum_density` returns the actual
    density. Within a group all entries are equally likely. If :math:`n` does not divide
    :math:`R`, some groups have one entry less, and each of their entries is drawn a
    little more often. Above a density of 1/2 such a group has a single entry, which
    always has momentum.

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
      selection: Which entry of a group gets momentum at a reset. ``"random"``: a random
        entry. ``"max_gradient"``, ``"max_weight"``: the entry with the largest gradient
        or parameter. These two also select in the first step. They store the selection
        in one byte per group, or two if groups have more than 256 entries. Random
        selection was best in Huang et al.
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
        is not a tree like the parameters, or if the rows of the moments cannot be
        sharded like those of the parameter. ``update`` raises it if the tree of updates
        is not that of the parameters, if the state has another layout of the masks, or
        if parameters are needed and not passed.
      TypeError: If an argument, or the dtype of a parameter, is of the wrong type.
        Examples are a traced `density` and a complex matrix with sparse momentum.

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
    return optax.chain(
        _scale_and_decay(
            _spam.SpamSettings(
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
            ),
            _MaskSettings(density, sparse_params, key, selection, row_blocks),
            _moments.decay_weights(weight_decay, mask),
        ),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(_moments.cast_to_params),
    )


def matrices_only(
    exclude: Collection[str] = _paths.DENSE,
) -> Callable[[optax.Params], Any]:
    """Chooses the matrices of attention and feed-forward layers for sparse momentum.

    A parameter is chosen if it has 2 dimensions or more and no part of its path has an
    excluded name. A part is compared by its words, which underscores, capitals and
    numbers separate: ``norm`` excludes ``attention_norm/weight`` and
    ``LayerNorm_0/scale``, ``head`` excludes ``lm_head/kernel``. A name may have several
    words, as ``embed_out`` has. Some names count only in certain places:

    - A ``head`` inside attention is not a model's head and is not excluded
      (``MultiHeadAttention_0``, ``kv_head``).
    - ``output`` outside layers and attention is a ``head``, as in Meta's LLaMA, and
      ``proj_out``.
    - ``norm``, ``bias`` and other names of vectors are recognized only in the last two
      parts of a path. Above a ``kernel`` only norms are recognized:
      ``PreNorm_0/Dense_0/kernel`` is chosen, and so is ``scale/kernel``.

    :func:`spam_optax.describe_tensors` lists the chosen parameters.

    Args:
      exclude: The excluded names. The default contains the names of embeddings and
        heads, and of biases, norms and WeSaR's factors, which have 2 dimensions in
        stacked layers.

    Returns:
      A function from parameters to a tree of booleans, for `sparse_params`.

    Raises:
      TypeError: If `exclude` is not a collection of strings.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> params = {"embed": jnp.ones((4, 2)), "mlp": {"kernel": jnp.ones((2, 2))}}
      >>> print(spam_optax.matrices_only()(params))
      {'embed': False, 'mlp': {'kernel': True}}
    """
    _validate.check_names("exclude", exclude)

    def is_matrix(leaf: _paths.Leaf) -> bool:
        return jnp.ndim(leaf.value) >= 2 and not _paths.has_name(leaf.path, exclude)

    return functools.partial(_paths.map_leaves, is_matrix)


def momentum_mask(opt_state: optax.OptState, params: optax.Params) -> Any:
    """Returns which entries of the parameters have momentum now.

    Args:
      opt_state: A state of :func:`sparse_spam`, or one that contains such a state, for
        example that of a chain or a wrapper.
      params: The parameters, or arrays shaped like them.

    Returns:
      A tree like `params` of boolean arrays, shaped like the parameters. Dense
      parameters are all true. Parameters of another optimizer are all false. With
      ``"max_gradient"`` and ``"max_weight"`` the selection is made in the first step;
      before it the mask marks the first entry of each group.

    Raises:
      ValueError: If there is no state of :func:`sparse_spam` in `opt_state`, or if it
        does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.sparse_spam(density=0.25)
      >>> params = {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}
      >>> mask = spam_optax.momentum_mask(tx.init(params), params)
      >>> print(mask["kernel"].sum(), mask["bias"].sum())
      12 6
    """
    masks = []
    for state in _sparse_states(opt_state):
        mu = _moments_for(state, params)
        lanes = state.mask_lanes
        if lanes is not None:
            lanes = spread_absent(lanes, params)
        groups = _groups(state.mask_seeds, lanes, mu, params)
        masks.append(jax.tree.map(lambda _, group: group.mask, params, groups))
    return functools.reduce(functools.partial(jax.tree.map, jnp.logical_or), masks)


def momentum_density(opt_state: optax.OptState, params: optax.Params) -> Any:
    """Returns the fraction of each parameter that has momentum.

    :func:`spam_optax.describe_tensors` shows it with names and roles.

    Args:
      opt_state: A state of :func:`sparse_spam`, or one that contains such a state.
      params: The parameters, or arrays shaped like them.

    Returns:
      A tree like `params` of Python numbers: the actual density of a matrix with sparse
      momentum, 1 for a dense parameter, 0 for a parameter of another optimizer.

    Raises:
      ValueError: As for :func:`momentum_mask`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.sparse_spam(density=0.25)
      >>> params = {"kernel": jnp.zeros((10, 6)), "bias": jnp.zeros(6)}
      >>> spam_optax.momentum_density(tx.init(params), params)
      {'bias': 1.0, 'kernel': 0.2}
    """

    def density(p, moment):
        if not hasattr(moment, "shape"):
            return 0.0
        return 1.0 if p.shape == moment.shape else moment.shape[-2] / p.shape[-2]

    densities = []
    for state in _sparse_states(opt_state):
        mu = _moments_for(state, params)
        densities.append(jax.tree.map(density, params, mu))
    return functools.reduce(functools.partial(jax.tree.map, max), densities)


class _MaskSettings(NamedTuple):
    """The arguments of :func:`sparse_spam` that decide which entries have momentum."""

    density: float
    sparse_params: SparseParams | None
    key: jax.Array | int
    selection: str
    row_blocks: int

    def checked(self) -> "_MaskSettings":
        """Returns the settings with defaults filled in. Raises if one is invalid."""
        for name in ("density", "row_blocks"):
            _validate.check_static(name, getattr(self, name))
        _validate.check_number("density", self.density, above=0, at_most=1)
        _validate.check_whole("row_blocks", self.row_blocks, low=1, high=_MOST_BLOCKS)
        _validate.check_choice("selection", self.selection, _SELECTIONS)
        _validate.check_key(self.key)
        chosen = matrices_only() if self.sparse_params is None else self.sparse_params
        return self._replace(
            density=float(self.density),
            sparse_params=chosen,
            row_blocks=int(self.row_blocks),
        )

    def layout(self, shape: tuple[int, ...]) -> "_Layout":
        """Returns the layout of a matrix of this shape.

        Large slabs have whole TPU tiles of 8 rows.
        """
        blocks = math.gcd(shape[-2], self.row_blocks)
        rows = shape[-2] // blocks
        kept = max(1, round(self.density * rows))
        if 16 * _TILE <= kept < rows:
            kept = _TILE * round(kept / _TILE)
        fewest = -(-rows // _MOST_LANES)
        return _Layout(shape, blocks, min(rows, max(kept, fewest)))

    def seeds(self, window: jax.typing.ArrayLike) -> jax.Array:
        """Returns the seeds of the masks of a window, from one reset to the next."""
        key = jax.random.fold_in(_validate.make_key(self.key), window)
        return jax.random.bits(key, (self.row_blocks,), jnp.uint32)


def _scale_and_decay(
    settings: _spam.SpamSettings,
    masks: _MaskSettings,
    decay: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Returns SPAM on the entries with momentum.

    `decay`, a stateless transformation, applies to these entries too.
    """
    settings, masks = settings.checked(), masks.checked()

    def init_fn(params: optax.Params) -> ScaleBySparseSpamState:
        compact = _compact(params, masks)
        if decay is not None:
            # This call raises an error if the mask does not fit the parameters.
            decay.init(params)
        lanes = None
        if masks.selection != "random":
            lanes = jax.tree.map(
                lambda p, moment: _init_lanes(p, moment, masks), params, compact
            )
        inner_state = _spam.init_spam(compact, settings)
        return ScaleBySparseSpamState(masks.seeds(0), lanes, inner_state)

    def update_fn(
        updates: optax.Updates,
        state: ScaleBySparseSpamState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleBySparseSpamState]:
        _check_update(updates, state, params, masks)
        updates = _moments.map_leaves(jnp.asarray, updates)
        if params is None and decay is not None:
            raise ValueError(
                f"{_validate.caller()}: weight_decay needs params, got None."
            )
        seeds, lanes = _draw(updates, state, params, settings, masks)
        moments = state.inner_state
        groups = _groups(seeds, lanes, moments.mu, updates)
        gradients = _moments.map_leaves(_arithmetic.narrow_like, updates, moments.nu)
        picked = _moments.map_leaves(lambda g, group: group.pick(g), gradients, groups)
        nonfinite = _moments.map_leaves(
            lambda g, group: group.count(functional.nonfinite_mask, g),
            gradients,
            groups,
        )
        direction, moments = _spam.spam_step(picked, moments, settings, nonfinite)
        direction = _moments.cast_updates(direction, updates, params)
        place = lambda x, group: group.place(x)  # noqa: E731
        updates = _moments.map_leaves(place, direction, groups)
        if decay is not None:
            # init gets the updates: some leaves of the parameters may not be arrays.
            updates, _ = decay.update(updates, decay.init(updates), params)
            keep = lambda x, group: jnp.where(group.mask, x, 0)  # noqa: E731
            updates = _moments.map_leaves(keep, updates, groups)
        return updates, ScaleBySparseSpamState(seeds, lanes, moments)

    return optax.GradientTransformation(init_fn, update_fn)


class _Layout(NamedTuple):
    """The grouping of the entries of a matrix or of a stack of matrices.

    Attributes:
      shape: Shape of the parameter.
      blocks: Number of blocks of rows.
      kept: Number of rows of moments per block.
    """

    shape: tuple[int, ...]
    blocks: int
    kept: int

    @property
    def rows(self) -> int:
        return self.shape[-2] // self.blocks

    @property
    def lanes(self) -> int:
        """Number of entries in the largest groups."""
        return -(-self.rows // self.kept)

    @property
    def missing_rows(self) -> int:
        """Number of rows by which the last slab is shorter than the others."""
        return self.lanes * self.kept - self.rows

    @property
    def lane_dtype(self) -> np.dtype:
        return np.min_scalar_type(self.lanes - 1)

    @property
    def moment_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-2], self.blocks * self.kept, self.shape[-1])

    @property
    def blocked_moment_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-2], self.blocks, self.kept, self.shape[-1])

    def slabs(self, x: jax.Array, fill: Any = 0) -> jax.Array:
        """Returns the slabs of `x`, of shape (..., blocks, lanes, kept, columns)."""
        *leading, _, columns = self.shape
        x = x.reshape(*leading, self.blocks, self.rows, columns)
        if self.missing_rows:
            x = self._pad(x, fill)
        return x.reshape(*leading, self.blocks, self.lanes, self.kept, columns)

    def join(self, slabs: jax.Array) -> jax.Array:
        """Reverses :meth:`slabs`."""
        *leading, _, columns = self.shape
        padded = self.lanes * self.kept
        x = slabs.reshape(*leading, self.blocks, padded, columns)
        return x[..., : self.rows, :].reshape(self.shape)

    def each_slab(self, x: jax.Array) -> list[jax.Array]:
        """Returns the slabs as slices.

        Compilers fuse slices with the operations that use them.
        """
        *leading, _, columns = self.shape
        x = x.reshape(*leading, self.blocks, self.rows, columns)
        slabs = [
            x[..., start : start + self.kept, :]
            for start in range(0, self.rows, self.kept)
        ]
        slabs[-1] = self._pad(slabs[-1], 0)
        return slabs

    def _pad(self, x: jax.Array, fill: Any) -> jax.Array:
        padding = [(0, 0)] * (x.ndim - 2) + [(0, self.missing_rows), (0, 0)]
        return jnp.pad(x, padding, constant_values=fill)

    def random_lanes(self, seeds: jax.Array, name: str, moment: jax.Array) -> jax.Array:
        """Returns the selected member of each group. All members are equally likely.

        The selection is a hash of the seeds, the tensor's name and the place of the
        group. It is computed elementwise, so it takes no memory, and on a mesh every
        device computes its own part.
        """
        shape = self.blocked_moment_shape
        sharding = jax.typeof(moment.reshape(shape)).sharding
        iota = functools.partial(
            jax.lax.broadcasted_iota,
            jnp.uint32,
            shape,
            out_sharding=None if sharding.mesh.empty else sharding,
        )
        # All iotas have the full shape: on a mesh, XLA would gather smaller arrays.
        *outer, column = map(iota, range(len(shape)))
        index = column
        stride = 1
        for size, place in zip(reversed(shape[1:]), reversed(outer), strict=True):
            stride *= size
            index = index + place * np.uint32(stride % 2**32)
        salt = np.uint32(zlib.crc32(name.encode()))
        # The sum is a scalar. The seeds may be sharded.
        seed = seeds.sum(dtype=jnp.uint32)
        # Two rounds of mixing: after one, the sequences of two tensors or windows could
        # overlap.
        bits = _mix(_mix(index ^ _mix(seed ^ salt)) ^ _mix(seed + salt))
        in_last_slab = self.kept - self.missing_rows
        choices = np.uint32(self.lanes) - (outer[-1] >= in_last_slab).astype(jnp.uint32)
        return _scale_bits(bits, choices).astype(self.lane_dtype)

    def largest_lanes(self, x: jax.Array) -> jax.Array:
        """Returns the members of `x` with the largest finite absolute value."""
        size = jnp.abs(functional.zero_nonfinite(x))
        return jnp.argmax(self.slabs(size, fill=-1), axis=-3).astype(self.lane_dtype)


class _Sparse(NamedTuple):
    """A parameter with sparse momentum, and its selected members."""

    layout: _Layout
    lanes: jax.Array  # shape=(..., blocks, kept, columns)

    @property
    def mask(self) -> jax.Array:
        """Marks the entries that have momentum."""
        return self.layout.join(_slab_mask(self.lanes, self.layout))

    def pick(self, x: jax.Array) -> jax.Array:
        """Returns the entries of `x` with momentum, in the shape of the moments."""

        def by_reduction(x, lanes):
            slabs = jnp.where(_slab_mask(lanes, self.layout), self.layout.slabs(x), 0)
            return slabs.sum(axis=-3)

        def by_slices(x, lanes):
            *slabs, picked = self.layout.each_slab(x)
            for lane, slab in enumerate(slabs):
                picked = jnp.where(lanes == lane, slab, picked)
            return picked

        picked = self._over_slabs(by_reduction, by_slices, x, self.lanes)
        return picked.reshape(self.layout.moment_shape)

    def count(
        self, predicate: Callable[[jax.Array], jax.Array], x: jax.Array
    ) -> jax.Array:
        """Counts the entries of each group for which `predicate` holds.

        The counts have the shape of the moments.
        """

        def by_reduction(x):
            return predicate(self.layout.slabs(x)).astype(jnp.float32).sum(axis=-3)

        def by_slices(x):
            # The predicate is evaluated slab by slab. On the whole array it would be a
            # separate pass over memory.
            holds = map(predicate, self.layout.each_slab(x))
            return functools.reduce(jnp.add, [x.astype(jnp.float32) for x in holds])

        total = self._over_slabs(by_reduction, by_slices, x)
        return total.reshape(self.layout.moment_shape)

    def _over_slabs(
        self, by_reduction: Callable, by_slices: Callable, *arrays: jax.Array
    ) -> jax.Array:
        """Calls the function that moves less memory. Both return the same.

        XLA:CPU stores the slabs before a reduction, so it gets slices. On other
        platforms the reduction moves least, unless the last slab is short and must be
        padded.
        """
        if self.layout.lanes > _MOST_SLICES:
            return by_reduction(*arrays)
        default = by_slices if self.layout.missing_rows else by_reduction
        return jax.lax.platform_dependent(*arrays, cpu=by_slices, default=default)

    def place(self, x: jax.Array) -> jax.Array:
        """Puts `x`, in the shape of the moments, at its places in the parameter.

        All other entries are 0.
        """
        x = x.reshape(self.layout.blocked_moment_shape)
        mask = _slab_mask(self.lanes, self.layout)
        return self.layout.join(jnp.where(mask, jnp.expand_dims(x, -3), 0))


def _slab_mask(lanes: jax.Array, layout: _Layout) -> jax.Array:
    """Marks the entries of the slabs that have momentum."""
    lanes = jnp.expand_dims(lanes, -3)
    shape = [1] * lanes.ndim
    shape[-3] = layout.lanes
    return lanes == jax.lax.broadcasted_iota(lanes.dtype, shape, lanes.ndim - 3)


class _Dense(NamedTuple):
    """A parameter in which all entries have momentum."""

    shape: tuple[int, ...]

    @property
    def mask(self) -> jax.Array:
        return jnp.ones(self.shape, bool)

    def pick(self, x: jax.Array) -> jax.Array:
        return x

    place = pick

    def count(
        self, predicate: Callable[[jax.Array], jax.Array], x: jax.Array
    ) -> jax.Array:
        return predicate(x)


class _Absent(NamedTuple):
    """A parameter that another optimizer updates."""

    shape: tuple[int, ...]

    @property
    def mask(self) -> jax.Array:
        return jnp.zeros(self.shape, bool)


def _mix(bits: jax.Array) -> jax.Array:
    """Mixes uint32: a bijection in which every output bit depends on every input bit.

    Wellons, `hash-prospector <https://github.com/skeeto/hash-prospector>`_.
    """
    bits = (bits ^ (bits >> 16)) * np.uint32(0x21F0AAAD)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x735A2D97)
    return bits ^ (bits >> 15)


def _scale_bits(bits: jax.Array, n: jax.Array) -> jax.Array:
    """Returns ``bits * n // 2**32`` without 64-bit numbers, for ``n < 2**16``."""
    return ((bits >> 16) * n + ((bits & 0xFFFF) * n >> 16)) >> 16


def _is_none(x: Any) -> bool:
    return x is None


def _chosen(params: optax.Params, sparse_params: SparseParams) -> Any:
    """Returns a tree of booleans: which parameters have sparse momentum."""
    # A tree may be callable, for example a module of booleans.
    is_function = all(map(callable, jax.tree.leaves(sparse_params)))
    is_function = is_function and callable(sparse_params)
    tree = sparse_params(params) if is_function else sparse_params
    allowed = (
        f"{_validate.caller()}: "
        "sparse_params must be a tree of booleans shaped like the "
        "parameters or a prefix of them"
    )
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, (bool, np.bool_)):
            shape = getattr(leaf, "shape", None)
            got = repr(leaf) if shape is None else f"an array of shape {shape}"
            raise TypeError(f"{allowed}, got {got} in it.")
    try:
        return jax.tree.map(
            lambda is_sparse, part: jax.tree.map(lambda _: is_sparse, part),
            tree,
            params,
        )
    except ValueError as error:
        raise ValueError(f"{allowed}, got {jax.tree.structure(tree)}.") from error


def _compact(params: optax.Params, masks: _MaskSettings) -> optax.Params:
    """Replaces parameters with sparse momentum by the shapes of their moments."""
    # `optax.tree.map_params` calls init with a placeholder that has no leaves.
    if not jax.tree.leaves(params):
        return params

    def compact(path, p, is_sparse):
        if not is_sparse or jnp.ndim(p) < 2 or 0 in p.shape:
            return p
        where = jax.tree_util.keystr(path) or "the root"
        if jnp.iscomplexobj(p):
            raise TypeError(
                f"{_validate.caller()}: "
                f"the parameter at {where} must have a floating dtype for "
                f"sparse momentum, got {p.dtype}; leave it out of sparse_params."
            )
        layout = masks.layout(p.shape)
        if layout.moment_shape == p.shape:
            return p
        return _moments_like(where, p, layout)

    chosen = _chosen(params, masks.sparse_params)
    return jax.tree_util.tree_map_with_path(compact, params, chosen)


def _init_lanes(p: jax.Array, moment: Any, masks: _MaskSettings) -> jax.Array | None:
    if jnp.shape(p) == jnp.shape(moment):
        return None
    return jnp.zeros_like(moment, dtype=masks.layout(p.shape).lane_dtype)


def _moments_like(where: str, p: jax.Array, layout: _Layout) -> jax.ShapeDtypeStruct:
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
            f"{_validate.caller()}: "
            "row_blocks must be a multiple of the number of shards of the "
            f"rows, for no group may be spread over devices; the parameter at {where} "
            f"has the shape {p.shape} in {layout.blocks} blocks and the sharding "
            f"{sharding.spec}."
        )
    return jax.ShapeDtypeStruct(shape, p.dtype, sharding=sharding)


def _check_update(
    updates: optax.Updates,
    state: ScaleBySparseSpamState,
    params: optax.Params | None,
    masks: _MaskSettings,
) -> None:
    mu = state.inner_state.mu
    _validate.check_same_structure(updates, mu)
    _validate.check_not_complex(updates, mu)
    if params is not None:
        _validate.check_same_tree(updates, params)
    if (state.mask_lanes is None) != (masks.selection == "random"):
        raise ValueError(
            f"{_validate.caller()}: "
            "selection must be the one that the state was made with, got "
            f"{masks.selection!r}."
        )
    if state.mask_seeds.shape != (masks.row_blocks,):
        raise ValueError(
            f"{_validate.caller()}: "
            f"row_blocks must be {state.mask_seeds.shape[0]}, with which "
            f"the state was made, got {masks.row_blocks}."
        )

    def check(path, g, moment):
        if g is None or jnp.shape(g) == moment.shape:
            return
        where = jax.tree_util.keystr(path) or "the root"
        if moment.ndim < 2:
            raise ValueError(
                f"{_validate.caller()}: "
                f"the update at {where} must have the shape {moment.shape} "
                f"of its parameter, got {jnp.shape(g)}."
            )
        if jnp.ndim(g) < 2 or moment.shape != masks.layout(jnp.shape(g)).moment_shape:
            raise ValueError(
                f"{_validate.caller()}: "
                f"the update at {where} must have the shape of its "
                f"parameter, got {jnp.shape(g)}, whose moments cannot have the shape "
                f"{moment.shape} with density {masks.density} and row_blocks "
                f"{masks.row_blocks}."
            )

    jax.tree_util.tree_map_with_path(check, updates, mu, is_leaf=_is_none)


def _draw(
    updates: optax.Updates,
    state: ScaleBySparseSpamState,
    params: optax.Params | None,
    settings: _spam.SpamSettings,
    masks: _MaskSettings,
) -> tuple[jax.Array, Any]:
    """Returns the seeds and the stored selection. A reset step makes new ones."""
    step = optax.safe_increment(state.inner_state.count)
    is_reset = functional.reset_position(step, settings.reset_interval) == 0
    if masks.selection == "random":
        if settings.reset_interval is None:
            return state.mask_seeds, None
        fresh = masks.seeds(step // settings.reset_interval)
        return jnp.where(is_reset, fresh, state.mask_seeds), None

    sizes = updates if masks.selection == "max_gradient" else params
    if sizes is None:
        raise ValueError(
            f"{_validate.caller()}: "
            "selection='max_weight' needs params, got None; or choose "
            "'random' or 'max_gradient'."
        )

    def choose(lanes):
        def of_leaf(x, old):
            if x is None or old is None:
                return old
            new = masks.layout(x.shape).largest_lanes(x)
            return new.reshape(old.shape)

        return jax.tree.map(of_leaf, sizes, lanes, is_leaf=_is_none)

    lanes = jax.lax.cond(
        is_reset | (step == 1), choose, lambda lanes: lanes, state.mask_lanes
    )
    return state.mask_seeds, lanes


def _groups(
    seeds: jax.Array, lanes: Any, moments: optax.Updates, like: optax.Updates
) -> Any:
    """Returns a description of each array of `like`: sparse, dense or absent.

    None stays None.
    """

    def of_leaf(name, x, moment, lanes):
        if x is None:
            return None
        if not hasattr(moment, "shape"):
            return _Absent(x.shape)
        if moment.shape == x.shape:
            return _Dense(x.shape)
        blocks = math.gcd(x.shape[-2], seeds.shape[0])
        layout = _Layout(x.shape, blocks, moment.shape[-2] // blocks)
        if lanes is None:
            lanes = layout.random_lanes(seeds, name, moment)
        return _Sparse(layout, lanes.reshape(layout.blocked_moment_shape))

    if lanes is None:
        lanes = jax.tree.map(lambda _: None, like, is_leaf=_is_none)
    structure = jax.tree.structure(like, is_leaf=_is_none)
    names = structure.unflatten(_paths.names(like, _is_none))
    return jax.tree.map(
        lambda x, name, *rest: of_leaf(name, x, *rest),
        like,
        names,
        moments,
        lanes,
        is_leaf=_is_none,
    )


def _sparse_states(opt_state: optax.OptState) -> list[ScaleBySparseSpamState]:
    is_sparse = lambda x: isinstance(x, ScaleBySparseSpamState)  # noqa: E731
    states = list(filter(is_sparse, jax.tree.leaves(opt_state, is_leaf=is_sparse)))
    if not states:
        raise ValueError(
            f"{_validate.caller()}: opt_state must hold a state of sparse_spam, got "
            f"{jax.tree.structure(opt_state)}."
        )
    return states


def _moments_for(state: ScaleBySparseSpamState, params: optax.Params) -> optax.Updates:
    """Returns the first moments of a state. Raises if they do not fit `params`."""
    if state.mask_seeds.ndim != 1:
        raise ValueError(
            f"{_validate.caller()}: opt_state must be the state of one run, got one of "
            f"{state.mask_seeds.shape[:-1]} runs; use jax.vmap({_validate.caller()})."
        )
    try:
        mu = spread_absent(state.inner_state.mu, params)
        leaves = jax.tree.structure(params).flatten_up_to(mu)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{_validate.caller()}: params must be a tree like those of opt_state, got "
            f"{jax.tree.structure(params)}."
        ) from None
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, p), moment in zip(paths, leaves, strict=True):
        if isinstance(moment, optax.MaskedNode):
            continue
        got, held = jnp.shape(p), getattr(moment, "shape", None)
        is_sparse = (
            held is not None
            and len(got) == len(held) >= 2
            and (*got[:-2], got[-1]) == (*held[:-2], held[-1])
            and got[-2] > held[-2]
        )
        if got != held and not is_sparse:
            raise ValueError(
                f"{_validate.caller()}: "
                f"params must be those of opt_state, got the shape {got} "
                f"at {jax.tree_util.keystr(path) or 'the root'}, where its moments "
                f"have {held}."
            )
    return mu


def spread_absent(tree: Any, params: optax.Params) -> Any:
    """Replaces each `MaskedNode`, which stands for a subtree, by one per parameter."""
    is_absent = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(
        lambda x, part: jax.tree.map(lambda _: x, part) if is_absent(x) else x,
        tree,
        params,
        is_leaf=lambda x: x is None or is_absent(x),  # None: a dense parameter.
    )
