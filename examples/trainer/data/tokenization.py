"""Text to token ids: its bytes, a BPE trained on it, or a pretrained tokenizer."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import rich

from trainer.errors import UsageError
from trainer.files import replacing

END = "<|endoftext|>"
# What pretrained tokenizers call the end of a document. The token that a tokenizer
# declares is tried between the two lists: in a chat model it may be the end of a turn.
END_TOKENS = (END, "<|end_of_text|>", "</s>", "<eos>")
OTHER_END_TOKENS = ("[EOS]", "[SEP]", "<|eos|>", "<EOS>", "<sep>", "<|im_end|>")
RULES = "control tokens in a text are text"  # to change when a text gets other tokens
LONGEST_WORD = 256  # bytes, in a BPE: the time of training is quadratic in it
LARGEST = 2**20  # tokens of a BPE; for many more its package has no memory
TRAINING_CHARACTERS = 2**25  # of a text, at most, that a BPE is trained on


class Tokenizer(NamedTuple):
    """Turns text into token ids."""

    name: str  # as the user gave it
    vocabulary: int  # number of token ids
    end: int | None  # put between documents; None for bytes
    encode: Callable[[str], np.ndarray]  # smallest unsigned dtype for the vocabulary
    decode: Callable[[np.ndarray], str]  # for people; not always the inverse
    digest: str = ""  # of what it does, which may change under the same name

    @property
    def dtype(self) -> np.dtype:
        return np.min_scalar_type(self.vocabulary - 1)

    @property
    def separator(self) -> np.ndarray:
        """The tokens between two documents: the end token, or else a line end."""
        if self.end is not None:
            return np.array([self.end], self.dtype)
        tokens = self.encode("\n")
        if not len(tokens):
            raise UsageError(
                f"nothing would separate documents: the tokenizer {self.name} has no"
                " known end-of-document token, and drops line ends; name one of its"
                " tokens with --separator"
            )
        return tokens


def encode_bytes(text: str) -> np.ndarray:
    """Encodes `text` as bytes; surrogates stand for bytes that are not UTF-8."""
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def decode_bytes(tokens: np.ndarray) -> str:
    return tokens.astype(np.uint8).tobytes().decode("utf-8", "replace")


BYTES = Tokenizer("bytes", 256, None, encode_bytes, decode_bytes, "bytes")


def load(
    name: str,
    texts: Callable[[], Iterable[str]],
    cache: pathlib.Path,
    separator: str | None = None,
) -> Tokenizer:
    """Loads the tokenizer called `name`.

    Args:
      name: "bytes", the UTF-8 bytes; "bpe:SIZE", a byte-level BPE of at most SIZE
        tokens, trained on the beginning of the training text; the path of a
        tokenizer.json or of the folder it is in; or the name of a tokenizer on the
        Hugging Face hub.
      texts: Gives the training text in pieces, the same ones each time.
      cache: Folder that keeps trained tokenizers.
      separator: The token to put between documents. None: the first of `END_TOKENS`
        that the tokenizer has, else the end of text that it declares, else the first of
        `OTHER_END_TOKENS`, else a line end.
    """
    if name == BYTES.name:
        if separator is not None:
            raise UsageError(
                f"--separator {separator!r} must be a token, and bytes has no tokens of"
                " that kind: its documents are separated by the end of a line"
            )
        return BYTES
    if name.startswith("bpe:"):
        path = trained(size_of(name), texts, cache)
    elif name and os.path.isfile(inside := os.path.join(name, "tokenizer.json")):
        path = pathlib.Path(inside)
    elif name.endswith(".json") or os.path.isfile(name):
        path = pathlib.Path(name)
    else:
        path = pretrained(name)
    return read(name, path, separator)


def encode_all(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Encodes each of `texts`, in order, on all cores, holding a few at a time."""
    threads = os.cpu_count() or 1
    texts = iter(texts)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        while some := list(itertools.islice(texts, 2 * threads)):
            yield from pool.map(tokenizer.encode, some)


def library() -> Any:
    """Imports the package tokenizers, which every tokenizer but "bytes" needs."""
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "every tokenizer but bytes takes a package: pip install tokenizers"
        ) from error
    return tokenizers


def read(name: str, path: pathlib.Path, separator: str | None = None) -> Tokenizer:
    """Reads the tokenizer in a tokenizer.json.

    A control token that is spelled out in a text is encoded as ordinary text, so no
    document can contain the token for the end of a document.
    """
    tokenizers = library()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower class
        raise UsageError(
            f"cannot read the tokenizer {path}: {first_line(error)}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    content = json.loads(tokenizer.to_str())
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise UsageError(f"the tokenizer {path} has no tokens")
    vocabulary = max(ids.values()) + 1
    dtype = np.min_scalar_type(vocabulary - 1)

    end = ids.get(end_token(ids, content, path, separator))
    spelt = spellings(ids, content, end)
    controls = np.array(list(spelt), dtype)

    def encode(text: str) -> np.ndarray:
        try:
            # Unlike `encode`, this lets other threads run.
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # as above
            raise UsageError(
                f"the tokenizer {path} cannot encode the text: {first_line(error)}"
            ) from error
        tokens = np.array(encoding.ids, dtype)
        if np.isin(tokens, controls).any():
            parts = [spelt.get(token, [token]) for token in encoding.ids]
            tokens = np.array(list(itertools.chain(*parts)), dtype)
        return tokens

    rules = json.dumps([RULES, end, tokenizer.to_str()])
    digest = hashlib.sha256(rules.encode()).hexdigest()

    def decode(tokens: np.ndarray) -> str:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    return Tokenizer(name, vocabulary, end, encode, decode, digest)


def end_token(
    ids: dict[str, int], content: dict, path: pathlib.Path, separator: str | None
) -> str | None:
    """Returns the token that ends a document, or None if none is known."""
    if separator is not None:
        if separator not in ids:
            some = ", ".join(control_tokens(content)[:5]) or next(iter(ids))
            raise UsageError(
                f"--separator {separator!r} must be a token of the tokenizer {path},"
                f" such as {some}"
            )
        return separator
    declared = declared_end(path), last_of_template(content["post_processor"])
    names = *END_TOKENS, *declared, *OTHER_END_TOKENS
    return next((name for name in names if isinstance(name, str) and name in ids), None)


def control_tokens(content: dict) -> list[str]:
    """Returns the control tokens of a tokenizer.json."""
    return [token["content"] for token in content["added_tokens"] if token["special"]]


def declared_end(path: pathlib.Path) -> str | None:
    """Returns the end of text that the tokenizer_config.json beside it declares."""
    try:
        beside = path.with_name("tokenizer_config.json").read_text(encoding="utf-8")
        token = json.loads(beside).get("eos_token")
    except (AttributeError, OSError, ValueError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def last_of_template(processor: dict | None) -> str | None:
    """Returns the control token that a tokenizer.json puts after a text, if any."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        ends = map(last_of_template, processor["processors"])
        return next(filter(None, ends), None)
    if "sep" in processor:  # of BERT and RoBERTa
        return processor["sep"][0]
    last = (processor.get("single") or [{}])[-1]
    return last.get("SpecialToken", {}).get("id")


def spellings(
    ids: dict[str, int], content: dict, end: int | None
) -> dict[int, list[int]]:
    """Maps the id of each control token to the tokens of its characters.

    These replace the control tokens that a unigram model finds in a text even when it
    is told not to, since they are among its pieces. The token for unknown characters is
    left out, since it stands for parts of a text.
    """
    model = content["model"]
    unknown = {model.get("unk_token"), model.get("unk_id")}
    names = {token: i for token, i in ids.items() if i == end}
    names |= {token: ids[token] for token in control_tokens(content)}
    return {
        i: [ids[character] for character in token if character in ids]
        for token, i in names.items()
        if not unknown & {token, i}
    }


# ------------------------------------------------------------------------ trained


def size_of(name: str) -> int:
    """Returns the number in "bpe:8192"."""
    size = name.removeprefix("bpe:")
    if not size.isdecimal() or not 257 <= int(size) <= LARGEST:
        raise UsageError(
            f"{name} is no tokenizer: write bpe:SIZE, as in bpe:8192, with at least"
            " 257 tokens, one for each byte and one for the end of a document, and at"
            f" most {LARGEST}"
        )
    return int(size)


def trained(
    size: int, texts: Callable[[], Iterable[str]], cache: pathlib.Path
) -> pathlib.Path:
    """Returns the file of a BPE trained on `texts`; trains it if it is not there."""
    key = digest_of(itertools.chain([RULES, str(LONGEST_WORD)], beginning(texts())))
    path = cache / f"bpe-{size}-{key[:32]}.json"
    if path.is_file():
        return path
    tokenizer = train(size, beginning(texts()))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(tokenizer.to_str(), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write the trained tokenizer to {cache}: {error.strerror}"
        ) from error
    return path


def train(size: int, texts: Iterable[str]) -> Any:
    """Trains a byte-level BPE, from which every text comes back exactly.

    Words longer than `LONGEST_WORD` bytes are cut, since a text without spaces would be
    one word.
    """
    tokenizers = library()
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            byte_level(add_prefix_space=False),
            tokenizers.pre_tokenizers.FixedLength(LONGEST_WORD),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    with rich.get_console().status(f"training a tokenizer of {size} tokens"):
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def beginning(texts: Iterable[str]) -> Iterator[str]:
    """Yields the first texts, as many as a BPE is trained on."""
    left = TRAINING_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            break


def digest_of(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\xff")  # not in UTF-8
    return digest.hexdigest()


# --------------------------------------------------------------------- pretrained


def pretrained(name: str) -> pathlib.Path:
    """Returns a tokenizer.json from the hub, downloaded now or before.

    Without a connection only the latter.
    """
    library()
    hub = quiet_hub()
    connected = hub_answers()
    try:
        path = hub.hf_hub_download(
            name, "tokenizer.json", local_files_only=not connected
        )
        with contextlib.suppress(Exception):  # few need it, and not all have it
            hub.hf_hub_download(
                name, "tokenizer_config.json", local_files_only=not connected
            )
    except Exception as error:  # the hub's, the operating system's, the HTTP client's
        reason = first_line(error)
        if not connected and isinstance(error, FileNotFoundError):
            reason = f"it was never downloaded, and {unreachable()}"
        raise UsageError(
            f"cannot load the tokenizer {name}, which is not bytes, bpe:SIZE or a file,"
            f" from the Hugging Face hub: {reason}"
        ) from error
    return pathlib.Path(path)


def quiet_hub() -> Any:
    """Imports the package huggingface_hub, without its progress bars and warnings."""
    import huggingface_hub.constants
    import huggingface_hub.utils

    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub


def hub_answers() -> bool:
    """Returns whether the Hugging Face hub can be reached.

    This is checked first, because the hub's own client would try for half a minute.
    """
    hub = quiet_hub()
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever HTTP client the package uses
        return False
    return True


def unreachable() -> str:
    return f"{quiet_hub().constants.ENDPOINT} cannot be reached"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
