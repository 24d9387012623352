"""What the path of a parameter tells about it."""

import re

import jax

NORMS = (
    *("bias", "scale", "norm", "layer_norm", "rms_norm", "group_norm", "batch_norm"),
    *("input_layernorm", "post_attention_layernorm", "final_norm", "ln", "ln_f"),
)
EMBEDDINGS = (
    *("embed", "embedder", "embedding", "embeddings", "scaled_embed", "normed_embed"),
    *("embed_tokens", "tok_embeddings", "token_embedding", "token_embed"),
    *("pos_embed", "pos_embedding", "position_embedding", "wte", "wpe"),
)
HEADS = ("head", "lm_head")
FACTORS = ("alpha",)  # Of WeSaR's layers.


def part_names(path: tuple) -> set[str]:
    """The parts of a path, and of keys that are paths: ``a/b``, ``a.b``, ``(a, b)``."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return {plain(part) for part in re.split(r"[/.,()\s\'\"]+", name)}


def plain(name: str) -> str:
    """In lower case, without underscores and without a number at its end."""
    return name.lower().replace("_", "").rstrip("0123456789")
