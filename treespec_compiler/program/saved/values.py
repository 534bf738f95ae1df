"""Arguments, sizes and fake tensors of a graph as JSON values, and back.

What has no rule here is not saved: the way back is exact, or there is none. A file names ops and numbers; nothing of it
is evaluated, imported or unpickled.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...ir.library import definition
from ...ir.private_torch import FakeTensor, OpOverload
from ...ir.registry import USERS_NAMESPACE

if TYPE_CHECKING:
    import sympy


class CannotSave(Exception):
    """A program holds something that a file cannot."""


class CannotLoad(Exception):
    """A file holds something that is no program, or not one that runs here."""


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{f.__name__}": f
        for f in (
            *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
            *(operator.mod, operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le),
            *(operator.gt, operator.ge, operator.and_, operator.or_),
        )
    },
    **{
        f"torch.{f.__name__}": f
        for f in (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sum)
    },
    **{f"math.{f.__name__}": f for f in (math.floor, math.ceil, math.trunc)},
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}

# Ops that mean the same in every process of these versions; those of users' own are code that no key knows.
_TORCHS = {"aten", "prims", "_c10d_functional"}
TRANSFORMERS = frozenset({"transformers"})
"""Namespaces of ops that come with transformers: its version is in the key of a saved program."""


def target_text(target: Any, others: frozenset[str] = frozenset()) -> str:
    """`aten.add.Tensor`, `operator.getitem`. `others`: namespaces whose ops may be written, too."""
    if isinstance(target, OpOverload):
        own = definition(target) is not None and target.namespace != USERS_NAMESPACE
        if own or target.namespace in _TORCHS | others:
            return str(target)
        raise CannotSave(f"the op {target}, which somebody registered")
    name = _FUNCTION_NAMES.get(target) if callable(target) else None
    if name is None:
        raise CannotSave(f"a call of {getattr(target, '__name__', target)}")
    return name


def target_of(text: str) -> Any:
    """The inverse; a name that is none of these raises."""
    if text in _FUNCTIONS:
        return _FUNCTIONS[text]
    parts = text.split(".")
    found: Any = None
    if len(parts) == 3 and all(part.isidentifier() for part in parts):
        packet = getattr(getattr(torch.ops, parts[0], None), parts[1], None)
        found = getattr(packet, parts[2], None)
    if not isinstance(found, OpOverload):
        raise CannotLoad(f"the op {text[:80]}, which is not there")
    try:
        target_text(found, TRANSFORMERS)
    except CannotSave as error:
        raise CannotLoad(str(error)) from None
    return found


_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def named(value: torch.dtype | torch.layout | torch.memory_format) -> str:
    """`float32` of `torch.float32`."""
    return str(value).removeprefix("torch.")


def of_name(kind: str, name: Any) -> Any:
    """The inverse of `named`, for one of the kinds "dtype", "layout" and "memory_format"."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, _NAMED[kind]):
        raise CannotLoad(f"the {kind} {name!r}")
    return found


def device_of(text: Any) -> torch.device:
    try:
        return torch.device(text)
    except (RuntimeError, TypeError) as error:
        raise CannotLoad(f"the device {text!r}") from error


def argument(value: Any) -> Any:
    """An argument of a node as a JSON value."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple) and type(value).__name__ in ("tuple", "Size"):
        return {"tuple": [argument(v) for v in value]}
    if isinstance(value, list):
        return [argument(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[argument(k), argument(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [argument(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    kind = next((k for k, cls in _NAMED.items() if isinstance(value, cls)), None)
    if kind is None:
        raise CannotSave(f"an argument of type {type(value).__name__}")
    return {kind: named(value)}


def argument_of(value: Any, made: Mapping[str, fx.Node]) -> Any:
    """The inverse; `made` has the nodes so far."""
    if isinstance(value, list):
        return [argument_of(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    kind, inner = _single(value)
    if kind == "node":
        return made[inner]
    if kind == "float":
        return float(inner)
    if kind == "tuple":
        return tuple(argument_of(v, made) for v in inner)
    if kind == "dict":
        return {argument_of(k, made): argument_of(v, made) for k, v in inner}
    if kind == "slice":
        return slice(*(argument_of(v, made) for v in inner))
    return device_of(inner) if kind == "device" else of_name(kind, inner)


def _single(value: dict[str, Any]) -> tuple[str, Any]:
    known = {"node", "float", "tuple", "dict", "slice", "device", "tensor", "size", *_NAMED}
    if len(value) != 1 or next(iter(value)) not in known:
        raise CannotLoad(f"a value of kind {', '.join(map(str, value))[:80]}")
    return next(iter(value.items()))


Size = int | torch.SymInt


class SizeTexts:
    """SizeTexts in terms of the number of tokens, which is the one symbol of a program before it is lowered."""

    def __init__(self, length: sympy.Symbol) -> None:
        self.length = length

    def text(self, size: Size) -> Any:
        if type(size) is int:
            return size
        assert isinstance(size, torch.SymInt)
        return self._expression(size.node.expr)

    def _expression(self, expr: Any) -> Any:
        if expr == self.length:
            return "T"
        if expr.is_Integer:
            return int(expr)
        name = type(expr).__name__
        if name not in _OPERATIONS or (name == "Pow" and not expr.args[1].is_Integer):
            raise CannotSave(f"the size {expr}")
        return [name, *map(self._expression, expr.args)]


def _power(base: Any, exponent: Any) -> Any:
    if type(exponent) is not int or not 0 <= exponent <= 8:
        raise CannotLoad(f"the power {exponent!r}")
    return base**exponent


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": _power,
    "FloorDiv": operator.floordiv,
    "PythonMod": operator.mod,
    "Mod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def size_of(text: Any, length: torch.SymInt) -> Size:
    """The inverse of `SizeTexts.text`, for the symbol `length`."""
    if text == "T":
        return length
    if isinstance(text, list) and len(text) >= 3 and text[0] in _OPERATIONS:
        return functools.reduce(_OPERATIONS[text[0]], [size_of(part, length) for part in text[1:]])
    if type(text) is not int:
        raise CannotLoad(f"the size {text!r}")
    return text


def fake(value: Any, sizes: SizeTexts) -> Any:
    """A node's value, as the fake tensors of a trace say it, as a JSON value."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, FakeTensor):
        if value.layout is not torch.strided:
            raise CannotSave(f"a value laid out as {value.layout}")
        shape, stride = ([sizes.text(s) for s in dims] for dims in (value.shape, value.stride()))
        where = [] if value.device.type == "cpu" else [str(value.device)]
        return {"tensor": [named(value.dtype), shape, stride, *where]}
    if isinstance(value, (tuple, list)):
        found = [fake(v, sizes) for v in value]
        return {"tuple": found} if isinstance(value, tuple) else found
    if isinstance(value, torch.SymInt):
        return {"size": sizes.text(value)}
    raise CannotSave(f"a value of type {type(value).__name__}")


def fake_of(text: Any, length: torch.SymInt) -> Any:
    """The inverse, in the fake mode that is on."""
    if isinstance(text, list):
        return [fake_of(v, length) for v in text]
    if not isinstance(text, dict):
        return text
    kind, inner = _single(text)
    if kind == "tuple":
        return tuple(fake_of(v, length) for v in inner)
    if kind == "size":
        return size_of(inner, length)
    if kind != "tensor":
        raise CannotLoad(f"a value of kind {kind}")
    dtype, shape, stride, *where = inner
    shape, stride = ([size_of(s, length) for s in dims] for dims in (shape, stride))
    device = device_of(where[0]) if where else torch.device("cpu")
    found: Tensor = torch.empty_strided(shape, stride, dtype=of_name("dtype", dtype), device=device)
    return found
