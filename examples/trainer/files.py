"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new path beside `path`; its file then replaces `path`.

    If the body raises, `path` stays as it was. Several processes may do this at once,
    and no reader sees an incomplete file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a text file; if the program is killed meanwhile, `path` is unchanged."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
