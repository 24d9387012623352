"""Pre-trained models: checkpoints of pretrain.py, and LLaMAs of Hugging Face."""

import contextlib
import functools
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax
from etils import epath

import spam_optax
from trainer import data, model, optimizers, sharding, train_step
from trainer.checkpoints import Checkpoints
from trainer.data import text_files, tokenization
from trainer.errors import UsageError
from trainer.model import ModelConfig
from trainer.output import console
from trainer.run_folder import RunFolder

ANY_STEP = 2**31 - 1


class Pretrained(NamedTuple):
    """A model with trained parameters, and what it was trained on."""

    model: ModelConfig
    params: optax.Params  # float32 NumPy arrays
    tokenizer: str  # see tokenization.load
    separator: str | None = None
    data: str | None = None  # text files; None: they are not known

    @property
    def digest(self) -> str:
        """Returns a digest of the model and its parameters."""
        result = hashlib.sha256(f"{self.model}".encode())
        for leaf in jax.tree.leaves(self.params):
            result.update(np.ascontiguousarray(leaf).data)
        return result.hexdigest()


def read(folder: pathlib.Path, tokenizer: str | None = None) -> Pretrained:
    """Reads the pre-trained model in a folder.

    Args:
      folder: The folder of a run of pretrain.py, or of one of its optimizers; or a
        folder of Hugging Face's with config.json and safetensors, or the
        flax_model.msgpack, of a LLaMA.
      tokenizer: The name of its tokenizer. None: the one of the run, or the
        tokenizer.json in the folder.

    Raises:
      UsageError: If there is no such model, or it does not fit.
    """
    top = folder if (folder / "config.json").is_file() else folder.parent.parent
    try:
        content = json.loads((top / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"there is no checkpoint in {folder}: cannot read its config.json: {reason}"
        ) from error
    if isinstance(content, dict) and "hidden_size" in content:
        return read_hugging_face(folder, content, tokenizer)
    return read_run(folder, top, tokenizer)


# ------------------------------------------------------------------------ pretrain.py


def read_run(
    folder: pathlib.Path, top: pathlib.Path, tokenizer: str | None
) -> Pretrained:
    """Reads the newest checkpoint of a run of pretrain.py."""
    files = RunFolder(top)
    with contextlib.closing(files):
        run = files.read()
        files.lock()
        config = run.config
        below = epath.Path(run.checkpoints or files.checkpoints)
        names = [folder.name]
        if folder == top:
            names = [name for name in config.optimizers if (below / name).exists()]
        if len(names) != 1 or not (below / names[0]).exists():
            found = ", ".join(f"{below / name}" for name in names) or "none"
            raise UsageError(f"{folder} must have one checkpoint, not these: {found}")
        vocabulary, name = tokenizer_of(run, tokenizer)
        shape = model.for_platform(config.model, vocabulary, jax.default_backend())
        mesh = sharding.make_mesh(sharding.Parallelism(data=1), 1)
        task = train_step.make_task(config, shape, mesh)
        optimizer = optimizers.make(names[0], config)
        make = functools.partial(train_step.initial_state, task, optimizer)
        like = sharding.abstract(jax.eval_shape(make), mesh)
        with Checkpoints(str(below / names[0]), config.keep_checkpoints) as saved:
            restored = saved.restore(like, ANY_STEP, console.warn)
    if restored is None:
        raise UsageError(f"there is no checkpoint in {below / names[0]}")
    params = jax.device_get(restored[0].params)
    known = None if data.is_streamed(config) else config.data or text_files.SHAKESPEARE
    return Pretrained(shape, params, name, config.separator, known and str(known))


def tokenizer_of(run: Any, name: str | None) -> tuple[int, str]:
    """Returns the vocabulary of a run, and a name of its tokenizer for other texts.

    The name of a BPE is the path of its file, since it is trained on its text.
    """
    config = run.config
    name = name or config.tokenizer
    if data.is_streamed(config):
        if name.startswith("bpe:"):
            raise UsageError(
                f"the tokenizer {name} was trained on a stream: name the tokenizer.json"
                " that the run kept with --tokenizer"
            )
        loaded = tokenization.load(
            name, lambda: (), text_files.user_cache(), config.separator
        )
        return loaded.vocabulary, name
    loaded, _, digest = text_files.load(config.data, name, config.separator)
    if digest != run.data_digest:
        raise UsageError("the text or the tokenizer of the checkpoint has changed")
    if name.startswith("bpe:"):
        spans = text_files.whole(text_files.find(config.data))
        train, _ = text_files.split_spans(spans)
        name = tokenization.trained(
            tokenization.size_of(name),
            lambda: text_files.texts(train),
            text_files.cache_folder(spans[0].path),
        )
    return loaded.vocabulary, str(name)


# ----------------------------------------------------------------------- Hugging Face


def read_hugging_face(
    folder: pathlib.Path, content: dict[str, Any], tokenizer: str | None
) -> Pretrained:
    """Reads a LLaMA from config.json and the tensors beside it."""
    try:
        shape = shape_of(content)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(
            f"{folder / 'config.json'} is not that of a LLaMA"
            f" ({type(error).__name__}: {error})"
        ) from error
    except UsageError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from error
    if tokenizer is None:
        tokenizer = str(folder / "tokenizer.json")
        if not (folder / "tokenizer.json").is_file():
            raise UsageError(f"there is no {tokenizer}: name one with --tokenizer")
    key_heads = content.get("num_key_value_heads") or shape.heads
    params = from_llama(read_tensors(folder), shape, key_heads, folder)
    return Pretrained(shape, params, tokenizer)


def shape_of(content: dict[str, Any]) -> ModelConfig:
    """Returns the model that a config.json describes.

    Raises:
      UsageError: If it is not one that this model can compute.
    """
    rotary = content.get("rope_parameters") or content.get("rope_scaling") or {}
    width, heads = content["hidden_size"], content["num_attention_heads"]
    divisors = (n for n in range(heads, 0, -1) if heads % n == 0)
    expected = {
        "num_key_value_heads": (content.get("num_key_value_heads"), (*divisors, None)),
        "model_type": (content.get("model_type"), ("llama", "mistral")),
        "hidden_act": (content.get("hidden_act", "silu"), ("silu", "swish")),
        "rope_type": (rotary.get("rope_type", rotary.get("type")), ("default", None)),
        "head_dim": (content.get("head_dim"), (width // heads, None)),
    }
    for name, (value, accepted) in expected.items():
        if value not in accepted:
            raise UsageError(f"{name} must be {accepted[0]!r}, not {value!r}")
    return ModelConfig(
        layers=content["num_hidden_layers"],
        width=width,
        heads=heads,
        ffn_width=content["intermediate_size"],
        vocabulary=content["vocab_size"],
        untied_head=not content.get("tie_word_embeddings", False),
        rotary_base=content.get("rope_theta", rotary.get("rope_theta", 10_000.0)),
        norm_epsilon=content.get("rms_norm_eps", 1e-6),
    )


def read_tensors(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the tensors of all safetensors files in a folder, or those of Flax."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths and (folder / "flax_model.msgpack").exists():
        return read_flax(folder / "flax_model.msgpack")
    if not paths:
        raise UsageError(
            f"there is no .safetensors file in {folder}, and no flax_model.msgpack"
        )
    try:
        import safetensors
        import safetensors.flax
    except ModuleNotFoundError as error:
        raise UsageError(
            "checkpoints of Hugging Face take a package: pip install safetensors"
        ) from error
    tensors = {}
    for path in paths:
        try:
            tensors |= safetensors.flax.load_file(path)
        except safetensors.SafetensorError as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
    return tensors


def read_flax(path: pathlib.Path) -> dict[str, Any]:
    """Reads a Flax checkpoint of Hugging Face as if it were safetensors.

    Kernels of Flax have the inputs first. Safetensors have the outputs first, and call
    kernels and embeddings weights.
    """
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        flat = flax.traverse_util.flatten_dict(tree, sep=".")
    except Exception as error:  # msgpack and Flax raise errors of many types
        raise UsageError(f"{path} cannot be read: {error}") from error
    tensors = {}
    for name, value in flat.items():
        if not isinstance(value, np.ndarray):
            raise UsageError(f"{path} cannot be read: {name} is not an array")
        stem, dot, last = name.rpartition(".")
        value = value.T if last == "kernel" else value
        last = "weight" if last in ("kernel", "embedding") else last
        tensors[f"{stem}{dot}{last}"] = value
    return tensors


LLAMA_NAMES = {
    "embed/embedding": "model.embed_tokens",
    "norm/scale": "model.norm",
    "head/kernel": "lm_head",
    "blocks/attention_norm/scale": "input_layernorm",
    "blocks/attention/query/kernel": "self_attn.q_proj",
    "blocks/attention/key/kernel": "self_attn.k_proj",
    "blocks/attention/value/kernel": "self_attn.v_proj",
    "blocks/attention/out/kernel": "self_attn.o_proj",
    "blocks/ffn_norm/scale": "post_attention_layernorm",
    "blocks/ffn/gate/kernel": "mlp.gate_proj",
    "blocks/ffn/up/kernel": "mlp.up_proj",
    "blocks/ffn/down/kernel": "mlp.down_proj",
}
# Those of which several heads may have one.
SHARED = ("blocks/attention/key/kernel", "blocks/attention/value/kernel")


def from_llama(
    tensors: dict[str, jax.Array], shape: ModelConfig, key_heads: int, where: Any
) -> optax.Params:
    """Returns our parameters, in float32, made of the tensors of a LLaMA.

    Both turn the same pairs of features of queries and keys. Hugging Face's matrices
    have the outputs first, and kernels here have the inputs first. Keys and values that
    several heads share are repeated, which gives the same outputs and more parameters.
    """
    _, expected = model.abstract(shape)
    leaves, structure = jax.tree.flatten(expected)
    names = spam_optax.tensor_names(expected)
    shared = shape.heads // key_heads

    def llama_shape(name: str, like: tuple[int, ...]) -> tuple[int, ...]:
        like = like[1:] if name.startswith("blocks/") else like
        rows, *columns = like[::-1] if name.endswith("kernel") else like
        return (rows // shared if name in SHARED else rows, *columns)

    wanted = {
        part: llama_shape(name, leaf.shape)
        for name, leaf in zip(names, leaves, strict=True)
        for part in llama_names(name, shape.layers)
    }
    check_names({name: x.shape for name, x in tensors.items()}, wanted, where)

    def convert(name: str, part: str) -> np.ndarray:
        value = np.asarray(tensors[part], np.float32)
        if name in SHARED:
            by_head = value.reshape(key_heads, -1, value.shape[1])
            value = by_head.repeat(shared, axis=0).reshape(-1, value.shape[1])
        return value.T if name.endswith("kernel") else value

    made = []
    for name, leaf in zip(names, leaves, strict=True):
        parts = [convert(name, part) for part in llama_names(name, shape.layers)]
        made.append(np.stack(parts).reshape(leaf.shape))
    return structure.unflatten(made)


def llama_names(name: str, layers: int) -> list[str]:
    """Returns Hugging Face's names of one of our tensors, which may be stacked."""
    own = LLAMA_NAMES[name]
    if not name.startswith("blocks/"):
        return [f"{own}.weight"]
    return [f"model.layers.{n}.{own}.weight" for n in range(layers)]


def check_names(given: dict[str, tuple], wanted: dict[str, tuple], where: Any) -> None:
    """Checks names and shapes of tensors.

    Some checkpoints have the head of a tied embedding, or angles of positions.
    """
    unknown = sorted(given.keys() - wanted.keys() - {"lm_head.weight"})
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unknown": [x for x in unknown if not x.endswith("rotary_emb.inv_freq")],
        "of another shape": [
            f"{name} {given[name]}"
            for name in wanted
            if given.get(name, wanted[name]) != wanted[name]
        ],
    }
    texts = [f"{problem}: {listed(x)}" for problem, x in problems.items() if x]
    if texts:
        raise UsageError(
            f"the tensors in {where} do not fit its config.json; {'; '.join(texts)}"
        )


def listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
