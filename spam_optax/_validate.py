"""Checks arguments.

Error messages are one line with the function, the argument, its value and what is
allowed. The values of Python and NumPy numbers are checked. Those of arrays are not:
`optax.inject_hyperparams` passes tracers, whose values are unknown.
"""

import math
import re
import sys
import types
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spam_optax import _arithmetic


def caller() -> str:
    """Returns the name of the public function that the user called, for a message.

    It is the outermost factory: ``spam``, even if ``scale_by_spam`` checks. Inside
    ``init`` and ``update`` it is the factory that returned them.
    """
    name = ""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        root, *nested = frame.f_code.co_qualname.split(".")
        if module.partition(".")[0] == "spam_optax" and _is_public(module, root):
            if "<locals>" in nested:
                return name or root
            name = root
        frame = frame.f_back
    return name


def _is_public(module: str, name: str) -> bool:
    """Returns whether users call this function of the package by its name."""
    if "._" in module:
        return hasattr(sys.modules["spam_optax"], name)
    return not name.startswith("_")


def shown(value: Any) -> str:
    """Returns `value` for a message, on one line."""
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return re.sub(r"\s*\n\s*", " ", repr(value))


def place(path: tuple[Any, ...]) -> str:
    """Returns the path of a leaf for a message."""
    return jax.tree_util.keystr(path) or "the root"


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
    many: bool = False,
) -> Any:
    """Raises unless `value` is a finite number within bounds, or a scalar array.

    The values of arrays are not checked, since they may be traced.

    Args:
      name: Name of the argument.
      value: What was passed.
      above: Open lower bound.
      at_least: Closed lower bound.
      below: Open upper bound.
      at_most: Closed upper bound.
      whole: Whether only whole numbers are allowed.
      many: Whether arrays of several numbers are allowed.

    Returns:
      `value`. A NumPy or ml_dtypes scalar becomes a Python number. JAX would otherwise
      round to the dtype of the scalar, or could not add it to an array.

    Raises:
      TypeError: If `value` is neither a real number nor an array of real numbers.
      ValueError: If it is a number out of bounds, or an array with a shape other than
        () although `many` is False.
    """
    if _is_array(value):
        if value.ndim and not many:
            raise ValueError(
                f"{caller()}: {name} must be one number, got an array of shape"
                f" {value.shape}."
            )
        return value

    def message(note: str = "") -> str:
        kind = "a whole number" if whole else "a finite number"
        bounds = {">": above, ">=": at_least, "<": below, "<=": at_most}
        limits = (f"{sign} {x}" for sign, x in bounds.items() if x is not None)
        allowed = f"{kind} {' and '.join(limits)}".rstrip()
        return f"{caller()}: {name} must be {allowed}, got {shown(value)}{note}."

    number = to_python(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(message())
    fits = (
        (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
        and (at_most is None or number <= at_most)
    )
    if not fits or not math.isfinite(_as_float32(number)):
        raise ValueError(message())
    if above is not None and _as_float32(number) <= above:
        raise ValueError(message(f", which is {above} in float32"))
    if whole and number != int(number):
        raise ValueError(message())
    return number if whole else float(number)  # An int may exceed JAX's.


def to_python(value: Any) -> Any:
    """Converts a NumPy or ml_dtypes scalar to a Python number. Others are unchanged."""
    if not isinstance(value, np.generic):
        return value
    for kind, convert in ((jnp.integer, int), (jnp.floating, float)):
        if jnp.issubdtype(value.dtype, kind):
            return convert(value)
    return value


def _is_array(value: Any) -> bool:
    """Checks whether `value` is an array or a tracer of real numbers."""
    return isinstance(value, (jax.Array, np.ndarray)) and (
        jnp.issubdtype(value.dtype, jnp.integer)
        or jnp.issubdtype(value.dtype, jnp.floating)
    )


def is_real(array: jax.Array) -> bool:
    """Checks whether an array has real numbers or booleans, not PRNG keys."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return any(jnp.issubdtype(array.dtype, kind) for kind in kinds)


def _as_float32(value: int | float) -> float:
    """Returns `value` as float32 arithmetic treats it.

    Large values are infinite and subnormal values are 0.
    """
    info = np.finfo(np.float32)
    if not abs(value) <= float(info.max):
        return math.inf
    return 0.0 if abs(value) < float(info.tiny) else float(value)


def check_flags(**flags: Any) -> None:
    """Raises unless every flag is a boolean."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(
                f"{caller()}: {name} must be True or False, got {shown(value)}."
            )


def check_transformation(value: Any, name: str = "inner") -> None:
    """Raises unless `value` is a gradient transformation.

    A function that returns one is an error.
    """
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{caller()}: {name} must be a gradient transformation, got {shown(value)}."
        )


def check_state(state: Any, kind: type) -> None:
    """Raises unless `state` is the `kind` of state that ``init`` returns.

    The names are compared, because a notebook may have loaded the module twice.
    """
    if kind.__name__ not in (base.__name__ for base in type(state).__mro__):
        raise TypeError(
            f"{caller()}: state must be the {kind.__name__} that init returned, got "
            f"{type(state).__name__}."
        )


def check_whole(name: str, value: Any, *, low: int, high: int | None = None) -> Any:
    """Raises unless `value` is an array or a whole number from `low` to `high`."""
    return check_number(name, value, at_least=low, at_most=high, whole=True)


def check_steps(name: str, value: Any, *, low: int) -> Any:
    """Raises unless `value` is an array or a whole number >= `low` that fits int32."""
    return check_whole(name, value, low=low, high=np.iinfo(np.int32).max)


def instead_of_optax(value: Any) -> str:
    """Returns advice for an error message, or an empty string.

    The advice is for a `value` that may come from `optax.inject_hyperparams`. It turns
    numbers into arrays. It also calls functions with the step number, and a partition
    of :func:`spam_optax.adam_mini` then returns ().
    """
    if not isinstance(value, (jax.Array, np.ndarray, tuple)):
        return ""
    return " (use spam_optax.inject_hyperparams instead of Optax's)"


def check_static(name: str, value: Any) -> None:
    """Raises if `value`, which decides shapes, is an array or a tracer."""
    if isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{caller()}: {name} must be a Python number, because it decides shapes"
            f"{instead_of_optax(value)}, got {shown(value)}."
        )


def booleans(argument: str, value: Any, params: Any) -> Any:
    """Returns the tree of booleans that `value` is, or that it makes from `params`.

    `argument` begins the message: the factory and the name.
    """
    # A tree may be callable, for example a module of booleans.
    is_function = callable(value) and all(map(callable, jax.tree.leaves(value)))
    tree = value(params) if is_function else value
    needed = (
        f"{argument} must be a tree of booleans shaped like the parameters or a prefix "
        "of them"
    )
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, (bool, np.bool_)):
            shape = getattr(leaf, "shape", None)
            got = shown(leaf) if shape is None else f"an array of shape {shape}"
            raise TypeError(f"{needed}, got {got} in it.")
    structure = jax.tree.structure(tree)
    try:
        structure.flatten_up_to(params)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{needed}, {jax.tree.structure(params)}, got {structure}."
        ) from None
    return tree


def check_decay(name: str, value: Any, *, many: bool = False) -> Any:
    """Raises unless `value` is an array or a number in [0, 1)."""
    return check_number(name, value, at_least=0, below=1, many=many)


def check_key(key: Any) -> None:
    """Raises unless `key` is a PRNG key, typed or raw, or a number to make one from."""
    if not _is_key(key):
        check_whole("key", key, low=0, high=2**32 - 1)
        is_valid = not _is_array(key) or jnp.issubdtype(key.dtype, jnp.integer)
    elif jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        is_valid = key.ndim == 0
    else:
        is_valid = key.ndim == 1 and key.dtype == np.uint32
    if not is_valid:
        raise TypeError(
            f"{caller()}: key must be one PRNG key or a whole number, got an array "
            f"of shape {key.shape} and dtype {key.dtype}."
        )


def make_key(key: Any) -> jax.Array:
    """Returns `key`, which :func:`check_key` accepts, as a PRNG key.

    Call it only in ``init`` and ``update``. It uses a device, and
    ``jax.distributed.initialize`` fails after a device was used.
    """
    if _is_key(key):
        return jnp.asarray(key)
    return jax.random.key(key if _is_array(key) else int(key))


def _is_key(key: Any) -> bool:
    """Checks whether `key` is an array other than a scalar number."""
    return isinstance(key, (jax.Array, np.ndarray)) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim > 0
    )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(
            f"{caller()}: {name} must be one of {allowed}, got {shown(value)}."
        )


def check_names(
    name: str,
    value: Any,
    others: str = "",
    kind: str = "parts of paths",
) -> None:
    """Raises unless `value` is a collection of strings.

    The message also lists `others`, which the caller accepts.
    """
    if isinstance(value, str) or not (
        isinstance(value, Collection) and all(isinstance(x, str) for x in value)
    ):
        raise TypeError(
            f"{caller()}: {name} must be {others}a collection of names of {kind}, "
            f"got {shown(value)}."
        )


def check_learning_rate(value: Any) -> Any:
    """Raises unless `value` is a schedule, an array or a number >= 0."""
    if callable(value) and not isinstance(value, type):
        return value
    return check_number("learning_rate", value, at_least=0)


def check_reset(reset_interval: Any, grace_steps: Any = 0) -> tuple[Any, Any]:
    """Raises unless the interval is None or larger than `grace_steps`."""
    grace_steps = check_steps("grace_steps", grace_steps, low=0)
    if reset_interval is None:
        return None, grace_steps
    reset_interval = check_steps("reset_interval", reset_interval, low=1)
    known = not (_is_array(reset_interval) or _is_array(grace_steps))
    if known and grace_steps and reset_interval <= grace_steps:
        raise ValueError(
            f"{caller()}: reset_interval must be None or > grace_steps "
            f"({grace_steps}), or nothing would ever be clipped; "
            f"got {reset_interval!r}."
        )
    return reset_interval, grace_steps


def check_moment_dtype(name: str, dtype: Any) -> np.dtype[Any] | None:
    """Returns the canonical `dtype`. Raises unless it is None or a real float type.

    It must have 16 bits or more. `nu_dtype` must have the range of float32, because it
    stores squares.
    """
    if dtype is None:
        return None
    try:
        canonical = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        canonical = None
    if canonical is None or not jnp.issubdtype(canonical, jnp.floating):
        raise ValueError(
            f"{caller()}: {name} must be None or a floating dtype"
            f"{instead_of_optax(dtype)}, got {shown(dtype)}."
        )
    info = jnp.finfo(canonical)
    if info.bits < 16 or (name == "nu_dtype" and info.maxexp < 128):
        needed = "the range of float32" if name == "nu_dtype" else "16 bits or more"
        raise ValueError(
            f"{caller()}: {name} must be None or a floating dtype with {needed}, "
            f"got {dtype!r}."
        )
    return canonical


def check_inexact(
    path: tuple[Any, ...], leaf: Any, what: str = "parameter"
) -> np.dtype[Any]:
    """Returns the compute dtype of `leaf`. Raises if it is not floating or complex."""
    try:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    except TypeError as error:
        raise TypeError(
            f"{caller()}: the {what} at {place(path)} must be an array, got "
            f"{shown(leaf)}."
        ) from error
    if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{caller()}: the {what} at {place(path)} must have a floating or complex "
            f"dtype of 16 bits or more, got {dtype}."
        )
    # A float64 NumPy array is float32 in JAX without x64.
    return _arithmetic.promote_types(jax.dtypes.canonicalize_dtype(dtype), jnp.float32)


def _is_none(x: Any) -> bool:
    return x is None


def check_not_complex(updates: Any, mu: Any) -> None:
    """Raises if an update is complex and its parameter is real."""
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_none)
    others = jax.tree.leaves(mu, is_leaf=_is_none)
    for (path, g), m in zip(leaves, others, strict=True):
        if g is not None and jnp.iscomplexobj(g) and not jnp.iscomplexobj(m):
            raise TypeError(
                f"{caller()}: the update at {place(path)} must have a floating dtype "
                f"like its parameter, got {g.dtype}."
            )


def check_same_structure(updates: Any, moments: Any) -> list[tuple[Any, Any, Any]]:
    """Raises unless `updates` has the tree structure of `moments` and floating leaves.

    A leaf of `updates` may be None, for a parameter without a gradient. Floating
    includes complex.

    Returns:
      The path, the update and the moment of each leaf that is not None.
    """
    flatten = jax.tree_util.tree_flatten_with_path
    got, got_structure = flatten(updates, is_leaf=_is_none)
    want, want_structure = flatten(moments, is_leaf=_is_none)
    got_paths, want_paths = dict(got), dict(want)
    for path in [*want_paths, *got_paths]:
        has_update, has_moment = path in got_paths, path in want_paths
        if got_paths.get(path) is not None and want_paths.get(path) is None:
            has_moment = False  # The parameter is None.
        if has_update != has_moment:
            missing = "has no leaf" if has_moment else "has a leaf"
            other = "has one" if has_moment else "has none"
            raise ValueError(
                f"{caller()}: the tree of updates {missing} at {place(path)} where the "
                f"optimizer state {other}; pass gradients shaped like the parameters."
            )
    if got_structure != want_structure:
        raise ValueError(
            f"{caller()}: the tree of updates must have the containers of init's "
            f"parameters {want_structure}, got {got_structure}."
        )
    leaves = [(x, g, want_paths[x]) for x, g in got_paths.items() if g is not None]
    for path, update, _ in leaves:
        check_inexact(path, update, "update")
    return leaves


def check_same_tree(updates: Any, moments: Any) -> None:
    """Raises unless `updates` has the tree structure and the shapes of `moments`."""
    for path, update, moment in check_same_structure(updates, moments):
        if jnp.shape(update) != jnp.shape(moment):
            raise ValueError(
                f"{caller()}: the update at {place(path)} must have the shape "
                f"{jnp.shape(moment)} of its parameter, got {jnp.shape(update)}."
            )


def check_params(params: Any, updates: Any) -> None:
    """Raises unless `params` is None or has a floating leaf for every update.

    Floating includes complex.
    """
    if params is None:
        return
    flatten = jax.tree_util.tree_flatten_with_path
    leaves, structure = flatten(updates, is_leaf=_is_none)
    try:
        parameters = structure.flatten_up_to(params)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{caller()}: params must be a tree like the updates {structure}, got "
            f"{jax.tree.structure(params)}."
        ) from None
    for (path, update), p in zip(leaves, parameters, strict=True):
        if update is not None:
            check_inexact(path, p)


def check_tensors(updates: Any, number: int) -> None:
    """Raises unless `updates` has as many leaves as the parameters given to init."""
    got = len(jax.tree.leaves(updates))
    if got != number:
        raise ValueError(
            f"{caller()}: the tree of updates must have the {number} leaves of init's "
            f"parameters, got {got}."
        )
