"""A checkpoint in another dtype: written once beside other caches, a piece of a tensor at a time, and found again.

Weights of the dtype that a model runs in can be mapped from their file, and take no memory until they are read. Those
of another dtype would be converted into memory, all of them, before anything is made of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch

from ..errors import NoRoomForWeights, UnreadableModel
from ..user_cache import locked, replacing

VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
BESIDE = ("generation_config.json", INDEX)
"""What goes with the weights where it is there; the configuration comes last, and says that a folder is whole."""
PIECE = 8 << 20
"""Bytes that are converted at once."""
LONGEST_HEADER = 100 << 20  # bytes, safetensors' own limit
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file: `start` and `stop` are in the file, in bytes."""

    name: str
    kind: str
    shape: list[int]
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return (self.stop - self.start) // max(1, torch.Size(self.shape).numel())

    def bytes_as(self, kind: str) -> int:
        if kind == self.kind:
            return self.stop - self.start
        return (self.stop - self.start) // FLOATS[self.kind].itemsize * FLOATS[kind].itemsize


def recast(folder: Path, dtype: torch.dtype, under: Path) -> Path:
    """A folder of the same model whose floating-point weights have this dtype: `folder` itself where they have it, and
    where they are quantized; else one in `under`, named by the files that it was made from.

    Raises UnreadableModel, `NoRoomForWeights`, and OSError where `under` cannot be written.
    """
    files = _files(folder)
    entries = {file: _entries(file) for file in files}
    kind = NAMES[dtype]
    other = any(_kind(entry, kind) != entry.kind for found in entries.values() for entry in found)
    if not other or "quantization_config" in _json(folder / CONFIG):
        return folder
    about = [(file.name, *_stamp(file)) for file in (folder / CONFIG, *files)]
    key = hashlib.sha256(json.dumps([VERSION, kind, str(folder.resolve()), about]).encode()).hexdigest()[:32]
    made = under / f"recast-{key}"
    if not _whole(made, files, kind, entries):
        made.mkdir(parents=True, exist_ok=True)
        with locked(made):
            if not _whole(made, files, kind, entries):  # by another process, which wrote while this one waited
                _write_folder(folder, made, kind, entries)
    return made


def layout(folder: Path) -> str:
    """A name of what a folder's weights are, their values left out: files, tensors, dtypes, shapes and places.

    Raises UnreadableModel.
    """
    about = [(file.name, *map(repr, _entries(file))) for file in _files(folder)]
    return hashlib.sha256(json.dumps([about, _json(folder / CONFIG)], sort_keys=True).encode()).hexdigest()


def _write_folder(folder: Path, made: Path, kind: str, entries: Mapping[Path, list[_Entry]]) -> None:
    for left in made.iterdir():  # by a process that was killed, or of files that were damaged
        left.unlink()
    needed, free = sum(_length(found, kind) for found in entries.values()), shutil.disk_usage(made).free
    if needed > free:
        raise NoRoomForWeights(folder=str(made), needed=needed, free=free)
    try:
        for file, found in entries.items():
            _write_file(file, made / file.name, kind, found)
        for name in (*BESIDE, CONFIG):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoRoomForWeights(folder=str(made), needed=needed, free=shutil.disk_usage(made).free) from error


def _write_file(file: Path, made: Path, kind: str, entries: list[_Entry]) -> None:
    with replacing(made) as temporary, open(file, "rb") as source, open(temporary, "wb") as target:
        target.write(_header(entries, kind))
        for entry in entries:
            _copy(entry, source, target, kind, file)
        target.flush()
        os.fsync(target.fileno())
        for each in (source, target):  # what is read later is mapped: copies of it would take the memory that is spared
            os.posix_fadvise(each.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(entry: _Entry, source: BufferedReader, target: BufferedWriter, kind: str, file: Path) -> None:
    source.seek(entry.start)
    wanted = _kind(entry, kind)
    for at in range(entry.start, entry.stop, PIECE):  # a piece holds whole numbers
        data = bytearray(min(PIECE, entry.stop - at))
        if source.readinto(data) != len(data):
            raise _damaged(file, f"an end within {entry.name}")
        if wanted == entry.kind:
            target.write(data)
        else:
            numbers = torch.frombuffer(data, dtype=FLOATS[entry.kind]).to(FLOATS[wanted])
            target.write(numbers.view(torch.uint8).numpy().data)


def _files(folder: Path) -> list[Path]:
    """The files that transformers reads: those of the index, or the one that holds everything."""
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    names = _json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise UnreadableModel(name=str(folder), problem=f"an {INDEX} without a weight_map")
    wanted = sorted({str(name) for name in names.values()})
    outside = next((name for name in wanted if Path(name).name != name), None)
    if outside is not None:
        raise UnreadableModel(name=str(folder), problem=f"an {INDEX} that names {outside}, outside of the folder")
    return [folder / name for name in wanted]


def _entries(file: Path) -> list[_Entry]:
    """A safetensors file's tensors, those of large numbers first, so that each lies where its numbers are aligned."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length <= min(LONGEST_HEADER, size - 8) else b""
        header = json.loads(text)
        rows = {name: row for name, row in header.items() if name != "__metadata__"}
        found = [_entry(name, row, 8 + length, size) for name, row in rows.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    return sorted(found, key=lambda entry: (-entry.width, entry.start))


def _entry(name: str, row: Any, base: int, size: int) -> _Entry:
    first, last = (int(at) for at in row["data_offsets"])
    shape = [int(n) for n in row["shape"]]
    entry = _Entry(name, str(row["dtype"]), shape, base + first, base + last)
    fits = 0 <= first <= last and entry.stop <= size
    if entry.kind in FLOATS:
        fits = fits and last - first == torch.Size(shape).numel() * FLOATS[entry.kind].itemsize
    if not fits:
        raise ValueError(f"{name} from {first} to {last}")
    return entry


def _header(entries: list[_Entry], kind: str) -> bytes:
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        length = entry.bytes_as(_kind(entry, kind))
        rows[entry.name] = {"dtype": _kind(entry, kind), "shape": entry.shape, "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _length(entries: list[_Entry], kind: str) -> int:
    """Of the file that is made of them."""
    return len(_header(entries, kind)) + sum(entry.bytes_as(_kind(entry, kind)) for entry in entries)


def _whole(made: Path, files: list[Path], kind: str, entries: Mapping[Path, list[_Entry]]) -> bool:
    try:
        lengths = [(made / file.name).stat().st_size for file in files]
    except OSError:
        return False
    return (made / CONFIG).is_file() and lengths == [_length(entries[file], kind) for file in files]


def _kind(entry: _Entry, kind: str) -> str:
    return kind if entry.kind in FLOATS else entry.kind


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise UnreadableModel(name=str(file), problem=str(error)) from error
    return found.st_size, found.st_mtime_ns


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableModel(name=str(file), problem=f"{type(error).__name__}: {error}") from error
    return found if isinstance(found, dict) else {}


def _damaged(file: Path, problem: str) -> UnreadableModel:
    fix = "Write the file anew, or fetch it again."
    return UnreadableModel(name=str(file), problem=f"a damaged file ({problem})", expected="safetensors", fix=fix)
