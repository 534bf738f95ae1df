"""The manifest of a compiled folder: its files with their hashes, where it was made, and what is told without it.

A folder may come from anywhere. Nothing of it is run, imported or unpickled; a name in it is the name of a file beside
the manifest and nothing else; and what differs from its manifest is not read.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ...errors import InvalidFolder
from ...ir.library import fingerprint
from ...versions import versions

SCHEMA = "treespec folder 1"
MANIFEST = "manifest.json"
PROGRAM, WEIGHTS, TOKENIZER = "program.safetensors", "weights.safetensors", "tokenizer.json"
LARGEST = 16 << 20
"""Bytes of a manifest, and of the header of a file of weights."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class Origin:
    """Where a folder was made: code lowered there is of use where all of this is the same."""

    versions: Mapping[str, str]
    machine: str
    cpu: str
    """The vector instructions that torch uses."""
    ops: str
    """A fingerprint of the ops that graphs call."""

    @classmethod
    def here(cls) -> Origin:
        return cls(
            versions("torch"),
            platform.machine(),
            torch.backends.cpu.get_cpu_capability(),
            fingerprint(),
        )

    def differences(self, other: Origin) -> list[str]:
        """What another one has otherwise, in words."""
        pairs = {"machine": (self.machine, other.machine), "CPU": (self.cpu, other.cpu)}
        for name in sorted({*self.versions, *other.versions}):
            pairs[name] = (str(self.versions.get(name)), str(other.versions.get(name)))
        return [f"{name} {theirs}, here {ours}" for name, (ours, theirs) in pairs.items() if theirs != ours]


@dataclass(frozen=True)
class FileRecord:
    """A file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a compiled folder before its files are read."""

    origin: Origin
    files: Mapping[str, FileRecord]
    model: Mapping[str, Any]
    """Of the model that it was compiled from: name, type, dtype, parameters, bytes."""
    options: Mapping[str, Any]
    """Of the compiler, as far as they are not the default ones."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """The model's own defaults: "generation_config" and "config", fields by name."""
    drafts: Sequence[Mapping[str, str]] = ()
    """`{"name": ...}` of one that has a name, `{"folder": ..., "sha256": ...}` of a folder inside this one."""
    proof: Mapping[str, Any] = field(default_factory=dict)
    """What `treespec explain` says."""
    byte_order: str = sys.byteorder
    schema: str = SCHEMA

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, as far as it is one that can be used here. Raises InvalidFolder."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InvalidFolder(folder=str(folder), got="no folder of this name", expected="one", fix="Check the path.")
    if not path.is_file() or path.is_symlink():
        raise InvalidFolder(folder=str(folder), got=f"no file {MANIFEST} in it", expected="a compiled folder")
    if path.stat().st_size > LARGEST:
        got = f"a {MANIFEST} of {path.stat().st_size:,} bytes"
        raise InvalidFolder(folder=str(folder), got=got, expected=f"at most {LARGEST:,}")
    try:
        found = _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        got = f"a {MANIFEST} that does not parse ({type(error).__name__}: {error})"
        raise InvalidFolder(folder=str(folder), got=got, expected=f"one of the schema {SCHEMA!r}") from error
    _check_plain(folder, found)
    return found


def _parsed(text: Any) -> Manifest:
    if not isinstance(text, dict) or text.get("schema") != SCHEMA:
        raise ValueError(f"schema {text.get('schema')!r:.40}" if isinstance(text, dict) else type(text).__name__)
    known = {entry.name for entry in fields(Manifest)}
    values = {name: value for name, value in text.items() if name in known}
    values["origin"] = Origin(**text["origin"])
    values["files"] = {name: FileRecord(**record) for name, record in text["files"].items()}
    for name in ("model", "options", "generation", "proof"):
        if not isinstance(values.get(name), dict):
            raise TypeError(f"{name} is no object")
    return Manifest(**values)


def _check_plain(folder: Path, found: Manifest) -> None:
    named = [*found.files, *(draft["folder"] for draft in found.drafts if "folder" in draft)]
    for name in named:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            got = f"the name {name!r:.80} in its {MANIFEST}"
            raise InvalidFolder(folder=str(folder), got=got, expected="names of files that lie beside it")
    missing = [name for name in (PROGRAM, WEIGHTS) if name not in found.files]
    if missing:
        raise InvalidFolder(folder=str(folder), got=f"no {missing[0]} in its {MANIFEST}", expected="a whole folder")
    if found.byte_order != sys.byteorder:
        got, expected = f"numbers of {found.byte_order!r:.20} byte order", f"{sys.byteorder!r}, this machine's"
        raise InvalidFolder(folder=str(folder), got=got, expected=expected, fix="Compile it on such a machine.")
    here = Origin.here()
    if found.origin.ops != here.ops:
        theirs = found.origin.versions.get("treespec")
        got = f"a graph of the ops of another treespec ({theirs})"
        expected = f"those of this one ({here.versions.get('treespec')})"
        raise InvalidFolder(folder=str(folder), got=got, expected=expected)


def file_of(folder: Path, manifest: Manifest, name: str) -> Path:
    """A file of the folder, which is there and as long as its manifest says. Raises InvalidFolder."""
    path, record = folder / name, manifest.files[name]
    if path.is_symlink() or not path.is_file():
        raise InvalidFolder(folder=str(folder), got=f"no file {name} in it", expected="every file of its manifest")
    size = path.stat().st_size
    if size != record.bytes:
        expected = f"{record.bytes:,}, as its manifest says" if isinstance(record.bytes, int) else "a number of bytes"
        raise InvalidFolder(folder=str(folder), got=f"{name} of {size:,} bytes", expected=expected)
    return path


def check_file(folder: Path, manifest: Manifest, name: str) -> Path:
    """`file_of`, whose contents are those of the manifest. Raises InvalidFolder."""
    path = file_of(folder, manifest, name)
    if record_of(path).sha256 != manifest.files[name].sha256:
        expected = "the file of its manifest"
        raise InvalidFolder(folder=str(folder), got=f"another hash of {name} than its own", expected=expected)
    return path


def record_of(path: Path) -> FileRecord:
    """Length and hash of a file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, found)


def record_all(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    return {name: record_of(folder / name) for name in names}
