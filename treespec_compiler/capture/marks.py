"""Telling whether a value is what it was: the same tensors, not written since, and the same numbers."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

CONTAINERS = (dict, list, set)
_NUMBERS = (bool, int, float, str, type(None))


class ValueMark:
    """What a value is now.

    NOTE no id alone: a tensor that took the place of one that is gone may have its id and its version. And no weak
    reference to a tensor where its memory has one: `swap_tensors`, which Module.to and torchao use, refuses those.
    """

    def __init__(self, value: Any) -> None:
        self._type = type(value)
        self._tensors = [_told(t) for t in tensors_of(value)]
        self._rest = _rest(value)

    def fits(self, value: Any) -> bool:
        """Whether `value` is what was marked, and nobody wrote to it by an op that counts versions."""
        if type(value) is not self._type or [_told(t) for t in tensors_of(value)] != self._tensors:
            return False
        rest = _rest(value)
        return rest == self._rest if isinstance(value, (*_NUMBERS, *CONTAINERS, tuple)) else rest is self._rest


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested plain containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list, set)) else ()
    return [t for part in parts for t in tensors_of(part)]


class _Itself:
    """A tensor without memory of its own, for as long as it lives."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        mine = self._tensor()
        return mine is not None and isinstance(other, _Itself) and other._tensor() is mine

    __hash__ = None  # type: ignore[assignment]


def _told(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor's values from others: its memory, which part of it, and how often it was written."""
    try:
        memory = StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return _Itself(tensor), _version(tensor)
    return memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, _version(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _rest(value: Any) -> Any:
    """What besides tensors tells a value from another."""
    if isinstance(value, Tensor):
        return None
    return len(value) if isinstance(value, (*CONTAINERS, tuple)) else value
