"""What tells two example calls apart: constant arguments are part of a program."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that is told apart by identity; it is held, so that no other one gets its address."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def argument_key(value: Any) -> Hashable:
    """Equal for arguments that a trace cannot tell apart, and only for them.

    Numbers, strings and the like go by type and value (1, 1.0 and True are three, 0.0 and -0.0 two), tensors by their
    contents, built-in containers by what they hold, and every other object by identity: its `repr` or `==` may hide
    what a forward pass reads.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return kind, value.dtype, value.device, tuple(value.shape), tuple(value.stride()), _contents(value)
    if kind in (tuple, list):
        return kind, tuple(argument_key(v) for v in value)
    if isinstance(value, Mapping) and kind is dict:
        return kind, tuple((argument_key(k), argument_key(v)) for k, v in value.items())
    if kind in (set, frozenset):
        return kind, frozenset(argument_key(v) for v in value)
    if kind in (float, complex):
        return kind, repr(value)  # equal for two NaNs, unequal for the two zeros
    return (kind, value) if kind in _PLAIN or isinstance(value, enum.Enum) else _Same(value)


def example_key(example: Any) -> Hashable:
    """The key of an example call: nothing, a tensor of ids, positional arguments, or keyword arguments."""
    if isinstance(example, Mapping):
        return tuple((k, argument_key(v)) for k, v in example.items())
    return argument_key(tuple(example) if isinstance(example, (tuple, list)) else (example,))


def _contents(value: Tensor) -> Hashable:
    if value.is_meta or value.layout is not torch.strided:
        return _Same(value)
    return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())
