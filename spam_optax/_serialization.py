"""Registers states as arguments of exported functions."""

import contextlib
from typing import Any

import jax
import jax.export

_types: dict[str, type] = {}  # By the name in the exported file.


def register_serialization(opt_state: Any) -> None:
    """Lets ``jax.export`` serialize functions that take or return such a state.

    Optimizer states are named tuples, in Optax too. ``jax.export`` raises an error for
    a named tuple that is not registered. Call this function before
    ``Exported.serialize``, and before ``jax.export.deserialize`` in the program that
    loads the function. You may call it again: a registered type does not change.

    A type is stored as its package and its name, ``spam_optax.ScaleBySpamState``, so
    that it may move to another module. ``serialize`` itself needs the package
    ``flatbuffers``.

    Checkpoints do not need this. They need a template: ``checkpointer.restore(path,
    jax.eval_shape(tx.init, params))``. Without one, Orbax returns dictionaries in place
    of the named tuples, with the leaves in another order. The following code restores
    the named tuples::

      template = jax.eval_shape(tx.init, params)
      name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
      leaves = {name(p): x for p, x in jax.tree_util.tree_leaves_with_path(restored)}
      state = jax.tree_util.tree_map_with_path(lambda p, _: leaves[name(p)], template)

    Args:
      opt_state: The state, or any tree that contains it: arrays, or the shapes that
        ``jax.eval_shape(tx.init, params)`` returns.

    Raises:
      ValueError: If another type of the same package has the same name.

    Examples:
      >>> import jax
      >>> import jax.export
      >>> import jax.numpy as jnp
      >>> import spam_optax
      >>> tx = spam_optax.spam(1e-3)
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state = tx.init(params)
      >>> spam_optax.register_serialization(state)
      >>> exported = jax.export.export(jax.jit(tx.update))(params, state, params)

      Then ``exported.serialize()`` works.
    """
    for node in jax.tree.leaves(opt_state, is_leaf=_is_named_tuple):
        if not _is_named_tuple(node):
            continue
        node_type = type(node)
        name = f"{node_type.__module__.partition('.')[0]}.{node_type.__qualname__}"
        if (other := _types.setdefault(name, node_type)) is not node_type:
            raise ValueError(
                f"register_serialization: types of a package must have different names,"
                f" got {name} for both {other.__module__} and {node_type.__module__}."
            )
        with contextlib.suppress(ValueError):  # It is registered already.
            jax.export.register_namedtuple_serialization(
                node_type, serialized_name=name
            )
        register_serialization(tuple(node))


def _is_named_tuple(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")
