"""Noticing that a module's weights changed after its program was made."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.fills import begins
from ..capture.quantized_weights import own_tensors
from ..capture.weight_ref import WeightRef, getter
from ..codegen import cpu
from .checksums import checksums


@dataclass(frozen=True)
class Changes:
    """Names of weights. `replaced`: that are other tensors, or lie elsewhere; `rewritten`: that have other values."""

    replaced: frozenset[str]
    rewritten: frozenset[str]

    @property
    def any(self) -> frozenset[str]:
        return self.replaced | self.rewritten


@dataclass(frozen=True)
class Seen:
    """A weight as it was when it was last looked at. Strides are part of it: code is compiled for a layout."""

    ref: WeightRef
    tensor: Tensor
    pointer: int
    version: int | None  # None for an inference tensor, which counts nothing
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def now(cls, ref: WeightRef) -> Seen:
        t = ref.tensor
        version = None if t.is_inference() else t._version
        return cls(ref, t, t.data_ptr(), version, t.dtype, t.device, t.shape, t.stride())

    def touched(self, tensor: Tensor | None) -> bool:
        """Whether it is another tensor, lies elsewhere, or was written by an op that counts versions."""
        if tensor is not self.tensor or tensor.data_ptr() != self.pointer:
            return True
        return self.version is not None and tensor._version != self.version

    def difference(self, tensor: Tensor | None) -> str | None:
        """What of it the program was made for and is another now."""
        if tensor is None:
            return f"{self.ref.name} was taken away"
        if (tensor.dtype, tensor.device, tensor.shape) != (self.dtype, self.device, self.shape):
            return (
                f"{self.ref.name} changed from {self.dtype} {list(self.shape)} on {self.device} "
                f"to {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if tensor.stride() != self.stride:
            return f"{self.ref.name} is laid out anew: its strides {self.stride} became {tensor.stride()}"
        return None


class WeightWatch:
    """Fingerprint of the tensors a program reads: identity, address and version on every call, a checksum on demand.

    `sources` are those tensors by name. `proved` names those whose values a proof used (a mask buffer): when one
    changes, the proof is made again. Modules are held weakly, so that a program never keeps its model alive.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, WeightRef], proved: Iterable[str] = ()) -> None:
        self._weights = list(sources.values())
        self._proved = set(proved)
        self._modules = [weakref.ref(m) for m in model.modules()]
        self._children = [(m._modules, list(m._modules.values())) for m in model.modules() if m._modules]
        tables = [t for m in model.modules() for t in (m._parameters, m._buffers)]
        self._names = [(table, own, _names(table) - own) for table, own in zip(tables, _fillable(model), strict=True)]
        self._shared = _shared(tables, self._weights)
        self._native = cpu.loaded()  # decided once: the two kinds of checksums differ
        self._seen: list[Seen] = []
        self._sums: list[int] = []
        self.renew()

    @property
    def sums(self) -> list[int]:
        """Checksums of the tensors, as of the last `renew`."""
        return [*self._sums]

    def renew(self) -> Changes:
        """Take the present state as the one to compare with; returns what changed since the last time."""
        before, sums = self._seen, self._sums
        for ref in self._weights:
            found = self.current(ref)
            if found is not None:
                ref.tensor = found
                ref.follow()
        self._seen = [Seen.now(ref) for ref in self._weights]
        # What `touched` reads on every call: registered tensors by where they are, others by how they are found.
        self._entries: list[tuple[Any, str, Tensor, int, int | None]] = [
            (getter(s.ref.owner), s.ref.key, s.tensor, s.pointer, s.version)
            for s in self._seen
            if s.ref.owner is not None
        ]
        self._others = [s for s in self._seen if s.ref.owner is None]
        within = {id(s.ref.within[2]): s.ref.within for s in self._seen if s.ref.within is not None}
        # NOTE its attributes too: `swap_tensors` gives a tensor those of another one
        self._outer = [(getter(table), key, outer, vars(outer)) for table, key, outer in within.values()]
        self._training = self._training_flags()
        self._sums = self._checksums(self._weights)
        if not before:
            everything = frozenset(ref.name for ref in self._weights)
            return Changes(everything, everything)
        replaced = (s.ref.name for old, s in zip(before, self._seen, strict=True) if old.touched(s.tensor))
        rewritten = (s.ref.name for was, now, s in zip(sums, self._sums, self._seen, strict=True) if was != now)
        return Changes(frozenset(replaced), frozenset(rewritten))

    def current(self, ref: WeightRef) -> Tensor | None:
        """The tensor that the module holds now in the place of `ref`, or None where nothing is."""
        if ref.within is not None:
            return ref.inside
        if ref.owner is not None:
            return getter(ref.owner)(ref.key)
        model = self._modules[0]()
        return ref.tensor if ref.find is None or model is None else ref.find(model)

    def touched(self) -> bool:
        """Whether any tensor was replaced, moved, taken away, or written in place (by an op that counts versions)."""
        # On every call: 0.2 us a tensor, of which fields of `Seen` would be another third.
        for look, key, tensor, pointer, version in self._entries:
            if look(key) is not tensor or tensor.data_ptr() != pointer:
                return True
            if version is not None and tensor._version != version:
                return True
        for look, key, outer, attributes in self._outer:
            if look(key) is not outer or vars(outer) is not attributes:
                return True
        if not self._others:
            return False
        return any(seen.touched(self.current(seen.ref)) for seen in self._others)

    def mode_changed(self) -> bool:
        """Whether a module went from eval to train mode or back."""
        root = self._modules[0]()
        return root is not None and root.training != self._training[0]

    def deep_mode_changed(self) -> bool:
        """As `mode_changed`, for every submodule."""
        return self._training_flags() != self._training

    def rearranged(self) -> bool:
        """Whether a submodule was exchanged or a tied weight came apart. Walks every module: not for each call."""
        return self._rearranged() is not None

    def incompatible(self) -> str | None:
        """What the program was made for and is not so any more: a dtype, device, shape, layout, or the structure; None:
        nothing.
        """
        for seen in self._seen:
            difference = seen.difference(self.current(seen.ref))
            if difference is not None:
                return difference
        known = {ref.name: total for ref, total in zip(self._weights, self._sums, strict=True)}
        proved = [ref for ref in self._weights if ref.name in self._proved]
        for ref, total in zip(proved, self._checksums(proved), strict=True):
            if total != known[ref.name]:
                return f"{ref.name}, which masks or positions were proved from, has other values"
        return self._rearranged()

    def contents_changed(self) -> bool:
        """Compare checksums: finds writes through `.data`, which count no version."""
        return self._checksums(self._weights) != self._sums

    def _there(self, ref: WeightRef) -> Tensor:
        found = self.current(ref)
        return ref.tensor if found is None else found

    def _checksums(self, refs: Sequence[WeightRef]) -> list[int]:
        return checksums([self._there(ref) for ref in refs], self._native)

    def _rearranged(self) -> str | None:
        for table, children in self._children:
            if list(table.values()) != children:
                return f"a submodule was replaced, added or removed (one of {', '.join(table)})"
        for table, key, ref in self._shared:
            held: Any = table.get(key)
            there, name, _ = ref.place
            if held is not (self.current(ref) if ref.within is None else getter(there)(name)):
                return f"{key} no longer shares its tensor with {ref.name}"
        for tensors, own, names in self._names:
            if _names(tensors) - own != names:
                change = ", ".join(sorted(names ^ (_names(tensors) - own)))
                return f"a parameter or buffer was added or taken away ({change})"
        return None

    def _training_flags(self) -> list[bool | None]:
        return [m.training if m is not None else None for m in (ref() for ref in self._modules)]


def glance(model: nn.Module) -> list[int]:
    """Checksums of the first row of every parameter and buffer, which tell models apart and read a page of each."""
    tensors = [t for t in own_tensors((*model.parameters(), *model.buffers())) if t.numel()]
    return checksums([t[(0,) * (t.dim() - 1)] for t in tensors], native=False)


def _fillable(model: nn.Module) -> Iterator[set[str]]:
    """Names that forward may fill by itself, for each table of parameters and of buffers."""
    for module in model.modules():
        yield set()
        yield set(begins(type(module)))


def _names(table: Mapping[str, Any]) -> set[str]:
    return {key for key, value in table.items() if value is not None}


def _shared(tables: list[dict[str, Any]], weights: list[WeightRef]) -> list[tuple[dict[str, Any], str, WeightRef]]:
    """Places besides `owner[key]` that hold a weight: tied weights can come apart."""
    known = {id(ref.place[2]): ref for ref in weights}
    return [
        (table, key, known[id(value)])
        for table in tables
        for key, value in table.items()
        if id(value) in known and (known[id(value)].place[0] is not table or known[id(value)].place[1] != key)
    ]
