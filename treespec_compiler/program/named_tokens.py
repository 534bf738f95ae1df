"""Token ids that a model's code and settings name: what a branch on a token's value would ask for."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from ..capture.code import inner_code

# A longer buffer of integers is a table.
MOST_NUMBERS = 64


def named_tokens(model: nn.Module, vocab: int) -> list[int]:
    """Integers in [0, vocab), ascending: written in methods of the model's modules, or held by these and what they
    hold (a configuration, a short buffer)."""
    found: set[int] = set()
    for kind in {type(module) for module in model.modules()}:
        found.update(_written(kind))
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            found.update(_held(value))
            if type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
                held = getattr(value, "__dict__", {})
                found.update(number for inner in held.values() for number in _held(inner))
    return sorted(number for number in found if 0 <= number < vocab)


def _written(kind: type) -> Iterator[int]:
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            for value in vars(base).values():
                inner = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(inner, FunctionType):
                    yield from _constants(inner.__code__)
                yield from _held(value)


def _constants(code: CodeType) -> Iterator[int]:
    for each in inner_code(code):
        for constant in each.co_consts:
            yield from _held(constant)


def _held(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, (tuple, list, set, frozenset)) and len(value) <= MOST_NUMBERS:
        yield from (each for each in value if type(each) is int)
    elif isinstance(value, Tensor) and not value.is_meta and value.numel() <= MOST_NUMBERS:
        if not value.is_floating_point() and not value.is_complex():
            yield from map(int, value.flatten().tolist())
