"""Telling whether a value is what it was: the same tensors, not written since, and the same numbers."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

CONTAINERS = (dict, list, set)
_NUMBERS = (bool, int, float, str, type(None))


class ValueMark:
    """What a value is now.

    NOTE no id alone: a tensor that took the place of one that is gone may have its id and its version.
    """

    def __init__(self, value: Any) -> None:
        self._type = type(value)
        self._tensors = [(weakref.ref(t), _version(t)) for t in tensors_of(value)]
        self._rest = _rest(value)

    def fits(self, value: Any) -> bool:
        """Whether `value` is what was marked, and nobody wrote to it by an op that counts versions."""
        tensors = tensors_of(value)
        if type(value) is not self._type or len(tensors) != len(self._tensors):
            return False
        if any(
            ref() is not t or version != _version(t) for (ref, version), t in zip(self._tensors, tensors, strict=True)
        ):
            return False
        rest = _rest(value)
        return rest == self._rest if isinstance(value, (*_NUMBERS, *CONTAINERS, tuple)) else rest is self._rest


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested plain containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list, set)) else ()
    return [t for part in parts for t in tensors_of(part)]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _rest(value: Any) -> Any:
    """What besides tensors tells a value from another."""
    if isinstance(value, Tensor):
        return None
    return len(value) if isinstance(value, (*CONTAINERS, tuple)) else value
