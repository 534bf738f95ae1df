"""Programs found again: saved once they were compared with their model, taken where the model reads the same.

A key is made in two steps. The outer one is known at once. The other one is known by what the trace of a saved program
went through: the code of it is looked for in the model at hand, and all state that this code reads is compared. What is
found is compared with the model by rows as every program is, before its first use (`program.net`).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from ...capture.call import CallSpec
from ...capture.python_state import Undigested
from ...capture.weight_ref import WeightRef, registered
from ...capture.whereabouts import Whereabouts
from ...converted import Converted
from ...errors import TreespecError
from ...logs import logger
from ...options import Options
from .document import converted_of, document
from .key import TraceDigest, check_met, outer_key, values_digest
from .store import LARGEST, Entry, Store
from .values import TRANSFORMERS, CannotLoad, CannotSave

log = logger(__name__)

MOST_TRIED = 8  # saved programs of one model: with adapters, for other states of its code


@dataclass(frozen=True)
class Found:
    """A saved program that holds for a model."""

    converted: Converted
    entry: Entry
    sums: list[int]
    """Checksums of the weights that it was made of, in the order of its sources."""


class Unmoved:
    """The state that a saved program holds for; the `Followable` of a program that was not captured here."""

    def __init__(self, trace: TraceDigest, structure: str, glance: tuple[Whereabouts, dict[str, Any]]) -> None:
        """`glance`: where a walk found all of it, and what was around."""
        self._trace, self._structure = trace, structure
        self._glance: tuple[Whereabouts, dict[str, Any]] | None = glance
        """Of the last walk; one takes tenths of a second, and every call asks."""

    def changed(self, model: nn.Module, call: CallSpec) -> str | None:
        """What is another now, in words for a log; None: nothing."""
        around = self._trace.around(call)
        if self._glance is not None and _alike(around, self._glance[1]) and self._glance[0].same(model):
            return None
        whereabouts = Whereabouts(model)
        try:
            same = self._trace.state(model, call, whereabouts).structure == self._structure
        except Undigested as error:
            return f"what its code reads ({error})"
        self._glance = (whereabouts, around) if same else None
        return None if same else "what its code reads, or the code"


def _alike(around: dict[str, Any], before: dict[str, Any]) -> bool:
    """Texts, numbers and types that are equal, and else the very same objects."""
    equal = all(around[name] == before[name] for name in ("environment", "torch"))
    pairs = [(around[name], before[name]) for name in ("call", "hooks")]
    return equal and all(len(now) == len(was) and all(map(is_, now, was)) for now, was in pairs)


def store_of(options: Options) -> Store | None:
    """Where programs of these options are saved; None: nowhere.

    Without the comparison with the model nothing is saved or taken. Passes of a user's and ranks of a mesh are more
    than a key knows of, and a check of every pass is asked for to see them run.
    """
    others = options.pipeline is not None or options.ranks > 1 or options.verify_each == "semantic"
    where = options.saved_where
    if not where or options.verify == "off" or others:
        return None
    return Store(None if where is True else where)


def find(model: nn.Module, call: CallSpec, options: Options) -> Found | None:
    """A saved program that holds for the model as it is; None: there is none."""
    store = store_of(options)
    entries = store.entries(f"{outer_key(model, options)}-") if store is not None else []
    began = time.perf_counter()
    for entry in entries[:MOST_TRIED]:
        read = store.read(entry) if store is not None else None
        if store is None or read is None:
            continue
        try:
            found = _fitting(model, call, *read)
        except (CannotLoad, TreespecError, LookupError, TypeError, ValueError, AttributeError) as error:
            log.warning("the saved program %s is not used: %s: %s", entry.path, type(error).__name__, error)
            continue
        if found is not None:
            store.touch(entry)
            log.info("the program is %s, found in %.2f s", entry.path, time.perf_counter() - began)
            return Found(found, entry, list(read[0]["program"]["sums"]))
    if store is not None:
        log.info("none of %d saved programs is of this model as it is", len(entries))
    return None


def _fitting(model: nn.Module, call: CallSpec, parts: dict[str, Any], tensors: dict[str, Tensor]) -> Converted | None:
    trace = TraceDigest(*(tuple(parts["trace"][name]) for name in ("digests", "names", "variables")))
    around, whereabouts = trace.around(call), Whereabouts(model)
    try:
        state = trace.state(model, call, whereabouts)
    except Undigested as error:
        log.info("saved programs cannot be told apart: %s", error)
        return None
    if (state.structure, state.values) != (parts["trace"]["structure"], parts["trace"]["values"]):
        return None
    program = parts["program"]
    sources = _sources(model, program["sources"])
    held = {name: ref.tensor for name, ref in sources.items()}
    if values_digest(held, program["proved_from"]) != program["proved_values"]:
        return None
    return converted_of(
        program, tensors, sources, Unmoved(trace, state.structure, (whereabouts, around)), parts["checksum"]
    )


def _sources(model: nn.Module, names: list[str]) -> dict[str, WeightRef]:
    known = {name: (table, key) for name, table, key in registered(model).values()}
    return {name: WeightRef(name, known[name][0][known[name][1]], *known[name]) for name in names}


def distrust(options: Options, entry: Entry) -> None:
    """Remove a program that turned out to be another than the model."""
    store = store_of(options)
    if store is not None:
        store.remove(entry)


def save(model: nn.Module, call: CallSpec, options: Options, converted: Converted, sums: list[int]) -> str | None:
    """Save a program that was compared with its model, which is as it was when it was captured. `sums`: of weights.

    The checksum of its file; None: it is not saved.
    """
    store = store_of(options)
    if store is None or converted.traced is None:
        return None
    try:
        name, parts, tensors = _written(model, call, options, converted, sums)
    except (CannotSave, Undigested) as error:
        log.info("the program is not saved: %s", error)
        return None
    checksum = store.write(name, parts, tensors)
    if checksum is not None:
        log.info("the program is saved as %s in %s", name, store.folder)
    return checksum


def _written(
    model: nn.Module, call: CallSpec, options: Options, converted: Converted, sums: list[int]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    assert converted.traced is not None
    lone = next((ref.name for ref in converted.sources.values() if ref.owner is None), None)
    if lone is not None or converted.kept:
        raise CannotSave(f"{lone or 'an attribute'}, which is no tensor that a module keeps from the start")
    trace = TraceDigest.of(converted.traced)
    state = trace.state(model, call)
    check_met(converted.traced, state)
    program, tensors = document(converted, TRANSFORMERS)
    constants = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if constants > LARGEST // 2:
        raise CannotSave(f"{constants:,} bytes of folded constants")
    held = {name: ref.tensor for name, ref in converted.sources.items()}
    proved_values = values_digest(held, converted.proved_from)
    program |= {"proved_values": proved_values, "sums": sums}
    about = {"model": type(model).__qualname__, "saved": time.time(), "sites": len(converted.state.sites)}
    about |= {"nodes": len(converted.state.graph.nodes), "options": _told(options)}
    read = asdict(trace) | {"structure": state.structure, "values": state.values}
    inner = hashlib.sha256(json.dumps([read, proved_values]).encode()).hexdigest()[:24]
    return f"{outer_key(model, options)}-{inner}", {"about": about, "trace": read, "program": program}, tensors


def _told(options: Options) -> dict[str, Any]:
    """The options that are not the default ones."""
    default = asdict(Options())
    return {name: value for name, value in asdict(options).items() if value != default[name]}
