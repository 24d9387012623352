"""The blocks of Adam-mini: which parameters share a second moment.

Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
<https://arxiv.org/abs/2406.16793>`_, ICLR 2025, section 2.3.

The names and shapes of a transformer's parameters tell its heads, layers and tokens.
What they leave open is an argument, and an error names it.
"""

import math
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from spam_optax import _paths, _validate

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
