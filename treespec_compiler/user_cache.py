"""The user's cache directory: where built and generated code, tuning tables and measured times lie."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from .errors import CorruptTable


def cache_dir() -> Path:
    """`$TREESPEC_CACHE_DIR`, else the platform's place for caches (`$XDG_CACHE_HOME` or `~/.cache` on Linux)."""
    if given := os.environ.get("TREESPEC_CACHE_DIR"):
        return Path(given)
    return user_cache_path("treespec", appauthor=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file to fill, which takes the place of `path` at the end; an error leaves what was there.

    Whole or not at all, also when several processes write: the last one wins. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=f"{path.suffix}.tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process is inside with this folder; one that ends, however it does, lets the next one in."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """`replacing`, for text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_table(path: Path, schema: int) -> dict[str, Any]:
    """The JSON object of a table; raises `CorruptTable` where there is none, or one of another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptTable(path=str(path), problem=f"{type(error).__name__} ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != schema:
        problem = f"schema {data.get('schema')!r}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise CorruptTable(path=str(path), problem=problem, expected=f"a JSON object of schema {schema}")
    return data
