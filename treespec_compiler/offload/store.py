"""A store: one file for each streamed layer, as it lies in a slot, and a manifest that says what they hold.

A store's folder is named by what it is made of: the layout, the weight expressions and the checksums of the model's
tensors. So one that is there is the right one, whoever wrote it, and other weights make another. Files are written
whole or not at all, the manifest last. A blob that is missing, short or damaged is written again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidOption, NoRoomForWeights
from ..ir.streaming import StreamedLayer, Streaming, view
from ..ir.weights import Expression
from ..logs import logger
from ..user_cache import locked, replacing, write_whole
from .reading import ALIGNMENT

log = logger(__name__)

VERSION = 1
MANIFEST = "manifest.json"

Build = Callable[[str], Tensor]
"""The tensor of a weight expression, by its name."""


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Blob:
    """A layer's file: `bytes` is its padded length, `crc` of all of it."""

    path: Path
    bytes: int
    crc: int


class WeightStore:
    """The blobs of a graph's streamed layers, in a folder of their own under `folder`.

    `build` gives a weight when a blob has to be written. Raises `NoRoomForWeights` before anything is written where
    the disk has less room than the missing blobs take, and OSError where the folder cannot be made or written.
    """

    def __init__(self, folder: Path, streaming: Streaming, key: str, build: Build) -> None:
        self.folder = folder / key
        self._layers, self._build = streaming.layers, build
        self.written = 0
        """Bytes that were written because no good blob was there."""
        known = self._read_manifest()
        self._blobs: list[Blob | None] = [known.get(layer.number) for layer in self._layers]
        self._write_missing()

    def blob(self, layer: int) -> Blob:
        found = self._blobs[layer]
        assert found is not None, "every blob is there once the store is open"
        return found

    def write(self, layer: int) -> Blob:
        """Write a layer's blob anew from the model's weights. Raises `NoRoomForWeights`, OSError."""
        memory = _laid_out(self._layers[layer], self._build)
        made = Blob(self.folder / f"layer-{layer:04d}.bin", memory.numel(), zlib.crc32(memory.numpy().data))
        try:
            with replacing(made.path) as temporary, open(temporary, "wb") as file:
                file.write(memory.numpy().data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.folder).free
            raise NoRoomForWeights(folder=str(self.folder), needed=made.bytes, free=free) from error
        self.written += made.bytes
        self._blobs[layer] = made
        return made

    def rewrite(self, layer: int) -> Blob:
        """As `write`, of a blob that was found to be damaged; the manifest follows."""
        with locked(self.folder):
            made = self.write(layer)
            self._write_manifest()
        return made

    def _missing(self) -> list[StreamedLayer]:
        return [layer for layer in self._layers if self._blobs[layer.number] is None]

    def _write_missing(self) -> None:
        if not self._missing():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "Name a folder that can be written: offload={'dir': ...}."
            raise InvalidOption(name="offload", got=str(error), expected="a folder for weights", fix=fix) from error
        with locked(self.folder):
            known = self._read_manifest()  # by another process, which wrote while this one waited
            self._blobs = [known.get(layer.number) for layer in self._layers]
            for left in self.folder.glob("*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
            self._write(self._missing())

    def _write(self, missing: Sequence[StreamedLayer]) -> None:
        needed, free = sum(padded(layer.bytes) for layer in missing), shutil.disk_usage(self.folder).free
        if needed > free:
            raise NoRoomForWeights(folder=str(self.folder), needed=needed, free=free)
        for layer in missing:
            self.write(layer.number)
        if missing:
            self._write_manifest()

    def _write_manifest(self) -> None:
        blobs = [blob for blob in self._blobs if blob is not None]
        rows = [{"layer": i, "file": b.path.name, "bytes": b.bytes, "crc": b.crc} for i, b in enumerate(blobs)]
        text = json.dumps({"version": VERSION, "torch": torch.__version__, "blobs": rows}, indent=1)
        write_whole(self.folder / MANIFEST, text)

    def _read_manifest(self) -> dict[int, Blob]:
        """The blobs that are there and as long as they were written, by layer."""
        path = self.folder / MANIFEST
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s is damaged (%s): the weights are written anew", path, error)
            return {}
        found = {}
        for layer in self._layers:
            blob = _checked(rows, layer, self.folder)
            if blob is None:
                log.warning("%s says nothing true of layer %d: its weights are written anew", path, layer.number)
            else:
                found[layer.number] = blob
        return found


def _checked(manifest: Any, layer: StreamedLayer, folder: Path) -> Blob | None:
    """What a manifest says of a layer, where it can be so. Names are made here: what a file says names no file."""
    rows = manifest.get("blobs") if isinstance(manifest, dict) and manifest.get("version") == VERSION else None
    if not isinstance(rows, list):
        return None
    path = folder / f"layer-{layer.number:04d}.bin"
    row = next((r for r in rows if isinstance(r, dict) and r.get("layer") == layer.number), None)
    try:
        length = path.stat().st_size
    except OSError:
        return None
    good = row is not None and row.get("bytes") == length == padded(layer.bytes) and type(row.get("crc")) is int
    return Blob(path, length, row["crc"]) if row is not None and good else None


def _laid_out(layer: StreamedLayer, build: Build) -> Tensor:
    """A layer's weights as they lie in a slot: uint8 [padded bytes]."""
    memory = torch.zeros(padded(layer.bytes), dtype=torch.uint8)
    for name, place in layer.weights:
        view(memory, place).copy_(build(name))
    return memory


def store_key(streaming: Streaming, made: Mapping[str, Expression], sums: Sequence[tuple[str, int]]) -> str:
    """A folder's name: of the layout, of what each weight is made of, and of the tensors it is made from.

    `sums`: checksums of the model's tensors by name.
    """
    layers = [[(name, repr(place), repr(made[name])) for name, place in layer.weights] for layer in streaming.layers]
    return hashlib.sha256(json.dumps([VERSION, layers, list(sums)]).encode()).hexdigest()[:32]
