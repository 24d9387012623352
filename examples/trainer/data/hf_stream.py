"""Data sets of the Hugging Face hub, and local folders like them, read as a stream.

The order is made in two steps, both of which resume exactly. The shards of the data
set, usually its files, come in an order that is drawn anew in every epoch. Documents
keep their order within a shard, because the `datasets` library loses its own shuffle
buffer on resuming. The windows cut from them are then shuffled within blocks of
`SHUFFLED`.
"""

import atexit
import hashlib
import itertools
import json
import logging
import os
import pathlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from trainer.data import text_files, tokenization
from trainer.data.shards import COLUMN, STRINGS, Shards, may_pass
from trainer.data.tokenization import Tokenizer
from trainer.errors import DataError, UsageError

PREFIX = "hf:"
SHUFFLED = 1024  # windows
ROWS = 1024  # of a Parquet file that are read at once
TOGETHER = 16  # documents that are read at once, to encode them on all cores


class Host(NamedTuple):
    """A process's share of every batch: part `index` of `count`."""

    index: int = 0
    count: int = 1


class Source(NamedTuple):
    """A data set with a split to train on and one to evaluate on."""

    train: Any  # datasets.IterableDataset
    validation: Any
    identity: str  # of the text: see `digest`
    shards: Shards  # reads both splits
    files: str  # their number and size, for people


def open_source(data: str, skip_bad_data: int = 0) -> Source:
    """Opens "hf:NAME" or "hf:NAME:CONFIGURATION"; NAME may be a local folder.

    Training takes the split "train"; evaluation "validation", else "test". Up to
    `skip_bad_data` shards may be broken: what cannot be read of them is left out.
    """
    shards = Shards(skip_bad_data)
    library = quiet_library()
    name, _, configuration = data.removeprefix(PREFIX).partition(":")
    if not name:
        raise UsageError(f"--data {data} must name a data set, as in hf:allenai/c4:en")
    if os.path.isdir(name):
        name = os.path.abspath(name)  # the library wants more than a dot
    elif not tokenization.hub_answers():
        raise UsageError(
            f"cannot read the data set {data}: there is no folder {name}, and"
            f" {tokenization.unreachable()}"
        )
    try:
        builder = library.load_dataset_builder(name, configuration or None)
        shards.guard(builder)
        splits = open_splits(builder, shards)
    except DataError as error:
        raise DataError(f"cannot use the data set {data}: {error}") from error
    except StopIteration as error:  # from looking for columns
        raise UsageError(f"the data set {data} begins with an empty file") from error
    except Exception as error:  # the library's, its HTTP client's, its file readers'
        raise UsageError(
            f"cannot read the data set {data}: {tokenization.first_line(error)}"
        ) from error
    held_out = "validation" if "validation" in splits else "test"
    for split in ("train", held_out):
        if split not in splits:
            needed = split if split == "train" else "validation or test"
            raise UsageError(
                f"the data set {data} has no split {needed}, only {', '.join(splits)}"
            )
    shards.opened = True
    firsts = [first_text(splits[split], data, split) for split in ("train", held_out)]
    identity = json.dumps([data_files(builder), *firsts])
    files = describe(builder, name)
    return Source(splits["train"], splits[held_out], identity, shards, files)


def open_splits(builder: Any, shards: Shards) -> dict[str, Any]:
    """Opens the splits, and makes the column of texts a text column.

    The library takes the columns from the first file, which may be broken, or hold
    something else.
    """
    files = next(paths_of(builder), [])
    if getattr(builder.config, "batch_size", 0) is None:
        builder.config.batch_size = ROWS  # else as many as its first part has, or none
    while True:
        try:
            splits = builder.as_streaming_dataset()
            break
        except Exception as error:  # as in `open_source`
            if isinstance(error, StopIteration) or not files or may_pass(error):
                raise
            shards.leave_out(files[0], 0, error)
            del files[0]
    features = builder.info.features or {}
    if COLUMN not in features or getattr(features[COLUMN], "dtype", 0) in STRINGS:
        return splits
    features[COLUMN] = quiet_library().Value("string")
    return builder.as_streaming_dataset()


def quiet_library() -> Any:
    """Imports the package datasets, without its progress bars and warnings."""
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise UsageError(
            "data sets of the Hugging Face hub take a package: pip install datasets"
        ) from error
    tokenization.quiet_hub()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it raises what it logs as errors
    return datasets


def first_text(dataset: Any, data: str, split: str) -> str:
    """Reads the first document of a split, to check that it can be used."""
    try:
        document = next(iter(dataset), None)
    except DataError as error:
        raise DataError(
            f"cannot use the split {split} of the data set {data}: {error}"
        ) from error
    except Exception as error:  # as in `open_source`
        raise UsageError(
            f"cannot read the split {split} of the data set {data}:"
            f" {tokenization.first_line(error)}"
        ) from error
    if document is None:
        raise UsageError(f"the split {split} of the data set {data} is empty")
    if COLUMN not in document:
        raise UsageError(
            f"the data set {data} has no column {COLUMN}, only {', '.join(document)}"
        )
    if not isinstance(document[COLUMN], str | None):
        raise UsageError(f"the column {COLUMN} of the data set {data} holds no text")
    return text_of(document)


def text_of(document: dict[str, Any]) -> str:
    return document[COLUMN] or ""  # JSON may have null there


def texts(dataset: Any) -> Iterator[str]:
    """Yields the documents of a split, once, in the order of its files."""
    return map(text_of, dataset)


def data_files(builder: Any) -> dict[str, list]:
    """Lists the files of a data set, those of a local folder with their sizes."""
    return {
        str(split): [
            (os.path.basename(path), os.path.getsize(path))
            if os.path.isfile(path)
            else path
            for path in paths
        ]
        for split, paths in (builder.config.data_files or {}).items()
    }


def describe(builder: Any, name: str) -> str:
    """Describes the number and size of the files, and how many are left out."""
    files = data_files(builder)
    counts = [f"files in {split}: {len(paths):,}" for split, paths in files.items()]
    text = ", ".join(counts) or "files: not known"
    if not os.path.isdir(name):
        return text
    used = {os.path.realpath(path) for path in itertools.chain(*paths_of(builder))}
    kinds = tuple({pathlib.Path(path).suffix for path in used})
    below = {
        os.path.realpath(path) for path in text_files.files_below(pathlib.Path(name))
    }
    others = sum(path.endswith(kinds) for path in below - used) if kinds else 0
    text += f", {sum(map(os.path.getsize, used)):,} bytes"
    left_out = f"; files left out (hidden, linked folders, no split): {others:,}"
    return text + (left_out if others else "")


def paths_of(builder: Any) -> Iterator[list[str]]:
    """Yields the files of each split."""
    yield from (builder.config.data_files or {}).values()


def digest(source: Source, tokenizer: Tokenizer) -> str:
    """Returns a digest of the tokenizer, and of what identifies the data set.

    A data set is identified by its revision on the hub, the names and sizes of local
    files, and the first document of each split.
    """
    return hashlib.sha256((tokenizer.digest + source.identity).encode()).hexdigest()


def joined(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields the tokens of each document, followed by the separator."""
    for tokens in tokenization.encode_all(tokenizer, documents):
        yield np.concatenate([tokens, tokenizer.separator])


def first_tokens(dataset: Any, tokenizer: Tokenizer, count: int) -> np.ndarray:
    """Returns the first `count` tokens of a split, or as many as there are."""
    arrays, found = [], 0
    for tokens in joined(tokenizer, texts(dataset)):
        arrays.append(tokens)
        found += len(tokens)
        if found >= count:
            break
    return np.concatenate(arrays)[:count]


def windows(
    source: Source, tokenizer: Tokenizer, length: int, seed: int, host: Host
) -> grain.IterDataset:
    """Returns this host's windows of ``length + 1`` tokens, endlessly.

    Each host gets shards of its own if they can be divided evenly, else documents.
    """
    library = quiet_library()

    def open_documents() -> Any:
        in_order = source.train.shuffle(seed, buffer_size=1, max_buffer_input_shards=1)
        return library.distributed.split_dataset_by_node(in_order, *host)

    return grain.experimental.WindowShuffleIterDataset(
        PackedWindows(open_documents, tokenizer, length, host, source.shards),
        window_size=SHUFFLED,
        seed=seed,
    )


class Prefetched(grain.IterDataset):
    """Makes up to `ready` elements ahead of their use, in a thread."""

    def __init__(self, parent: grain.IterDataset, ready: int):
        super().__init__(parent)
        self._ready = ready

    def __iter__(self) -> grain.DatasetIterator:
        return PrefetchedIterator(iter(self._parent), self._ready)


class PrefetchedIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """Closes itself, once, while the interpreter is still there to do it.

    Grain's iterator closes when it is collected, which may be too late, and every time
    that `close` is called.
    """

    def __init__(self, parent: grain.DatasetIterator, ready: int):
        super().__init__(parent, ready)
        atexit.register(close_if_alive, weakref.ref(self))

    def close(self) -> None:
        if not self._closed:
            super().close()


def close_if_alive(reference: weakref.ref) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


def endless(dataset: Any, state: dict) -> Iterator[tuple[str, dict]]:
    """Yields the documents from `state` on, endlessly, each with the state after it.

    `state` is what the `datasets` library calls the state of a data set.
    """
    dataset.load_state_dict(state)
    for epoch in itertools.count(state["epoch"]):
        dataset.set_epoch(epoch)
        empty = epoch > state["epoch"]  # the first one may have been at its end
        for document in dataset:
            empty = False
            yield text_of(document), dataset.state_dict()
        if empty:
            raise DataError(
                "there is no document for this host: the data set has fewer than there"
                " are hosts, or all are left out"
            )


class PackedWindows(grain.IterDataset):
    """Windows of ``length + 1`` tokens from documents joined by the separator.

    A window shares its last token with the next one of the stream.
    """

    def __init__(
        self,
        open_documents: Callable[[], Any],
        tokenizer: Tokenizer,
        length: int,
        host: Host,
        shards: Shards,
    ):
        super().__init__()
        self.open_documents = open_documents
        self.tokenizer = tokenizer
        self.length = length
        self.host = host
        self.shards = shards

    def __iter__(self) -> "PackedWindowsIterator":
        return PackedWindowsIterator(self)


class PackedWindowsIterator(grain.DatasetIterator):
    """Cuts windows from the tokens of a few documents at a time.

    Its state has three parts: where these documents begin, the tokens that were left
    over before them, and the position of the next window in both together. Fewer than
    ``length + 1`` tokens are left over, so the state is small however long a document.
    """

    def __init__(self, source: PackedWindows):
        super().__init__()
        self._source = source
        self._start(source.open_documents().state_dict(), [])

    def _start(self, documents_state: dict, tokens: list[int]) -> None:
        documents = self._source.open_documents()
        self._documents = endless(documents, documents_state)
        self._next_documents_state = documents_state
        self._tokens = np.array(tokens, self._source.tokenizer.dtype)
        self._position = 0
        self._state = {"documents": documents_state, "tokens": tokens}

    def _read(self) -> None:
        """Appends the next documents to the tokens that are left over."""
        rest = self._tokens[self._position :]
        self._state = {
            "documents": self._next_documents_state,
            "tokens": rest.tolist(),
        }
        documents = list(itertools.islice(self._documents, TOGETHER))
        self._next_documents_state = documents[-1][1]
        arrays = joined(self._source.tokenizer, (text for text, _ in documents))
        self._tokens = np.concatenate([rest, *arrays])
        self._position = 0

    def __next__(self) -> np.ndarray:
        length = self._source.length
        while len(self._tokens) - self._position <= length:
            self._read()
        start = self._position
        self._position += length
        return self._tokens[start : start + length + 1]

    def get_state(self) -> dict[str, Any]:
        return {
            **self._state,
            "position": self._position,
            "host": list(self._source.host),
            "left_out": self._source.shards.left_out.copy(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        host = Host(*state["host"])
        if host != self._source.host:
            raise UsageError(
                "a streamed data set continues only on as many hosts as before: it was"
                f" saved on {host.count}, this is host {self._source.host.index} of"
                f" {self._source.host.count}"
            )
        self._source.shards.left_out.update(state.get("left_out", {}))
        self._start(state["documents"], state["tokens"])
        self._read()
        self._position = state["position"]
