"""Finds names and roles of tensors from their paths.

A part of a path is compared by its words: ``attention_norm``, ``AttentionNorm`` and
``attention_norm_1`` all have the words attention and norm. A part has a name if the
name is one of its words or several adjacent words joined: ``embed_out`` has the names
embed, out and embedout.
"""

import functools
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spam_optax import _validate

_NORMS = ("norm", "layernorm", "rmsnorm", "groupnorm", "batchnorm", "ln")
VECTORS = (
    *("bias", "b", "scale", "offset", "gain", "gamma", "beta", "decay", "a_log"),
    *_NORMS,
)
EMBEDDINGS = (
    *("embed", "embeds", "embedder", "embedding", "embeddings", "emb", "wte", "wpe"),
    *("positions", "positional", "position_encoding", "posemb"),
)
HEADS = (
    *("head", "logits", "logit_dense", "classifier", "unembed", "unembedding"),
    *("embed_out", "output_embed", "output_embedding", "predictions", "qa_outputs"),
)
FACTORS = ("alpha",)  # Of WeSaR's layers.
DENSE = VECTORS + EMBEDDINGS + HEADS + FACTORS

_LOW_RANKS = (
    *("lora", "lora_a", "lora_b", "wq_a", "wq_b", "wkv_a", "wkv_b"),
    *("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj"),
)
_FEED_FORWARDS = (
    *("mlp", "ffn", "ffw", "ff", "feed_forward", "moe", "expert", "experts"),
)
_PROJECTIONS = (
    *("proj", "projection", "linear", "dense", "einsum", "conv", "modulation"),
)
# The first role whose names occur in the part nearest to the leaf.
_MATRICES = (
    (
        "fused attention",
        (
            *("qkv", "kv", "wqkv", "wkv", "c_attn", "query_key_value", "key_value"),
            *("in_proj", "kv_proj", "qkv_proj"),
        ),
    ),
    ("query", ("query", "q", "q_proj", "proj_q", "wq", "to_q", "q_lin", "q_einsum")),
    ("key", ("key", "k", "k_proj", "proj_k", "wk", "to_k", "k_lin", "k_einsum")),
    ("value", ("value", "v", "v_proj", "proj_v", "wv", "to_v", "v_lin", "v_einsum")),
    (
        "attention output",
        (
            *("out", "o", "o_proj", "wo", "to_out", "output", "out_lin"),
            *("attn_vec", "o_einsum", "c_proj"),
        ),
    ),
    (
        "other matrix",
        (
            *("wi", "fc", "c_fc", "fc_in", "fc_out", "linear_in", "gate"),
            *("up", "down", "router", "conv", "convolution", "intermediate"),
        ),
    ),
)
_ATTENTIONS = ("attention", "attn", "att", "mha", "mqa", "gqa", "mla")
# Words next to "head" in the names of attention's heads, unlike in a model's head.
_OF_ATTENTION = {
    *("multi", "query", "key", "kv", "qk", "qkv"),
    *_ATTENTIONS,
}
_ATTENTION_HEAD = "attentionhead"


class Leaf(NamedTuple):
    """A tensor of a tree.

    Attributes:
      path: Its keys, without the key of a box around it: an NNX variable, or Linen's
        ``nn.Partitioned``.
      value: The tensor.
      axis_names: The names of its axes, if its box has any.
    """

    path: tuple[Any, ...]
    value: Any
    axis_names: tuple[Any, ...] | None


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Leaf]:
    """Returns the leaves of a tree, in the order of `jax.tree.leaves`."""
    is_node = lambda x: _is_box(x) or bool(is_leaf and is_leaf(x))  # noqa: E731
    found = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node):
        if not _is_box(node):
            found.append(Leaf(path, node, None))
            continue
        inside = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_leaf)
        names = _axis_names(node) if len(inside) == 1 else None
        found.extend(Leaf((*path, *rest[1:]), x, names) for rest, x in inside)
    return found


def map_leaves(
    f: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Maps `f` over the leaves, as :class:`Leaf`, and their counterparts in `rest`."""
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    others = map(structure.flatten_up_to, rest)
    found = zip(leaves(tree, is_leaf), *others, strict=True)
    return structure.unflatten([f(*xs) for xs in found])


def unboxed(tree: Any) -> Any:
    """Replaces each box by the tensor in it."""

    def unbox(x: Any) -> Any:
        inside = jax.tree.leaves(x)
        return inside[0] if _is_box(x) and len(inside) == 1 else x

    return jax.tree.map(unbox, tree, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
    """Checks by class name whether `x` is a box of Flax.

    Flax may not be installed.
    """
    return any(
        c.__name__ in ("Variable", "AxisMetadata") and c.__module__.startswith("flax.")
        for c in type(x).__mro__
    )


def _axis_names(box: Any) -> tuple[Any, ...] | None:
    if hasattr(box, "names"):
        return tuple(box.names)
    metadata = box.get_metadata() if hasattr(box, "get_metadata") else {}
    for key in ("out_sharding", "sharding_names", "sharding"):
        axes = metadata.get(key)
        if isinstance(axes, tuple):
            return axes
    return None


def names(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[str, ...]:
    """Returns the name of each tensor: the parts of its path joined by ``/``.

    Raises ValueError if two names are equal.
    """
    paths: dict[str, tuple[Any, ...]] = {}
    for leaf in leaves(tree, is_leaf):
        name = jax.tree_util.keystr(leaf.path, simple=True, separator="/")
        if name in paths:
            keys = " and ".join(map(jax.tree_util.keystr, (paths[name], leaf.path)))
            raise ValueError(
                f"{_validate.caller()}: the tensors of a tree must have different "
                f"names, got {name!r} for both {keys}; rename one."
            )
        paths[name] = leaf.path
    return tuple(paths)


def matrices_only(
    exclude: Collection[str] = DENSE,
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

    def is_matrix(leaf: Leaf) -> bool:
        return jnp.ndim(leaf.value) >= 2 and not has_name(leaf.path, exclude)

    return functools.partial(map_leaves, is_matrix)


def has_name(path: tuple[Any, ...], names: Collection[str]) -> bool:
    """Checks whether a part of a path has one of `names`.

    Names of vectors and factors count only in the last two parts. Above a ``kernel``
    only norms count: ``scale/kernel`` is a matrix, and so is ``norm_proj/w``. ``b``
    must be the last part.
    """
    return _has_name(_parts(path), names)


def role(path: tuple[Any, ...], ndim: int) -> str | None:
    """Returns the role of a tensor by its name, or None for an unknown matrix.

    Parts above the innermost attention are ignored, because attention may be inside an
    expert or a head.
    """
    parts = _parts(path)
    inside = max((i + 1 for i, x in enumerate(parts) if _is_attention(x)), default=0)
    parts = parts[inside:]
    if _has_name(parts, FACTORS):
        return "factor"
    if ndim < 2 or _has_name(parts, VECTORS):
        return "vector"
    if _has_name(parts, _LOW_RANKS):
        return "low rank"
    kind = _nearest(parts, (("head", HEADS), ("embedding", EMBEDDINGS)))
    if kind == "embedding" and _is_projection(parts):
        return "projection"
    # Checked before the other roles, because kernels in feed-forward layers may be
    # called `out` or `key`.
    if kind is None and _has_name(parts, _FEED_FORWARDS):
        return "feed-forward"
    return kind or _nearest(parts, _MATRICES)


def part_role(part: str) -> str | None:
    """Returns the role of a matrix that one part of its path suggests, or None."""
    return _nearest([_words(part)], _MATRICES)


def _has_name(parts: list[tuple[str, ...]], names: Collection[str]) -> bool:
    wanted = set(map(joined, names))
    near = wanted & set(map(joined, VECTORS + FACTORS))
    is_kernel = bool(parts) and parts[-1] == ("kernel",)
    for distance, part in enumerate(reversed(parts)):
        found = _names_of(part) & wanted
        if part[-1] in _PROJECTIONS or (is_kernel and part[-1] not in _NORMS):
            found -= near
        if any(name not in near or distance < min(len(name), 2) for name in found):
            return True
    return False


def _nearest(
    parts: list[tuple[str, ...]], kinds: tuple[tuple[str, tuple[str, ...]], ...]
) -> str | None:
    """Returns the role of the part nearest to the leaf that has a known name."""
    for part in reversed(parts):
        for kind, kinds_names in kinds:
            if _names_of(part) & set(map(joined, kinds_names)):
                return kind
    return None


def last_word(path: tuple[Any, ...]) -> str:
    """Returns the last part in lower case, without numbers and underscores."""
    return "".join(_parts(path)[-1]) if _parts(path) else ""


def is_einsum(path: tuple[Any, ...]) -> bool:
    """Checks whether a matrix belongs to an einsum.

    In Gemma's einsums the axis of heads comes first.
    """
    return any("einsum" in part for part in _parts(path))


def words(text: str) -> set[str]:
    """Returns the words of a name: ``q_heads`` has q and heads."""
    return set(_words(text))


def joined(name: str) -> str:
    """Returns the words of a name, joined: ``q_proj`` gives qproj."""
    return "".join(_words(name))


def _is_projection(parts: list[tuple[str, ...]]) -> bool:
    """Checks whether a matrix below an embedding is multiplied with.

    Such a matrix is not a lookup table.
    """
    *_, above, last = ((), (), *parts)
    is_linear = set(_PROJECTIONS) & (_names_of(above) | _names_of(last))
    return last == ("kernel",) or bool(is_linear)


@functools.cache
def _words(text: str) -> tuple[str, ...]:
    """Returns the words: ``LMHead_0`` and ``lm_head`` both have lm and head."""
    words = []
    for chunk in re.findall(r"[^\W\d_]+", text):
        words += re.findall(r"[A-Z]+(?![a-z])|[A-Z][^A-Z]*|[^A-Z]+", chunk)
    return tuple(word.lower() for word in words)


def _names_of(part: tuple[str, ...]) -> set[str]:
    """Returns the words of a part and all adjacent words joined.

    A single letter counts only if it is the whole part.
    """
    rows = {
        "".join(part[start:stop])
        for start in range(len(part))
        for stop in range(start + 1, len(part) + 1)
    }
    return {row for row in rows if len(row) > 1 or len(part) == 1}


def _parts(path: tuple[Any, ...]) -> list[tuple[str, ...]]:
    """Returns the words of each part of a path.

    One key may have several parts: ``a/b``, ``(a, b)``. A ``head`` inside attention is
    marked as attention's. ``output`` and ``proj_out`` outside layers are marked as the
    model's head. Parts without words, such as numbers, are left out, and so is the
    ``array`` at the end of Haliax's paths.
    """
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    texts = re.split(r"[/.,()\s\'\"\[\]]+", text)
    if texts[-1] == "array" and len(texts) > 1:
        texts.pop()
    parts, in_layers, in_attention = [], False, False
    for text in filter(None, texts):
        part = _words(text)
        in_attention = in_attention or _is_attention(part)
        is_layer = in_attention or _is_layer(part)
        if in_attention or set(part) & _OF_ATTENTION:
            part = tuple(_ATTENTION_HEAD if w == "head" else w for w in part)
        elif ("output" in part or part == ("proj", "out")) and not in_layers:
            part = (*part, "head")
        in_layers = in_layers or is_layer
        if part:
            parts.append(part)
    return parts


def _is_attention(part: tuple[str, ...]) -> bool:
    """Checks whether a part is an attention layer.

    ``c_attn`` and ``kv_a_proj_with_mqa`` are kernels inside one.
    """
    return bool(part) and part[-1] in _ATTENTIONS and {"c", "proj"}.isdisjoint(part)


def _is_layer(part: tuple[str, ...]) -> bool:
    """Checks whether a part, such as a number, is a layer or a stack of layers."""
    return (
        not part
        or part == ("h",)
        or part[-1].endswith(("layer", "layers", "block", "blocks"))
        or not _names_of(part).isdisjoint(map(joined, _FEED_FORWARDS))
    )
