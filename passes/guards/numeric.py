"""A condition on the number of tokens as a function of whole numbers: sympy takes a millisecond to decide one."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import sympy

OfWholeNumbers = Callable[[int], Any]

_FOLDED: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Max": max,
    "Min": min,
}
_OF_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "LessThan": operator.le,
    "StrictLessThan": operator.lt,
    "GreaterThan": operator.ge,
    "StrictGreaterThan": operator.gt,
    # NOTE torch's functions of these names, and sympy's Mod: all of them round down, as Python does.
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}


@functools.lru_cache(maxsize=256)
def of_whole_numbers(expr: Any, length: sympy.Symbol) -> OfWholeNumbers | None:
    """`expr` as a function of `length`; None: it holds what is no arithmetic of whole numbers."""
    if expr == length:
        return lambda n: n
    if expr.is_Integer or expr in (sympy.true, sympy.false):
        value = int(expr) if expr.is_Integer else bool(expr)
        return lambda n: value
    name = type(expr).__name__
    parts = [of_whole_numbers(a, length) for a in expr.args]
    known = [p for p in parts if p is not None]
    if not parts or len(known) != len(parts):
        return None
    if name in _FOLDED:
        fold = _FOLDED[name]
        return lambda n: functools.reduce(fold, (part(n) for part in known))
    if name in _OF_TWO and len(known) == 2:
        (left, right), of_two = known, _OF_TWO[name]
        return lambda n: of_two(left(n), right(n))
    if name == "Not":
        return lambda n: not known[0](n)
    if name == "Pow" and expr.args[1].is_Integer and expr.args[1] >= 0:
        return lambda n: math.prod([known[0](n)] * int(expr.args[1]))
    return None
