"""Tuning tables: which configuration of a kernel was measured fastest for a shape, on an architecture.

A table is `<op>/<arch>.json`: {schema, meta: {op, arch, source_hash, device, versions}, entries: [{key, config, us,
runner_up}]}. The package may ship some in `codegen/tables`; what `treespec tune` measures goes to the user's cache and
lies over them. The identity of a kernel is the hash of its text, generated for a few specs that show all of it: entries
made with another text are ignored, and how the text comes about may change.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from treespec_compiler.errors import CorruptTable
from treespec_compiler.logs import logger
from treespec_compiler.user_cache import cache_dir, read_table, write_whole

log = logger(__name__)

SCHEMA = 1
SHIPPED = Path(__file__).with_name("tables")

# Sizes for which the nearest measured one will do. Every other field of a key must be equal: a configuration for
# another head dimension or dtype may not even fit.
SIZES = frozenset({"capacity", "requests", "rows"})

Scalar: TypeAlias = str | int | float | bool
Key: TypeAlias = Mapping[str, Scalar]


@dataclass(frozen=True)
class Tuned:
    """An op that there are tables for: the text of its kernels, for specs in which every line occurs, and what makes a
    configuration of an entry's numbers, or raises ValueError."""

    texts: Callable[[], Iterable[str]]
    parse: Callable[[Mapping[str, int]], object]


OPS: dict[str, Tuned] = {}


@dataclass(frozen=True)
class TuningEntry:
    """The fastest configuration for a key, its microseconds a launch, and the second one (`{"config", "us"}`)."""

    key: Key
    config: Mapping[str, int]
    us: float
    runner_up: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        fields = {"key": dict(self.key), "config": dict(self.config), "us": round(self.us, 3)}
        return fields | ({"runner_up": dict(self.runner_up)} if self.runner_up else {})


@dataclass(frozen=True)
class TuningTable:
    """Entries of one op on one architecture, made with the kernel of this source."""

    op: str
    arch: str
    source_hash: str
    entries: tuple[TuningEntry, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Device and versions, for readers."""

    def nearest(self, key: Key) -> TuningEntry | None:
        """The entry whose sizes are nearest by ratio, of those that are otherwise equal; of two as near the smaller.

        One that was measured with fewer rows comes last: its blocks may be too small for all rows, and those of two
        blocks read K/V twice. 16 rows fit into the smallest block there is.
        """
        fitting = [e for e in self.entries if _exact(e.key) == _exact(key) and e.key.keys() == key.keys()]

        def order(entry: TuningEntry) -> tuple[bool, float, list[tuple[str, float]]]:
            sizes, asked = _sizes(entry.key), _sizes(key)
            short = max(16.0, sizes.get("rows", 0.0)) < asked.get("rows", 0.0)
            return short, _distance(entry.key, key), sorted(sizes.items())

        return min(fitting, key=order, default=None)


def _sizes(key: Key) -> dict[str, float]:
    return {name: float(value) for name, value in key.items() if name in SIZES}


def _exact(key: Key) -> dict[str, Scalar]:
    return {name: value for name, value in key.items() if name not in SIZES}


def _distance(a: Key, b: Key) -> float:
    there = _sizes(b)
    return sum(abs(math.log2((value + 1) / (there[name] + 1))) for name, value in _sizes(a).items())


def lookup(op: str, arch: str, key: Key) -> dict[str, int] | None:
    """The configuration measured for `key` or the nearest sizes; None where nothing was measured that fits.

    `arch` as given by `architecture`. Of the shipped table, what the user's has for the same sizes is not looked at.
    """
    found = _lookup(op, arch, identity(key))
    return None if found is None else dict(found)


@functools.lru_cache(4096)
def _lookup(op: str, arch: str, items: tuple[tuple[str, Scalar], ...]) -> Mapping[str, int] | None:
    entry = current(op, arch).nearest(dict(items))
    return None if entry is None else entry.config


@functools.cache
def current(op: str, arch: str) -> TuningTable:
    """What holds for the kernel as it is: the user's entries over the shipped ones of other keys."""
    source_hash = kernel_hash(op)
    entries: dict[Any, TuningEntry] = {}
    for path in (shipped_path(op, arch), user_path(op, arch)):
        try:
            table = read(path, op, arch) if path.is_file() else None
        except CorruptTable as error:
            log.warning("%s It is ignored.", error)
            continue
        if table is not None and table.source_hash != source_hash:
            log.warning(
                "The tuning table %s is ignored: got one made with kernel source %s, expected %s. "
                "Measure again with `treespec tune MODEL --device cuda`.",
                path,
                table.source_hash,
                source_hash,
            )
        elif table is not None:
            entries |= {identity(e.key): e for e in table.entries}
    return TuningTable(op, arch, source_hash, tuple(entries.values()))


def identity(key: Key) -> tuple[tuple[str, Scalar], ...]:
    """A key as a hashable value."""
    return tuple(sorted(key.items()))


def forget() -> None:
    """Read tables again at the next lookup."""
    _lookup.cache_clear()
    current.cache_clear()
    kernel_hash.cache_clear()


def shipped_path(op: str, arch: str) -> Path:
    return SHIPPED / op / f"{arch}.json"


def user_path(op: str, arch: str) -> Path:
    return cache_dir() / "tables" / op / f"{arch}.json"


@functools.cache
def kernel_hash(op: str) -> str:
    """Of the text of the op's kernels."""
    digest = hashlib.sha256()
    for text in OPS[op].texts():
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def architecture(device: torch.device | str) -> str:
    """`sm_90` or `gfx942`: the name of a GPU's table."""
    found = torch.cuda.get_device_properties(torch.device(device))
    name = getattr(found, "gcnArchName", "")
    return str(name).split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


def read(path: Path, op: str, arch: str) -> TuningTable:
    """A table from its file; raises `CorruptTable` where it does not parse or is one of another op or architecture."""
    data = read_table(path, SCHEMA)
    meta = data.get("meta")
    if not isinstance(meta, dict) or not isinstance(meta.get("source_hash"), str):
        raise CorruptTable(path=str(path), problem="no meta.source_hash", expected="the hash of the kernel's source")
    if (meta.get("op"), meta.get("arch")) != (op, arch):
        raise CorruptTable(
            path=str(path), problem=f"a table for {meta.get('op')} on {meta.get('arch')}", expected=f"{op} on {arch}"
        )
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise CorruptTable(path=str(path), problem=f"entries of type {type(entries).__name__}", expected="a list")
    about = {name: value for name, value in meta.items() if name not in ("op", "arch", "source_hash")}
    return TuningTable(op, arch, meta["source_hash"], tuple(_entry(path, e, OPS[op].parse) for e in entries), about)


def resumed(path: Path, empty: TuningTable) -> TuningTable:
    """The table to go on with: the one at `path` if it is of the kernel as it is, else `empty`.

    Its `meta` names every device that entries come from, and the versions of the run that goes on.
    """
    table = read(path, empty.op, empty.arch) if path.is_file() else empty
    if table.source_hash != empty.source_hash:
        return empty
    devices = [str(meta["device"]) for meta in (table.meta, empty.meta) if meta.get("device")]
    names = dict.fromkeys(name for device in devices for name in device.split(", "))
    return replace(table, meta={**empty.meta, **({"device": ", ".join(names)} if names else {})})


def _entry(path: Path, data: Any, parse: Callable[[Mapping[str, int]], object]) -> TuningEntry:
    try:
        entry = TuningEntry(data["key"], data["config"], float(data["us"]), data.get("runner_up"))
        good = (
            all(isinstance(v, str | int | float) for v in entry.key.values())
            and all(isinstance(v, int | float) for v in _sizes(entry.key).values())
            and bool(entry.config)
            and all(isinstance(v, int) and not isinstance(v, bool) for v in entry.config.values())
            and 0 < entry.us < math.inf
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptTable(
            path=str(path), problem=f"an entry without {error}", expected="key, config and us"
        ) from error
    if not good:
        raise CorruptTable(
            path=str(path), problem=f"the entry {data!r}", expected="a configuration of integers and us > 0"
        )
    try:
        parse(entry.config)
    except ValueError as error:
        raise CorruptTable(path=str(path), problem=f"the configuration {entry.config}", expected=str(error)) from error
    return entry


def write(path: Path, table: TuningTable) -> None:
    """Whole or not at all, also when several processes write: the last one wins."""
    meta = {"op": table.op, "arch": table.arch, "source_hash": table.source_hash, **table.meta}
    head = json.dumps({"schema": SCHEMA, "meta": meta}, indent=1)[:-2]
    # One line an entry: a table is read and compared by people too.
    lines = ",\n".join("  " + json.dumps(e.as_json()) for e in table.entries)
    text = f'{head},\n "entries": [\n{lines}\n ]\n}}\n' if lines else f'{head},\n "entries": []\n}}\n'
    write_whole(path, text)
    forget()


def merge(table: TuningTable, entries: Iterable[TuningEntry]) -> TuningTable:
    """The table with these entries added, in place of those of the same keys."""
    every = {identity(e.key): e for e in (*table.entries, *entries)}
    return TuningTable(table.op, table.arch, table.source_hash, tuple(every.values()), table.meta)
