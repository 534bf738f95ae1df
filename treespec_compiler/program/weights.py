"""Noticing that a module's weights changed after its program was made."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.weight_ref import WeightRef
from ..codegen import cpu

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # inference tensors count nothing


class WeightWatch:
    """Fingerprint of the tensors a program reads: identity, address and version on every call, a checksum on demand.

    `proved` names the tensors whose values a proof used (a mask buffer): when one changes, the proof is made again.
    Modules are held weakly, so that a program never keeps its model alive.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, WeightRef], proved: Iterable[str] = ()) -> None:
        self._weights = list(weights.values())
        self._proved = [weights[name] for name in sorted(proved) if name in weights]
        self._modules = [weakref.ref(m) for m in model.modules()]
        self._children = [(m._modules, list(m._modules.values())) for m in model.modules() if m._modules]
        tables = [t for m in model.modules() for t in (m._parameters, m._buffers)]
        self._absent = [(table, key) for table in tables for key, value in table.items() if value is None]
        self._shared = _shared(tables, self._weights)
        self.renew()

    def renew(self) -> None:
        """Take the present state as the one to compare with."""
        for ref in self._weights:
            ref.tensor = self.current(ref)
        self._entries: list[tuple[dict[str, Any], str, Tensor, int, int | None]] = [
            (
                {r.key: r.tensor} if r.owner is None else r.owner,
                r.key,
                r.tensor,
                r.tensor.data_ptr(),
                _version(r.tensor),
            )
            for r in self._weights
        ]
        self._meta = [(r.tensor.dtype, r.tensor.device, r.tensor.shape) for r in self._weights]
        self._training = self._training_flags()
        self._native = cpu.loaded()  # decided once: the two kinds of checksums differ
        self._sums = self._checksums()
        self._proved_sums = [_checksum(r.tensor) for r in self._proved]

    def current(self, ref: WeightRef) -> Tensor:
        """The tensor the module holds now."""
        return ref.owner[ref.key] if ref.owner is not None and ref.owner.get(ref.key) is not None else ref.tensor

    def touched(self) -> bool:
        """Whether any tensor was replaced, moved, or written in place (by an op that counts versions)."""
        for owner, key, tensor, pointer, version in self._entries:  # 0.1 us a tensor, on every call
            if owner.get(key) is not tensor or tensor.data_ptr() != pointer:
                return True
            if version is not None and tensor._version != version:
                return True
        return False

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
        """What changed in dtype, device, shape or structure, so that the program must be made anew; None: nothing."""
        for ref, (dtype, device, shape) in zip(self._weights, self._meta, strict=True):
            now = self.current(ref)
            if (now.dtype, now.device, now.shape) != (dtype, device, shape):
                return (
                    f"{ref.name} changed from {dtype} {list(shape)} on {device} "
                    f"to {now.dtype} {list(now.shape)} on {now.device}"
                )
        for ref, known in zip(self._proved, self._proved_sums, strict=True):
            if _checksum(self.current(ref)) != known:
                return f"{ref.name}, which masks or positions were proved from, has other values"
        return self._rearranged()

    def contents_changed(self) -> bool:
        """Compare checksums: finds writes through `.data`, which count no version."""
        sums = self._checksums()
        changed = sums != self._sums
        self._sums = sums
        return changed

    def _checksums(self) -> list[int]:
        tensors = [ref.tensor for ref in self._weights]
        if self._native and all(t.is_cpu and t.is_contiguous() for t in tensors):
            with torch.no_grad():
                return cpu.CHECKSUMS(tensors)
        with torch.no_grad():
            folded = [_folded(t) for t in tensors]
        devices = dict.fromkeys(x.device for x in folded)
        read = {d: iter(torch.stack([x for x in folded if x.device == d]).tolist()) for d in devices}
        return [next(read[x.device]) for x in folded]

    def _rearranged(self) -> str | None:
        for table, children in self._children:
            if list(table.values()) != children:
                return f"a submodule was replaced, added or removed (one of {', '.join(table)})"
        for table, key, ref in self._shared:
            held: Any = table.get(key)
            if held is not self.current(ref):
                return f"{key} no longer shares its tensor with {ref.name}"
        if any(table.get(key) is not None for table, key in self._absent):
            return "a parameter or buffer that was None has a value"
        return None

    def _training_flags(self) -> list[bool | None]:
        return [m.training if m is not None else None for m in (ref() for ref in self._modules)]


def _shared(tables: list[dict[str, Any]], weights: list[WeightRef]) -> list[tuple[dict[str, Any], str, WeightRef]]:
    """Places besides `owner[key]` that hold a weight: tied weights can come apart."""
    known = {id(ref.tensor): ref for ref in weights}
    return [
        (table, key, known[id(value)])
        for table in tables
        for key, value in table.items()
        if id(value) in known and (known[id(value)].owner is not table or known[id(value)].key != key)
    ]


_COLUMNS = 1024
_ODD = (0x5851F42D4C957F2D, 0x14057B7EF767814F, 0x2545F4914F6CDD1D)  # multipliers of common generators


def _checksum(tensor: Tensor) -> int:
    return int(_folded(tensor))


def _folded(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device, so that one readback tells of many tensors.

    Order matters in it: rows and columns of the bytes are summed, each weighted by its place, so that exchanged ones
    are noticed too. Weights are odd, and so a change of one number is never lost modulo 2^64.
    """
    if tensor.is_meta or not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    flat = tensor.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    flat = flat.contiguous().view(-1)
    # Eight bytes at a time where they fit: 38 us instead of 147 for 2.6 MB.
    wide = flat.numel() * flat.element_size() % 8 == 0 and flat.data_ptr() % 8 == 0
    integers = flat.view(torch.int64 if wide else _INTEGERS[flat.element_size()])
    whole = integers.numel() // _COLUMNS * _COLUMNS
    table = integers[:whole].view(-1, _COLUMNS)
    columns, rows, rest = table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64), integers[whole:].long()
    return _weighted(rows, _ODD[0]) + _weighted(columns, _ODD[1]) + _weighted(rest, _ODD[2])


def _weighted(numbers: Tensor, odd: int) -> Tensor:
    places = torch.arange(len(numbers), device=numbers.device)
    return (numbers * ((2 * places + 1) * odd)).sum()
