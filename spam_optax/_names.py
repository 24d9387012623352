"""The names of tensors, which are their paths in a tree."""

import jax


def tensor_name(path: tuple) -> str:
    """The parts of a path joined by ``/``, without the ``value`` of an NNX variable."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")
