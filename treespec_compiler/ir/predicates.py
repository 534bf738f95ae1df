"""Predicates over positions: one sympy expression, evaluated on numbers or index tensors, and printed for people.

The symbols are Q and K, the positions of a query and a key on one path. Positions are whole numbers, so a floor of a
quotient is a whole division: nothing is rounded to a float on the way.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

Q, K = sympy.symbols("q k", integer=True, nonnegative=True)

CAUSAL = sympy.Le(K, Q)

_RELATIONS: dict[type, Callable[[Any, Any], Any]] = {
    sympy.LessThan: operator.le,
    sympy.StrictLessThan: operator.lt,
    sympy.GreaterThan: operator.ge,
    sympy.StrictGreaterThan: operator.gt,
    sympy.Equality: operator.eq,
    sympy.Unequality: operator.ne,
}
_JOINED: dict[type, Callable[[Any, Any], Any]] = {
    sympy.And: operator.and_,
    sympy.Or: operator.or_,
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
}
_PARSED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: lambda a, b: sympy.floor(a / b),
    ast.Mod: sympy.Mod,
    ast.BitAnd: sympy.And,
    ast.BitOr: sympy.Or,
    ast.LtE: sympy.Le,
    ast.Lt: sympy.Lt,
    ast.GtE: sympy.Ge,
    ast.Gt: sympy.Gt,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}


def function(expr: Any, symbols: Sequence[Any]) -> Callable[..., Any]:
    """The expression as a function of its symbols: of integers, or of integer tensors, which broadcast."""
    if expr in symbols:
        at = list(symbols).index(expr)
        return lambda *values: values[at]
    if expr.is_Integer:
        value = int(expr)
        return lambda *_: value
    kind = type(expr)
    if kind in _RELATIONS or kind in _JOINED:
        parts = [function(part, symbols) for part in expr.args]
        combine = _RELATIONS.get(kind) or _JOINED[kind]
        return lambda *values: functools.reduce(combine, [part(*values) for part in parts])
    if kind is sympy.floor:
        above, below = (function(part, symbols) for part in sympy.fraction(sympy.together(expr.args[0])))
        return lambda *values: above(*values) // below(*values)
    if kind is sympy.Mod:
        whole, by = (function(part, symbols) for part in expr.args)
        return lambda *values: whole(*values) % by(*values)
    if kind is sympy.Not:
        inner = function(expr.args[0], symbols)
        return lambda *values: inner(*values) ^ True
    raise TypeError(f"{expr} is no predicate over positions: {kind.__name__} has no rule here")


@functools.cache
def parse(text: str) -> Any:
    """The predicate of a text such as `(k < 4) | (q - k < 8)`, over q and k: + - * // % | & ~ and comparisons.

    Raises ValueError for any other text.
    """
    try:
        return _parsed(ast.parse(text, mode="eval").body)
    except (KeyError, SyntaxError) as error:
        raise ValueError(f"{text} is no predicate over q and k") from error


def _parsed(tree: Any) -> Any:
    if isinstance(tree, ast.Name):
        return {"q": Q, "k": K}[tree.id]
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return sympy.Integer(tree.value)
    if isinstance(tree, ast.UnaryOp):
        return sympy.Not(_parsed(tree.operand)) if isinstance(tree.op, ast.Invert) else -_parsed(tree.operand)
    if isinstance(tree, ast.Compare):
        return _PARSED[type(tree.ops[0])](_parsed(tree.left), _parsed(tree.comparators[0]))
    if isinstance(tree, ast.BinOp):
        return _PARSED[type(tree.op)](_parsed(tree.left), _parsed(tree.right))
    raise KeyError(type(tree).__name__)


class _Text(StrPrinter):
    """As a person writes it: `q - k < 8`, `floor(q / 4) == floor(k / 4)`."""

    def _print_Add(self, expr: Any, order: Any = None) -> str:
        parts = sorted(expr.args, key=lambda a: (a.could_extract_minus_sign(), sympy.default_sort_key(a)))
        first, *rest = parts
        return self._print(first) + "".join(
            f" - {self._print(-part)}" if part.could_extract_minus_sign() else f" + {self._print(part)}"
            for part in rest
        )

    def _print_floor(self, expr: Any) -> str:
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        return f"floor({self._print(above)} / {self._print(below)})"

    def _print_Mod(self, expr: Any) -> str:
        return f"({self._print(expr.args[0])}) % {self._print(expr.args[1])}"

    def _print_Relational(self, expr: Any) -> str:
        sign = "==" if isinstance(expr, sympy.Equality) else "!=" if isinstance(expr, sympy.Unequality) else expr.rel_op
        return f"{self._print(expr.lhs)} {sign} {self._print(expr.rhs)}"


def text(expr: Any) -> str:
    """The expression as a person writes it."""
    return _Text().doprint(expr)
