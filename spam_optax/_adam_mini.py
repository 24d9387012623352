"""Adam-mini: Adam with one second moment for each block of parameters.

Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
<https://arxiv.org/abs/2406.16793>`_, ICLR 2025.

A second moment has the rank of its parameter, and along each axis one entry per block.
Each axis is cut into blocks of equal size.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _moments, _paths, _validate

Partition = Callable[[optax.Params], Any]

_WITH_HEADS = ("query", "key", "value", "attention output")
# Words in the names of axes.
_LAYERS = {
    *("layer", "layers", "block", "blocks", "stack", "repeat", "stage", "stages"),
    *("expert", "experts", "exp"),
}
_HEADS = {"head", "heads"}
_VOCABULARY = {"vocab", "vocabulary"}
# Matrices with more outputs than inputs, which are (out, in) in Hugging Face's Flax
# GPT-2 and in later Gemmas.
_WIDENING = ("c_attn", "c_fc", "gating_einsum")


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


def adam_mini_partition(
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    *,
    outputs_first: bool | Collection[str] | None = None,
    layer_axis: int | None = None,
    stacked: Collection[str] | None = None,
) -> Partition:
    """Returns the paper's partition of a transformer, by names and shapes.

    A partition gives each parameter a tuple: the number of equal parts along each of
    its axes. This tuple is also the shape of the second moment. The table is for
    kernels (in, out), as in Flax. Axes of stacked layers or experts come before these,
    and each layer has blocks of its own:

    ==========================================  =======================  ===============
    parameter                                   one block for            tuple
    ==========================================  =======================  ===============
    kernel of queries or keys                   a head                   (1, heads)
    the same, shaped (in, heads, head width)    a head                   (1, heads, 1)
    kernel of an untied head                    a token                  (1, vocabulary)
    embedding (vocabulary, width)               a token                  (vocabulary, 1)
    any other matrix                            an output neuron         (1, out)
    norm's scale, bias                          the whole (last) axis    (1,)
    ``alpha`` of a WeSaR layer                  a number                 ()
    ==========================================  =======================  ===============

    A kernel with fused queries, keys and values is one of the other matrices. So are
    LoRA's factors. They have one block per output neuron. A convolution (window, in,
    out) has one block per output neuron and window position. A matrix with an unknown
    name also has one block per output neuron, and a warning lists these matrices.

    Names are compared by words, as for :func:`matrices_only`: queries are ``query``,
    ``q``, ``q_proj``, ``wq``, ``q_einsum``, and so on. The axes of heads are found by
    their position and by their length, which must equal the number of heads. If
    ``nnx.Param`` or ``nn.Partitioned`` give names to the axes, these mark layers,
    experts and the vocabulary.

    Args:
      num_heads: Number of query heads. None is allowed if there are no queries or keys.
      num_kv_heads: Number of heads of the keys and values. None: the same as
        `num_heads`.
      outputs_first: Whether matrices are (out, in), as in PyTorch, Equinox and
        Levanter. If only some are, pass names of parts of their paths. Embeddings are
        (vocabulary, width) in any case. None: matrices are (in, out). A matrix called
        ``weight`` then raises an error, because it can have either order. So does a
        ``c_attn``, ``c_fc`` or ``gating_einsum`` with more inputs than outputs.
      layer_axis: The axis of stacked layers; 1 for MaxText. None: the first axis. A
        kernel that would have more layers than inputs then raises an error.
      stacked: Names of parts of paths, such as ``("layers",)``. Tensors with one of
        these names in their path have an axis of layers, and others do not. None: the
        number of axes of a tensor decides.

    Returns:
      A function from parameters to a tree of tuples, for `partition`. Call it to see
      the blocks. You can also write your own function.

    Raises:
      ValueError: If an argument is out of range. The returned function raises it if
        the number of heads does not divide a kernel's outputs, or is needed and None,
        or if a kernel's axes are ambiguous. The message names the argument to pass.
      TypeError: If an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> params = {
      ...     "embed": {"embedding": jnp.ones((50, 8))},
      ...     "attention": {"key": {"kernel": jnp.ones((12, 8, 8))}},  # 12 layers
      ...     "norm": {"scale": jnp.ones(8)},
      ... }
      >>> layers_first = spam_optax.adam_mini_partition(num_heads=2, layer_axis=0)
      >>> blocks = layers_first(params)
      >>> print(blocks["embed"], blocks["attention"], blocks["norm"])
      {'embedding': (50, 1)} {'key': {'kernel': (12, 1, 2)}} {'scale': (1,)}
      >>> torch_like = spam_optax.adam_mini_partition(num_heads=2, outputs_first=True)
      >>> print(torch_like({"lm_head": {"weight": jnp.ones((50, 8))}}))
      {'lm_head': {'weight': (50, 1)}}

    References:
      Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
      <https://arxiv.org/abs/2406.16793>`_, 2024, section 2.3.
    """
    for name, value, low in (
        ("num_heads", num_heads, 1),
        ("num_kv_heads", num_kv_heads, 1),
        ("layer_axis", layer_axis, 0),
    ):
        if value is not None:
            _validate.check_static(name, value)
            _validate.check_whole(name, value, low=low)
    if not isinstance(outputs_first, bool | None):
        others = "True, False, None or "
        _validate.check_names("outputs_first", outputs_first, others)
    if stacked is not None:
        _validate.check_names("stacked", stacked, "None or ")
    key_heads = num_heads if num_kv_heads is None else num_kv_heads
    layer_axis = None if layer_axis is None else int(layer_axis)
    layouts = _Layouts(num_heads, key_heads, outputs_first, layer_axis, stacked)

    told = () if isinstance(outputs_first, bool | None) else outputs_first

    def partition(params: optax.Params) -> Any:
        names, leaves = _paths.names(params), _paths.leaves(params)
        blocks = _paths.map_leaves(lambda leaf: _blocks(leaf, layouts), params)
        pairs = zip(names, leaves, strict=True)
        unknown = [
            name or "the only tensor" for name, leaf in pairs if _role(leaf) is None
        ]
        if unknown:
            warnings.warn(
                f"{_validate.caller()}: "
                "the names of these matrices do not tell what they do: "
                f"{', '.join(unknown)}. "
                "Each of them gets one second moment per output neuron.",
                stacklevel=2,
            )
        absent = [
            name
            for name in (*told, *(stacked or ()))
            if not any(_paths.has_name(leaf.path, [name]) for leaf in leaves)
        ]
        # A warning and not an error, because Optax may call a partition with a part of
        # the parameters.
        if absent:
            warnings.warn(
                f"{_validate.caller()}: "
                "names in outputs_first or stacked are in the path of no "
                f"tensor: {', '.join(absent)}.",
                stacklevel=2,
            )
        return blocks

    return partition


class _Layouts(NamedTuple):
    """The arguments of :func:`adam_mini_partition`."""

    num_heads: int | None
    key_heads: int | None
    outputs_first: bool | Collection[str] | None
    layer_axis: int | None
    stacked: Collection[str] | None

    def heads_of(self, role: str | None) -> int | None:
        """Returns the number of heads. Attention's output has that of the queries."""
        return self.key_heads if role in ("key", "value") else self.num_heads


def _role(leaf: _paths.Leaf) -> str | None:
    return _paths.role(leaf.path, jnp.ndim(leaf.value))


def _blocks(leaf: _paths.Leaf, layouts: _Layouts) -> tuple[int, ...]:
    """Returns the number of blocks along each axis."""
    shape, role = jnp.shape(leaf.value), _role(leaf)
    if role == "factor":
        return shape
    layers = _layer_axes(leaf, layouts)
    if role in ("vector", "embedding"):
        whole = max(set(range(len(shape))) - set(layers or ()), default=None)
        return tuple(1 if axis == whole else n for axis, n in enumerate(shape))
    axes = _axes(leaf, layers, layouts)
    parts = {"in": 1}
    if role in ("query", "key"):
        parts |= {"width": 1, "out": _checked_heads(leaf, layouts, axes)}
    if role == "attention output":
        parts |= {"width": 1, "head": 1}
    sizes = zip(axes, shape, strict=True)
    return tuple(parts.get(axis, size) for axis, size in sizes)


def _axes(
    leaf: _paths.Leaf, layers: tuple[int, ...] | None, layouts: _Layouts
) -> tuple[str, ...]:
    """Returns the kind of each axis of a matrix.

    The kinds are layer, in, out, head, and width (of a head).
    """
    shape, role = jnp.shape(leaf.value), _role(leaf)
    is_first = _is_outputs_first(leaf, layouts.outputs_first)
    flat = ("out", "in") if is_first else ("in", "out")
    rest = tuple(n for axis, n in enumerate(shape) if axis not in (layers or ()))
    if len(rest) > 2 and role in _WITH_HEADS:
        _number_of_heads(leaf, layouts)
    patterns = _head_patterns(leaf, is_first)
    with_heads = next((p for p in patterns if _fits(rest, p, role, layouts)), None)
    if layers is None:
        if with_heads and len(rest) == len(with_heads) == 3:
            with_heads = _if_no_layers(leaf, with_heads)
    elif role in _WITH_HEADS and len(rest) > 2 and not with_heads:
        raise ValueError(
            "adam_mini_partition: num_heads and num_kv_heads must be the length of an "
            f"axis of the kernel at {_validate.place(leaf.path)} of shape {shape}, got "
            f"{layouts.num_heads} and {layouts.key_heads}."
        )
    elif with_heads is None and layouts.stacked is None and leaf.axis_names is None:
        # Only the rank suggests that there are layers.
        whole = (p for p in patterns if _fits(shape, p, role, layouts))
        if layers and len(shape) == 3 and next(whole, None):
            _refuse(leaf, "stacked", f"axis {layers[0]} is one of layers or of heads")
    core = with_heads or flat
    axes = ["layer"] * (len(rest) - len(core)) + list(core)
    for axis in layers or ():
        axes.insert(axis, "layer")
    if layers is None and layouts.layer_axis is None:
        _check_layers(leaf, axes, "layer_axis")
    elif layers and layouts.stacked is None and leaf.axis_names is None:
        _check_layers(leaf, axes, "stacked")
    if layouts.outputs_first is None and core == flat:
        sizes = dict(zip(axes, shape, strict=True))
        if sizes["in"] > sizes["out"] and _paths.has_name(leaf.path, _WIDENING):
            _refuse(leaf, "outputs_first", "it is (in, out) or (out, in)")
    return tuple(axes)


def _layer_axes(leaf: _paths.Leaf, layouts: _Layouts) -> tuple[int, ...] | None:
    """Returns the axes of layers and experts, or None for all before the matrix's."""
    ndim, axis = jnp.ndim(leaf.value), layouts.layer_axis or 0
    words = [_words_of_axis(name) for name in leaf.axis_names or ()]
    if len(words) == ndim and any(w & (_LAYERS | _HEADS) for w in words):
        return tuple(i for i, w in enumerate(words) if w & _LAYERS)
    if layouts.stacked is not None:
        has_layers = _paths.has_name(leaf.path, layouts.stacked)
    elif axis == 0:
        return None
    else:
        has_layers = ndim > (1 if _role(leaf) == "vector" else 2)
    if has_layers and axis >= ndim:
        raise ValueError(
            "adam_mini_partition: layer_axis must be an axis of the stacked tensor at "
            f"{_validate.place(leaf.path)} of shape {jnp.shape(leaf.value)}, got "
            f"{axis}."
        )
    return (axis,) if has_layers else ()


def _words_of_axis(name: Any) -> set[str]:
    """Returns the words of an axis's name. A tuple of mesh axes has none."""
    return _paths.words(name) if isinstance(name, str) else set()


def _is_outputs_first(
    leaf: _paths.Leaf, outputs_first: bool | Collection[str] | None
) -> bool:
    """Checks whether a matrix is (out, in)."""
    if isinstance(outputs_first, bool):
        return outputs_first
    if outputs_first is not None:
        return _paths.has_name(leaf.path, outputs_first)
    vocabulary = [bool(_words_of_axis(n) & _VOCABULARY) for n in leaf.axis_names or ()]
    if any(vocabulary) and len(vocabulary) == jnp.ndim(leaf.value):
        return not vocabulary[-1]
    if _paths.last_word(leaf.path) == "weight":
        _refuse(leaf, "outputs_first", "it is (in, out) or (out, in)")
    return False


def _head_patterns(leaf: _paths.Leaf, is_outputs_first: bool) -> list[tuple[str, ...]]:
    """Returns the axes that a matrix with axes of heads may end with."""
    role = _role(leaf)
    if role in ("query", "key", "value"):
        if is_outputs_first:
            grouped = ("head", "head", "width", "in")  # Levanter's queries.
            return [grouped[1:], grouped]
        einsum = [("head", "in", "width")] if _paths.is_einsum(leaf.path) else []
        return [*einsum, ("in", "head", "width")]
    if role == "attention output":
        transposed = ("out", "head", "width")  # Levanter's and axlearn's.
        return (
            [transposed] if is_outputs_first else [("head", "width", "out"), transposed]
        )
    if role in ("fused attention", "low rank") and not is_outputs_first:
        return [("in", "out", "head", "width"), ("in", "head", "width")]
    return []


def _fits(
    shape: tuple[int, ...],
    pattern: tuple[str, ...],
    role: str | None,
    layouts: _Layouts,
) -> bool:
    """Checks whether a pattern's axes of heads have the number of heads as length."""
    if len(shape) < len(pattern):
        return False
    sizes = list(zip(pattern, shape[-len(pattern) :], strict=True))
    heads = math.prod(n for axis, n in sizes if axis == "head")
    if role in _WITH_HEADS:
        return heads == layouts.heads_of(role)
    is_fused = "out" not in pattern or dict(sizes)["out"] in (2, 3)
    return is_fused and heads in (layouts.num_heads, layouts.key_heads)


def _if_no_layers(leaf: _paths.Leaf, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns `axes`, or None if the first is an axis of layers and not of heads."""
    heads, size, other = jnp.shape(leaf.value)
    if axes[0] != "head" or axes[1] == "in":
        return axes
    if size >= other:  # A head is narrower than the stream.
        return None
    if heads * size != other and size % heads == 0:
        _refuse(leaf, "stacked", "its first axis is one of layers or of heads")
    return axes


def _check_layers(leaf: _paths.Leaf, axes: list[str], argument: str) -> None:
    """Raises if a kernel would have more layers than inputs.

    Its layers are then on another axis.
    """
    if _role(leaf) not in (*_WITH_HEADS, "fused attention", "feed-forward"):
        return
    sizes = list(zip(axes, jnp.shape(leaf.value), strict=True))
    layers = max(((n, i) for i, (x, n) in enumerate(sizes) if x == "layer"), default=())
    inputs = [size for axis, size in sizes if axis == "in"]
    if layers and inputs and layers[0] > inputs[0]:
        _refuse(leaf, argument, f"axis {layers[1]} is one of layers or of inputs")


def _number_of_heads(leaf: _paths.Leaf, layouts: _Layouts) -> int:
    """Returns the number of heads of a kernel. Raises if it is None."""
    heads = layouts.heads_of(_role(leaf))
    if heads is None:
        raise ValueError(
            "adam_mini_partition: num_heads must be a whole number >= 1 for the kernel "
            f"at {_validate.place(leaf.path)}, got None; pass "
            "partition=adam_mini_partition(num_heads)."
        )
    return int(heads)


def _checked_heads(leaf: _paths.Leaf, layouts: _Layouts, axes: tuple[str, ...]) -> int:
    """Returns the number of heads. Raises unless it divides the kernel's outputs."""
    heads = _number_of_heads(leaf, layouts)
    outputs = dict(zip(axes, jnp.shape(leaf.value), strict=True)).get("out", heads)
    if outputs % heads:
        raise ValueError(
            f"adam_mini_partition: the number of heads must divide the {outputs} "
            f"outputs of the kernel at {_validate.place(leaf.path)}, got {heads}."
        )
    return heads


def _refuse(leaf: _paths.Leaf, argument: str, question: str) -> None:
    raise ValueError(
        f"adam_mini_partition: {argument} must be given for the matrix at "
        f"{_validate.place(leaf.path)}: its shape {jnp.shape(leaf.value)} does not "
        f"show whether {question}; got None."
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
