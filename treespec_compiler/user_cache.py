"""The user's cache directory: where built and generated code, tuning tables and measured times lie."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from .errors import CorruptTable


def cache_dir() -> Path:
    """`$TREESPEC_CACHE_DIR`, else the platform's place for caches."""
    if given := os.environ.get("TREESPEC_CACHE_DIR"):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "treespec"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "treespec" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treespec"


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, also when several processes write: the last one wins. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


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
