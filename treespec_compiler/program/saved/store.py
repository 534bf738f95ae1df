"""A folder of saved programs: one safetensors file each, whole or not there, the least recently used given up.

A file is data: JSON in its header and tensors, both under one checksum. Whatever is wrong with it, with the folder or
with the disk, is named in a warning, and there is no saved program then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...capture.tensor_bytes import tensor_bytes
from ...logs import logger
from ...user_cache import cache_dir, replacing
from .values import CannotLoad

log = logger(__name__)

SCHEMA = "treespec program 2"
SUFFIX = ".program"
MOST_BYTES = 256 << 20
MOST_FILES = 256
LARGEST = 128 << 20
_FORGOTTEN_SECONDS = 3600.0  # after which a half-written file has no writer any more

_NAMED: set[str] = set()
"""Folders that could not be written to, of which a warning was given."""
_PARTS = ("about", "trace", "program")


@dataclass(frozen=True)
class Entry:
    """A saved program, as its file's name and folder tell of it."""

    path: Path
    bytes: int
    used: float
    """When it was last written or taken, in seconds since 1970."""

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(SUFFIX)


class Store:
    """The programs of one folder."""

    def __init__(self, folder: Path | str | None = None) -> None:
        """None: the one in the user's cache directory."""
        self.folder = Path(folder) if folder is not None else cache_dir() / "programs"

    def entries(self, key: str = "") -> list[Entry]:
        """Whose names begin with `key`, the last used first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{key}*{SUFFIX}"):
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    found.append(Entry(path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: -entry.used)

    def read(self, entry: Entry) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The parts "about", "trace" and "program" of a file, its tensors; None, with a warning: it is not whole."""
        try:
            return read_program(entry.path, of_user=True)
        except CannotLoad as error:
            log.warning("the saved program %s is not used: it holds %s", entry.path, error)
        except Exception as error:  # safetensors has exceptions of its own, without a common base
            log.warning("the saved program %s is not used: %s: %s", entry.path, type(error).__name__, error)
        return None

    def write(self, name: str, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
        """The checksum of what is there now; None, with a warning: it could not be written."""
        path = self.folder / f"{name}{SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(path) as temporary:
                checksum = write_program(temporary, parts, tensors)
        except Exception as error:  # of safetensors, too
            # NOTE once: where a home cannot be written to, every model of every call would say so
            level = logging.INFO if str(self.folder) in _NAMED else logging.WARNING
            _NAMED.add(str(self.folder))
            log.log(level, "no program is saved in %s: %s: %s", self.folder, type(error).__name__, error)
            return None
        self._evict(path)
        return checksum

    def touch(self, entry: Entry) -> None:
        """Note that it was used."""
        with contextlib.suppress(OSError):
            os.utime(entry.path)

    def remove(self, entry: Entry) -> None:
        with contextlib.suppress(OSError):
            entry.path.unlink(missing_ok=True)

    def clear(self) -> int:
        """Remove all programs; returns how many there were. Files of other kinds stay."""
        found = self.entries()
        for entry in found:
            self.remove(entry)
        return len([entry for entry in found if not entry.path.exists()])

    def _evict(self, new: Path) -> None:
        total = 0
        for count, entry in enumerate(self.entries()):
            total += entry.bytes
            if entry.path != new and (total > MOST_BYTES or count >= MOST_FILES):
                log.info("the saved program %s is given up for newer ones", entry.path)
                self.remove(entry)
        for path in self._half_written():
            with contextlib.suppress(OSError):
                path.unlink()

    def _half_written(self) -> Iterator[Path]:
        for path in self.folder.glob(f"*{SUFFIX}.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > _FORGOTTEN_SECONDS:
                    yield path


def write_program(path: Path, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write one file; its checksum. Raises OSError and what safetensors raises."""
    texts = {part: json.dumps(parts[part], separators=(",", ":")) for part in _PARTS}
    held = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    checksum = _checksum(texts, held)
    save_file(held, path, {"schema": SCHEMA, **texts, "checksum": checksum})
    return checksum


def read_program(path: Path, of_user: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parts of a file, "checksum" with them, and its tensors; `of_user`: it must be this user's own.

    Raises CannotLoad, OSError, ValueError and what safetensors raises.
    """
    status = path.lstat()
    if not path.is_file() or path.is_symlink():
        raise CannotLoad("no file of its own")
    if of_user and hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise CannotLoad("what another user wrote")
    if status.st_size > LARGEST:
        raise CannotLoad(f"{status.st_size} bytes, more than any program")
    with safe_open(str(path), "pt") as file:
        about = file.metadata() or {}
        if about.get("schema") != SCHEMA:
            raise CannotLoad(f"the schema {about.get('schema')!r:.40}, not {SCHEMA!r}")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    texts = {part: about[part] for part in _PARTS}
    if about.get("checksum") != _checksum(texts, tensors):
        raise CannotLoad("another checksum than its own: it was changed after it was written")
    return {part: json.loads(text) for part, text in texts.items()} | {"checksum": about["checksum"]}, tensors


def _checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for part in _PARTS:
        found.update(len(texts[part]).to_bytes(8, "little") + texts[part].encode())
    for key in sorted(tensors):
        value = tensors[key]
        found.update(f"{key} {value.dtype} {list(value.shape)}".encode() + tensor_bytes(value))
    return found.hexdigest()
