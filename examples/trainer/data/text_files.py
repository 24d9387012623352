"""Text files: split, encoded, and cut into batches by step number."""

import codecs
import contextlib
import glob
import hashlib
import itertools
import lzma
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple, NoReturn

import grain
import numpy as np
import rich.progress

from trainer.data import tokenization
from trainer.data.tokenization import BYTES, Tokenizer
from trainer.errors import DataError, UsageError
from trainer.files import replacing

DATA = pathlib.Path(__file__).parents[2] / "data"
SHAKESPEARE = DATA / "shakespeare.txt"
PROSE = DATA / "prose_pd.txt.xz"
# The first bytes of files that are not text.
PACKED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "Zstandard",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}
PIECE = 2**18  # bytes of a file that are read at once
LARGE = 2**24  # bytes of text that take long enough to encode for a progress bar


class Corpus(NamedTuple):
    """Two contiguous parts of one text, as tokens."""

    train: np.ndarray
    validation: np.ndarray


def split(text: bytes | np.ndarray, validation_fraction: float = 0.1) -> Corpus:
    """Keeps the end of `text`, bytes or an array of tokens, for validation.

    Both parts are contiguous. If windows were chosen at random, neighboring windows of
    one page would be in both parts, and memorizing would look like generalizing.
    """
    tokens = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text
    end = training_length(len(tokens), validation_fraction)
    return Corpus(tokens[:end], tokens[end:])


def training_length(length: int, validation_fraction: float = 0.1) -> int:
    """Returns the length of the training part of a text."""
    return length - round(length * validation_fraction)


class Windows:
    """Windows of `length` inputs and, shifted by one token, `length` targets.

    A Grain data source. A window holds ``length + 1`` tokens and shares its last one
    with the next, so every token but the first is a target exactly once.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens = tokens
        self._length = length

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._length
        return self._tokens[start : start + self._length + 1]


def shuffled_windows(tokens: np.ndarray, length: int, seed: int) -> grain.MapDataset:
    """Returns all windows, endlessly, in an order that is drawn anew in every epoch."""
    windows = grain.MapDataset.source(Windows(tokens, length))
    return windows.seed(seed).shuffle().repeat()


def batched(
    windows: grain.MapDataset | grain.IterDataset, *sizes: int
) -> grain.MapDataset | grain.IterDataset:
    """Stacks `windows`, as many as the first size, then these stacks, and so on."""
    for size in sizes:
        # Grain computes the length of an endless data set exactly only this way.
        windows = windows.batch(size, drop_remainder=True)
    return windows


def batches(
    tokens: np.ndarray, length: int, batch_size: int, seed: int
) -> grain.MapDataset:
    """Returns shuffled training batches of shape ``(batch_size, length + 1)``.

    Batch number `n` is ``batches(...)[n]``, a pure function of the seed and `n`: the
    step number is the whole state of the data iterator. The order is drawn anew in
    every epoch. A batch of 16 windows takes about 1 ms.
    """
    return batched(shuffled_windows(tokens, length, seed), batch_size)


def evaluation_batches(
    tokens: np.ndarray, length: int, batch_size: int, limit: int
) -> np.ndarray:
    """Stacks up to `limit` evenly spaced windows.

    A text with fewer windows than `batch_size` makes one smaller batch.
    """
    windows = Windows(tokens, length)
    count = min(limit, len(windows))
    batch_size = min(batch_size, count)
    count -= count % batch_size
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    stacked = np.stack([windows[index] for index in chosen])
    return stacked.reshape(-1, batch_size, length + 1)


# -------------------------------------------------------------------------- files


class Span(NamedTuple):
    """A part of a file."""

    path: pathlib.Path
    start: int  # bytes
    stop: int


def find(data: str | None) -> list[pathlib.Path]:
    """Finds the files that `data` names: a file, a folder of .txt files, or a pattern.

    Hidden files are left out, links are followed, and no file is taken twice.
    """
    return look_up(data)[0]


def look_up(data: str | None) -> tuple[list[pathlib.Path], int]:
    """Finds the files that `data` names, and counts the hidden ones left out."""
    if data is None:
        return [SHAKESPEARE], 0
    if not data:
        raise UsageError("--data must name a file, a folder or a pattern, not ''")
    path = pathlib.Path(data)
    if os.path.isdir(path):  # unlike pathlib's, False for a name that is too long
        below = [file for file in files_below(path) if file.suffix == ".txt"]
        found = [file for file in below if not is_hidden(file.relative_to(path))]
        missing = f"there is no .txt file in the folder {data}"
    elif os.path.exists(path) or not glob.has_magic(data):
        return [unpacked(path) if path.suffix == ".xz" else path], 0
    else:
        below, found = (list(matching(data, hidden)) for hidden in (True, False))
        missing = f"there is no file like {data}"
    for path in found:
        if path.is_symlink() and not os.path.exists(path):
            raise UsageError(f"the link {path} leads to no file")
    files = each_once(found)
    hidden = len(each_once(below)) - len(files)
    if not files:
        left_out = f"; hidden files left out: {hidden:,}" if hidden else ""
        raise UsageError(missing + left_out)
    return files, hidden


def matching(pattern: str, hidden: bool) -> Iterator[pathlib.Path]:
    """Yields the paths that a pattern names; ** visits every folder once.

    The package glob would follow a link to a parent folder round and round.
    """
    parts = pathlib.PurePath(pattern).parts
    if "**" not in parts:
        yield from map(pathlib.Path, glob.glob(pattern, include_hidden=hidden))
        return
    place = parts.index("**")
    rest = parts[place + 1 :] or ("*",)
    for top in matching(str(pathlib.Path(*parts[:place])), hidden):
        for folder, _ in folders_below(top):
            if hidden or not is_hidden(folder.relative_to(top)):
                inner = pathlib.Path(glob.escape(str(folder)), *rest)
                yield from matching(str(inner), hidden)


def files_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files in `folder` and below."""
    for inner, files in folders_below(folder):
        yield from (inner / file for file in files)


def folders_below(
    folder: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """Yields the folder and those below, each once, with the names of their files.

    Linked folders come last, so that a file is found under its own path first.
    """
    waiting, seen = [folder], set()
    while waiting:
        for name, folders, files in os.walk(waiting.pop(0), onerror=refuse):
            here = os.path.realpath(name)
            if here in seen:
                folders.clear()
                continue
            seen.add(here)
            paths = [pathlib.Path(name, inner) for inner in sorted(folders)]
            waiting += [path for path in paths if path.is_symlink()]
            yield pathlib.Path(name), files


def refuse(error: OSError) -> NoReturn:
    raise UsageError(f"cannot read the folder {error.filename}: {error.strerror}")


def is_hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def each_once(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the files among `paths`, sorted, each once.

    A link counts only if the file that it leads to is not among them.
    """
    by_file = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path)):
        if path.is_file():
            by_file.setdefault(os.path.realpath(path), path)
    return sorted(by_file.values())


def describe(data: str | None) -> str:
    """Describes the number and size of the files that `data` names."""
    files, hidden = look_up(data)
    size = sum(span.stop for span in whole(files))
    text = f"{len(files):,} file{'s' * (len(files) > 1)}, {size:,} bytes"
    return text + (f"; hidden files left out: {hidden:,}" if hidden else "")


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot read the data file {path}: {error.strerror or error}"
        ) from error


def unpacked(path: pathlib.Path) -> pathlib.Path:
    """Unpacks an .xz file into the user's cache, if it is not there yet."""
    try:
        with path.open("rb") as packed:
            digest = hashlib.file_digest(packed, "sha256").hexdigest()
        text = user_cache() / f"{path.stem}-{digest[:16]}"
        if not text.is_file():
            text.parent.mkdir(parents=True, exist_ok=True)
            with (
                lzma.open(path) as packed,
                replacing(text) as temporary,
                temporary.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file)
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot unpack the data file {path}: {reason}") from error
    return text


def whole(paths: Sequence[pathlib.Path]) -> list[Span]:
    """Returns a span of all of every file."""
    spans = []
    for path in paths:
        with reading(path), path.open("rb") as file:
            check_is_text(path, file.read(8))
            spans.append(Span(path, 0, file.seek(0, os.SEEK_END)))
    if not any(span.stop for span in spans):
        raise UsageError(f"the data file {paths[0]} is empty")
    return spans


def check_is_text(path: pathlib.Path, beginning: bytes) -> None:
    for signature, kind in PACKED.items():
        if beginning.startswith(signature):
            raise UsageError(
                f"the data file {path} is not text but {kind}: unpack it, or read a"
                f" data set of such files with --data hf:{path.absolute().parent}"
            )


def split_spans(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Splits the text before it is encoded, so that every tokenizer has the same split.

    The boundary moves to the start of the character that it would cut.
    """
    left = training_length(sum(span.stop for span in spans))
    train, validation = [], []
    for path, start, stop in spans:
        cut = min(left, stop)
        left -= cut
        if start < cut < stop:
            cut = start_of_character(path, cut)
        if start < cut:
            train.append(Span(path, start, cut))
        if cut < stop:
            validation.append(Span(path, cut, stop))
    return train, validation


def start_of_character(path: pathlib.Path, position: int) -> int:
    """Returns where the UTF-8 character with the byte at `position` starts."""
    with reading(path), path.open("rb") as file:
        for start in range(position, max(0, position - 3) - 1, -1):
            file.seek(start)
            if int.from_bytes(file.read(1)) & 0b1100_0000 != 0b1000_0000:
                return start
    return position


def pieces(span: Span, errors: str = "strict") -> Iterator[str]:
    """Yields the text of `span` in pieces, which end with a line if they can."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    with reading(span.path), span.path.open("rb") as file:
        file.seek(span.start)
        while piece := file.read(min(PIECE, span.stop - file.tell())):
            piece += file.readline(min(PIECE, span.stop - file.tell()))
            try:
                text = decoder.decode(piece, final=file.tell() == span.stop)
            except UnicodeDecodeError as error:
                position = file.tell() - len(error.object) + error.start
                raise DataError(
                    f"{span.path} is not UTF-8 text, which every tokenizer but bytes"
                    f" needs: {error.reason} at byte {position}"
                ) from error
            yield text
        if file.tell() < span.stop:
            raise DataError(f"{span.path} became shorter while it was read")


def texts(spans: Sequence[Span]) -> Iterator[str]:
    """Yields the text of all `spans`, in pieces."""
    return itertools.chain.from_iterable(map(pieces, spans))


def encoded(spans: Sequence[Span], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the tokens of all `spans`, with a separator between two files."""
    errors = "surrogateescape" if tokenizer == BYTES else "strict"
    for number, span in enumerate(spans):
        if number:
            yield tokenizer.separator
        yield from tokenization.encode_all(tokenizer, pieces(span, errors))


def cached(
    spans: Sequence[Span], tokenizer: Tokenizer, path: pathlib.Path
) -> np.ndarray:
    """Returns the tokens of all `spans`, mapped from the file `path`.

    If there is no such file they are encoded first.
    """
    if not is_array(path):
        size = sum(span.stop - span.start for span in spans)
        arrays = rich.progress.track(
            encoded(spans, tokenizer),
            f"encoding with {tokenizer.name}",
            total=size / PIECE,
            transient=True,
            disable=size < LARGE or not sys.stdout.isatty(),
        )
        try:
            write_tokens(path, arrays, tokenizer.dtype)
        except OSError as error:
            raise UsageError(
                f"cannot write the encoded text to {path.parent}: {error.strerror}"
            ) from error
    return np.asarray(np.load(path, mmap_mode="r"))


def is_array(path: pathlib.Path) -> bool:
    """Returns whether the file exists and holds a complete array."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return True


def write_tokens(
    path: pathlib.Path, arrays: Iterable[np.ndarray], dtype: np.dtype
) -> None:
    """Writes the arrays, one after the other, as one .npy file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_header(file, 0, dtype)
        count = 0
        for tokens in arrays:
            file.write(tokens.data)
            count += len(tokens)
        file.seek(0)
        write_header(file, count, dtype)


def write_header(file: BinaryIO, count: int, dtype: np.dtype) -> None:
    """Begins a .npy file of `count` tokens; NumPy leaves room for any count."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (count,),
    }
    np.lib.format.write_array_header_1_0(file, header)


def digest(spans: Sequence[Span], tokenizer: Tokenizer) -> str:
    """Returns a digest of the text and of the tokenizer."""
    result = hashlib.sha256(tokenizer.digest.encode())
    for span in spans:
        with reading(span.path), span.path.open("rb") as file:
            result.update(hashlib.file_digest(file, "sha256").digest())
    return result.hexdigest()


def text_digest(data: str | None) -> str:
    """Returns a digest of the text that `data` names."""
    return digest(whole(find(data)), BYTES)


def cache_folder(path: pathlib.Path) -> pathlib.Path:
    """Returns the folder that keeps what is computed from the text at `path`.

    The folder is beside the text if it can be written, and hidden from patterns like
    data/*. Otherwise, and for the embedded text, it is in the user's cache.
    """
    beside = [] if path == SHAKESPEARE else [path.parent / ".tokens"]
    for folder in (*beside, user_cache()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            reason = error
    raise UsageError(
        f"cannot write the encoded text to {folder}: {reason.strerror}; the variable"
        " XDG_CACHE_HOME can name another folder"
    ) from reason


def user_cache() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "spam_optax"


def load(
    data: str | None, name: str, separator: str | None = None
) -> tuple[Tokenizer, Corpus, str]:
    """Loads the tokenizer called `name`, the text files' tokens, and a digest of both.

    The token `separator`, or else the tokenizer's own, stands between two files.

    The bytes of a single file are read into memory. A mapped file would change under
    the run, and would end the program if it became shorter. Everything else is encoded
    once, and from then on mapped from the cache.
    """
    spans = whole(find(data))
    if name == BYTES.name and len(spans) == 1 and separator is None:
        with reading(spans[0].path):
            tokens = np.fromfile(spans[0].path, np.uint8)
        return BYTES, split(tokens), digest(spans, BYTES)
    train, validation = split_spans(spans)
    folder = cache_folder(spans[0].path)
    tokenizer = tokenization.load(name, lambda: texts(train), folder, separator)
    key = digest(spans, tokenizer)
    parts = {"train": train, "validation": validation}
    arrays = {
        part: cached(some, tokenizer, folder / f"{key[:32]}-{part}.npy")
        for part, some in parts.items()
    }
    return tokenizer, Corpus(**arrays), key
