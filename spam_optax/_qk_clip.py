"""Attention logits that are kept from growing by scaling queries and keys."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from spam_optax import _arithmetic, _paths, _validate
from spam_optax.functional import guards

_KINDS = ("query", "key")


class QKClipState(NamedTuple):
    """State of :func:`qk_clip`.

    Attributes:
      max_attention_logit: The largest attention logit of the last step.
      qk_clip_clipped_count: Number of heads clipped in the last step.
      qk_clip_clipped_total: The same, summed over all steps.
    """

    max_attention_logit: jax.Array  # shape=(), dtype=jnp.float32.
    qk_clip_clipped_count: jax.Array  # shape=(), dtype=jnp.int32.
    qk_clip_clipped_total: jax.Array  # shape=(), dtype=jnp.int32.


class HeadTensor(NamedTuple):
    """Describes a kernel or bias that makes queries or keys.

    Attributes:
      attention: Name of the attention layer, or of the stack of attention layers.
      kind: ``query`` or ``key``.
      head_axis: The axis of the heads, or of heads times head width, in a tensor
        without an axis of layers, >= 0.
      layer_axis: The axis of the layers, in a stack of layers, >= 0.
    """

    attention: str
    kind: str
    head_axis: int
    layer_axis: int = 0


HeadTensors: TypeAlias = Callable[[optax.Params], Any]


def qk_clip(
    threshold: jax.typing.ArrayLike | None = 100.0,
    *,
    balance: jax.typing.ArrayLike = 0.5,
    find: HeadTensors | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the queries and keys of heads whose attention logits are too large.

    Attention logits can grow without limit during training, and gradient clipping does
    not stop this. Let :math:`S_h` be the largest logit of head :math:`h` in this step's
    forward pass. After the step the head's logits are scaled by

    .. math::
      \gamma_h = \min(1, \tau / S_h)

    with the `threshold` :math:`\tau`. For this, kernel and bias of the keys of group
    :math:`g` are multiplied by :math:`c_g = \max_{h \in g} \gamma_h^\alpha`, and those
    of the queries of head :math:`h` by :math:`\gamma_h / c_g`, with the `balance`
    :math:`\alpha`. This is exact for multi-head and grouped-query attention, with and
    without rotary embeddings. Other heads do not change.

    Use it as the last part of a chain, and pass the logits to ``update``::

      tx = optax.chain(optax.adamw(1e-3), spam_optax.qk_clip())
      updates, state = tx.update(gradients, state, params, attention_logits=logits)

    ``attention_logits`` has the largest logit of every head, over the whole batch and
    all its micro-batches and devices: shape (heads,), or (layers, heads) for a stack of
    layers. If a model has several attention layers, it is a dictionary from their names
    to such arrays. A name is the part of the path before the query's: the kernel
    ``blocks/attention/query/kernel`` belongs to ``blocks/attention``.

    - Put it inside :func:`skip_spikes`. A skipped step then clips nothing.
    - A head whose logit is not finite is not clipped.
    - The parameters should be float32. In bfloat16 a factor near 1 is lost, so logits
      may exceed the threshold by half a percent.
    - Queries and keys that are normalized after their kernels cannot be clipped. They
      need no clipping.

    Args:
      threshold: Largest allowed logit, > 0, in the units of the softmax's argument.
        None: logits are only recorded.
      balance: Share of the factor's logarithm that goes to the keys, in [0, 1].
      find: Function from the parameters to a tree with a :class:`HeadTensor` for every
        kernel and bias of queries and keys, and None for all others. None:
        ``query_key_tensors()``.

    Returns:
      The transformation. Its updates have the dtype they came with.

    Raises:
      ValueError: If an argument is out of range. ``update`` raises it if parameters or
        ``attention_logits`` are missing, or do not fit the tensors found.
      TypeError: If an argument, or the dtype of a parameter, of an update or of
        ``attention_logits``, is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import spam_optax
      >>> params = {
      ...     "attention": {"query": jnp.ones((4, 4)), "key": jnp.ones((4, 4))}
      ... }
      >>> tx = optax.chain(optax.sgd(0.0), spam_optax.qk_clip(threshold=100.0))
      >>> state = tx.init(params)
      >>> logits = jnp.array([50.0, 400.0])  # of two heads
      >>> updates, state = tx.update(params, state, params, attention_logits=logits)
      >>> print(optax.apply_updates(params, updates)["attention"]["query"][0])
      [1.  1.  0.5 0.5]
      >>> print(state[-1].qk_clip_clipped_count)
      1

    References:
      Kimi Team, `Kimi K2 <https://arxiv.org/abs/2507.20534>`_, 2025, section 2.1.

    .. seealso:: :func:`spam_optax.functional.qk_clip_factors`
    """
    if threshold is not None:
        threshold = _validate.check_number("threshold", threshold, above=0)
    balance = _validate.check_number("balance", balance, at_least=0, at_most=1)
    if find is not None and not callable(find):
        raise TypeError(
            f"{_validate.caller()}: find must be None or a function from parameters to "
            f"a tree of HeadTensor, got {find!r}."
        )
    find_tensors = query_key_tensors() if find is None else find

    def init_fn(params: optax.Params) -> QKClipState:
        del params
        return QKClipState(
            jnp.zeros([], jnp.float32),
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: QKClipState,
        params: optax.Params | None = None,
        *,
        attention_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QKClipState]:
        del extra_args
        _validate.check_state(state, QKClipState)
        if params is None:
            raise ValueError(
                f"{_validate.caller()}: update needs the parameters, got None; pass "
                "update(updates, state, params, ...)."
            )
        structure = jax.tree.structure(params)
        tensors = _tensors_of(find_tensors(params), params)
        updates = _updates_of(updates, params, tensors)
        logits = _logits_of(attention_logits, tensors)
        factors: dict[tuple[str, str], jax.Array] = {}
        count = jnp.zeros([], jnp.int32)
        for name, of_attention in logits.items():
            num_kv_heads = _check_attention(name, of_attention, tensors, params)
            if threshold is None:
                continue
            pair = guards.head_factors(of_attention, num_kv_heads, threshold, balance)
            factors |= zip(((name, kind) for kind in _KINDS), pair, strict=True)
            is_clipped = jnp.isfinite(of_attention) & (of_attention > threshold)
            count += jnp.sum(is_clipped, dtype=jnp.int32)

        def clip(p: jax.Array, u: Any, tensor: HeadTensor | None) -> Any:
            if tensor is None or threshold is None:
                return u
            factor = factors[tensor.attention, tensor.kind]
            moved = _arithmetic.widen(p) + _arithmetic.widen(u)
            # A head that is not clipped keeps every bit of its update.
            less = guards.scale_heads(moved, factor - 1, *_axes(tensor, factor))
            return (_arithmetic.widen(u) + less).astype(u.dtype)

        rows = zip(jax.tree.leaves(params), updates, tensors, strict=True)
        clipped = structure.unflatten([clip(*row) for row in rows])
        largest = jnp.stack([jnp.max(x) for x in logits.values()]).max()
        total = _arithmetic.saturating_add(state.qk_clip_clipped_total, count)
        return clipped, QKClipState(largest, count, total)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def query_key_tensors(
    *, outputs_first: bool | None = None, layer_axis: int = 0
) -> HeadTensors:
    """Finds kernels and biases of queries and keys by their names.

    Names are compared by words, as for :func:`matrices_only`: queries are ``query``,
    ``q``, ``q_proj``, ``wq``, ``q_einsum``, and so on. Kernels are (in, heads times
    width) or (in, heads, width), and Gemma's einsums are (heads, in, width).

    Args:
      outputs_first: Whether kernels are (heads times width, in), as in PyTorch and
        Equinox. None: they are not, but a kernel called ``weight`` raises an error.
      layer_axis: The axis of the layers in a stack of layers; 1 for MaxText.

    Returns:
      A function from parameters to a tree of :class:`HeadTensor` and None, for the
      argument `find` of :func:`qk_clip`. Call it to see what is found.

    Raises:
      ValueError: If `layer_axis` is negative. The returned function raises it if
        nothing is found, or if a kernel is fused, ambiguous or followed by a norm.
      TypeError: If an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> params = {"attn": {"q_proj": jnp.ones((4, 4)), "k_proj": jnp.ones((4, 4))}}
      >>> print(spam_optax.query_key_tensors()(params)["attn"]["q_proj"])
      HeadTensor(attention='attn', kind='query', head_axis=1, layer_axis=0)
    """
    if outputs_first is not None:
        _validate.check_flags(outputs_first=outputs_first)
    _validate.check_static("layer_axis", layer_axis)
    layer_axis = int(_validate.check_whole("layer_axis", layer_axis, low=0))

    def find(params: optax.Params) -> Any:
        found = _paths.map_leaves(
            lambda leaf: _head_tensor(leaf, outputs_first, layer_axis), params
        )
        tensors = jax.tree.structure(params).flatten_up_to(found)
        if not any(tensors):
            names = ", ".join(_paths.names(params)) or "no tensors"
            raise ValueError(
                f"{_validate.caller()}: params must have kernels of queries and keys, "
                f"got {names}; pass find= to name them."
            )
        _refuse_norms(params, {t.attention for t in tensors if t is not None})
        return found

    return find


def _head_tensor(
    leaf: _paths.Leaf, outputs_first: bool | None, layer_axis: int
) -> HeadTensor | None:
    name = jax.tree_util.keystr(leaf.path, simple=True, separator="/")
    parts = re.split(r"[/.]", name)
    is_bias = _paths.last_word(leaf.path) in ("bias", "b")
    kernel = (
        (*leaf.path[:-1], jax.tree_util.DictKey("kernel")) if is_bias else leaf.path
    )
    kind = _paths.role(kernel, 2)
    if kind == "fused attention":
        raise ValueError(
            f"{_validate.caller()}: queries and keys must be tensors of their own, got "
            f"the fused tensor {name}."
        )
    if kind not in _KINDS:
        return None
    own = [i for i, part in enumerate(parts) if _paths.part_role(part) == kind]
    attention = "/".join(parts[: own[-1] if own else -1])
    if is_bias or outputs_first:
        return HeadTensor(attention, kind, 0, layer_axis)
    if outputs_first is None and parts[-1] == "weight":
        raise ValueError(
            f"{_validate.caller()}: outputs_first must be given for the kernel {name}, "
            "which is (in, out) or (out, in); got None; pass "
            "find=query_key_tensors(outputs_first=...)."
        )
    return HeadTensor(attention, kind, int(not _paths.is_einsum(leaf.path)), layer_axis)


def _refuse_norms(params: optax.Params, attentions: Collection[str]) -> None:
    """Raises if queries or keys are normalized: their scale then has no effect."""
    for name in _paths.names(params):
        *above, part, _ = ("", *re.split(r"[/.]", name))
        words = _paths.words(part)
        is_norm = any("norm" in word for word in words)
        if is_norm and words & {"q", "k", "qk", "query", "key"}:
            inside = "/".join(above).strip("/")
            if inside in attentions:
                raise ValueError(
                    f"{_validate.caller()}: queries and keys must not be normalized "
                    f"after their kernels, got {name}; with this norm their logits are "
                    "bounded."
                )


def _tensors_of(found: Any, params: optax.Params) -> list[HeadTensor | None]:
    """Returns the description of each parameter. Raises if `found` is no such tree."""
    structure = jax.tree.structure(params)
    try:
        tensors = structure.flatten_up_to(found)
    except (KeyError, TypeError, ValueError):
        tensors = [found]
    wrong = [x for x in tensors if not isinstance(x, HeadTensor | None)]
    for x in filter(None, () if wrong else tensors):
        if x.kind not in _KINDS or min(x.head_axis, x.layer_axis) < 0:
            raise ValueError(
                f"{_validate.caller()}: find must return HeadTensors with the kind "
                f"{' or '.join(_KINDS)} and axes >= 0, got {x}."
            )
    if wrong or len(tensors) != structure.num_leaves or not any(tensors):
        raise ValueError(
            f"{_validate.caller()}: find must return a tree like params with at least "
            f"one HeadTensor, and None for others, got {_validate.shown(found)}."
        )
    return tensors


def _updates_of(
    updates: optax.Updates, params: optax.Params, tensors: list[HeadTensor | None]
) -> list[Any]:
    """Returns the update of each parameter. Raises if one to clip does not fit."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    try:
        got = structure.flatten_up_to(updates)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{_validate.caller()}: updates must be a tree like the parameters "
            f"{structure}, got {jax.tree.structure(updates)}."
        ) from None
    for (path, p), u, tensor in zip(leaves, got, tensors, strict=True):
        if tensor is None:
            continue
        if u is None:
            raise ValueError(
                f"{_validate.caller()}: the update at {_validate.place(path)} must be "
                "an array, because queries and keys are scaled together, got None."
            )
        _validate.check_inexact(path, p)
        _validate.check_inexact(path, u, "update")
        if jnp.shape(u) != jnp.shape(p):
            raise ValueError(
                f"{_validate.caller()}: the update at {_validate.place(path)} must "
                f"have the shape {jnp.shape(p)} of its parameter, got {jnp.shape(u)}."
            )
    return got


def _logits_of(given: Any, tensors: list[HeadTensor | None]) -> dict[str, jax.Array]:
    """Returns the logits of each attention layer, float32."""
    names = sorted({tensor.attention for tensor in tensors if tensor is not None})
    needed = f"attention_logits must have the largest logits of {', '.join(names)}"
    if given is None:
        raise ValueError(
            f"{_validate.caller()}: {needed}; pass update(..., attention_logits=...)."
        )
    if not isinstance(given, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"{_validate.caller()}: {needed}, as a dictionary, got "
                f"{_validate.shown(given)}."
            )
        given = {names[0]: given}
    if set(given) != set(names):
        raise ValueError(
            f"{_validate.caller()}: {needed}, got those of "
            f"{', '.join(sorted(map(str, given))) or 'no layer'}."
        )
    return {name: _read_logits(name, given[name]) for name in names}


def _read_logits(name: str, value: Any) -> jax.Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        array = None
    if array is None or not _validate.is_real(array):
        raise TypeError(
            f"{_validate.caller()}: attention_logits of {name} must be an array of "
            f"real numbers, got {_validate.shown(value)}."
        )
    return array.astype(jnp.float32)


def _check_attention(
    name: str,
    logits: jax.Array,
    tensors: list[HeadTensor | None],
    params: optax.Params,
) -> int:
    """Checks shapes, and returns the number of heads of the keys."""
    sizes: dict[str, set[int]] = {kind: set() for kind in _KINDS}
    if logits.ndim not in (1, 2) or not logits.size:
        raise ValueError(
            f"{_validate.caller()}: attention_logits of {name} must have shape "
            f"(heads,) or (layers, heads), got {logits.shape}."
        )
    *layers, heads = logits.shape
    for p, tensor in zip(jax.tree.leaves(params), tensors, strict=True):
        if tensor is None or tensor.attention != name:
            continue
        head_axis, layer_axis = _axes(tensor, logits)
        shape = jnp.shape(p)
        fits = max(head_axis, layer_axis or 0) < len(shape)
        if not fits or (layer_axis is not None and shape[layer_axis] != layers[0]):
            raise ValueError(
                f"{_validate.caller()}: attention_logits of {name} must have shape "
                f"(heads,), or (layers, heads) for a stack, got {logits.shape} for the "
                f"{tensor.kind} of shape {shape}."
            )
        sizes[tensor.kind].add(shape[head_axis])
    for kind, found in sizes.items():
        if not found:
            raise ValueError(f"{_validate.caller()}: {name} has no {kind} to scale.")
    # Kernels are (in, heads, width) or (in, heads * width), and so are biases.
    (query, *others), (key, *more) = (sorted(sizes[kind]) for kind in _KINDS)
    width, rest = divmod(query, heads)
    if others or more or rest or key % width or heads % (key // width):
        raise ValueError(
            f"{_validate.caller()}: the axes of heads of {name} must be multiples of "
            f"{heads}, the number of heads in attention_logits, got "
            f"{sorted(sizes['query'])} for queries and {sorted(sizes['key'])} for keys."
        )
    return key // width


def _axes(tensor: HeadTensor, logits: jax.Array) -> tuple[int, int | None]:
    """Returns the axis of heads and that of layers, which may be None."""
    if logits.ndim == 1:
        return tensor.head_axis, None
    behind = tensor.head_axis >= tensor.layer_axis
    return tensor.head_axis + behind, tensor.layer_axis
