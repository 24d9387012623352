"""Reading the shards of a streamed data set, of which some may be broken."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from trainer import hosts
from trainer.errors import DataError

COLUMN = "text"
DELAYS = (1, 2, 4, 8, 16)  # seconds before each new attempt at the same place
LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
CLIENTS = ("aiohttp", "http", "huggingface_hub", "requests", "urllib")  # httpx, ...
STRINGS = ("string", "large_string", "string_view")
TEXT = (*STRINGS, "null")

Reader = Callable[..., Iterator[tuple]]  # the `datasets` library's, of one shard


class Shards:
    """Guards the readers of the `datasets` library against broken files.

    After an error that may pass, of the network or of a disk, the shard is read again
    up to the same place. After any other error, or the last attempt, the rest of the
    shard is left out if that is allowed. Otherwise reading ends with a `DataError` that
    names the file and the row. A place in the data counts what the readers yielded, so
    it means the same whether or not there were errors before it.

    `left_out` maps the name of each shard that was left out in part to a message.
    """

    def __init__(self, allowed: int = 0):
        self.allowed = allowed  # shards that may be left out
        self.left_out: dict[str, str] = {}
        self.opened = False  # before, the library handles errors: it tries the files

    def guard(self, builder: Any) -> None:
        """Replaces the readers of `builder`, a dataset builder, by guarded ones."""
        for name in ("_generate_tables", "_generate_examples"):
            if reader := getattr(builder, name, None):
                setattr(builder, name, self._guarded(reader))
        if cast := getattr(builder, "_cast_table", None):
            builder._cast_table = self._checked_cast(cast)

    def _checked_cast(self, cast: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `cast`, the library's to common types; refuses text mixed with others.

        `cast` turns files of numbers into text. If JSON lines have text in some rows
        and numbers in others, it turns both into JSON, and the text gets quotation
        marks.
        """

        def checked_cast(table: Any, **options) -> Any:
            if self.opened and [COLUMN] in options.get("json_field_paths", []):
                raise ValueError(f"the column {COLUMN} holds more than text")
            if self.opened:
                check_type(table)
            return cast(table, **options)

        return checked_cast

    def _guarded(self, reader: Reader) -> Reader:
        def read(*args, **shard) -> Iterator[tuple]:
            guarded = self._read(reader, shard)
            return guarded if self.opened else reader(*args, **shard)

        return read

    def _read(self, reader: Reader, shard: dict[str, Any]) -> Iterator[tuple]:
        parts, rows, attempts = 0, 0, 0
        while True:
            try:
                for key, part in itertools.islice(reader(**shard), parts, None):
                    count = checked(part)
                    yield key, part
                    parts, rows, attempts = parts + 1, rows + count, 0
                return
            except Exception as error:  # of the library, its HTTP clients, its parsers
                name = name_of(shard)
                if attempts == len(DELAYS) or not may_pass(error):
                    self.leave_out(name, rows, error)
                    return
                delay, attempts = DELAYS[attempts], attempts + 1
                hosts.log(
                    f"cannot read {name}, of which {rows:,} rows were read:"
                    f" {reason(error)}; trying again in {delay} s ({attempts} of"
                    f" {len(DELAYS)})"
                )
                time.sleep(delay)

    def leave_out(self, name: str, rows: int, error: Exception) -> None:
        """Skips the rest of a shard; raises if no more shards may be left out."""
        line = f"{name}, of which {rows:,} rows were read: {reason(error)}"
        needed = len({*self.left_out, name})
        if needed > self.allowed:
            raise DataError(
                f"cannot read {line} (--skip-bad-data {needed} leaves the rest of this"
                " file out)"
            ) from error
        if name not in self.left_out:  # it recurs in every epoch
            hosts.log(f"leaving out the rest of {line}")
            self.left_out[name] = line


def checked(part: Any) -> int:
    """Counts the rows of a table or document; raises if its column is not text."""
    if isinstance(part, dict):
        if not isinstance(part.get(COLUMN), str | None):
            raise ValueError(f"the column {COLUMN} holds {part[COLUMN]!r}, not text")
        return 1
    if COLUMN in part.column_names and len(part):
        check_type(part)
        column = part.column(COLUMN)
        column.validate(full=True)  # Arrow's parsers do not check for UTF-8
        if column.null_count == len(part):
            raise ValueError(f"no row has a {COLUMN}")
    return len(part)


def check_type(table: Any) -> None:
    """Raises ValueError if the column of texts is of another type."""
    if COLUMN in table.column_names and len(table):
        kind = table.column(COLUMN).type
        if str(getattr(kind, "value_type", kind)) not in TEXT:  # of a dictionary
            raise ValueError(f"the column {COLUMN} holds {kind}, not text")


def may_pass(error: Exception) -> bool:
    """Returns whether reading again a little later may succeed."""
    if isinstance(error, LASTING):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True  # of the operating system; parsers raise OSError without a number
    return type(error).__module__.startswith(CLIENTS)


def name_of(shard: dict[str, Any]) -> str:
    """Returns the file of a shard, if its reader's arguments have it."""
    lists = [value for value in shard.values() if isinstance(value, list)]
    names = [str(name) for name in itertools.chain(*lists) if isinstance(name, str)]
    return names[0] if names else f"the shard {shard}"[:200]


def reason(error: Exception) -> str:
    """Formats an error as one line."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
