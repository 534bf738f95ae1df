"""Loops over pieces of the text: `for i in range(0, T, size): ...` is one turn as long as the text is one piece.

A trace cannot go through a loop whose turns are as many as the text says. `range(a, b, c)` is written as

    (a,) if a < b <= a + c else range(a, b, c)

which is the same for all numbers: the trace takes the first branch where the text is no longer than a piece, and its
guard becomes the end of the context.
"""

from __future__ import annotations

import ast
import builtins
from types import FunctionType

from .empty_picks import spans

_ASKS = {"size", "dim", "len", "int", "min", "max", "ceil"}  # calls that change nothing


def turn_at(function: FunctionType, body: ast.FunctionDef, line: int) -> dict[int, ast.expr] | None:
    """The `range` that is gone over at the line, by its id, in other words; None: there is none, or several."""
    if function.__globals__.get("range", range) is not builtins.range or "range" in function.__code__.co_varnames:
        return None
    loops = [n for n in ast.walk(body) if isinstance(n, (ast.For, ast.comprehension))]
    found = [each.iter for each in loops if spans(each.iter, line) and _is_range(each.iter)]
    if len(found) != 1:
        return None
    call = found[0]
    assert isinstance(call, ast.Call)
    numbers = [f"({ast.unparse(a)})" for a in call.args]
    if len(numbers) == 1:
        once = f"(0,) if {numbers[0]} == 1 else {ast.unparse(call)}"
    else:
        first, end, step = numbers
        once = f"({first},) if {first} < {end} <= {first} + {step} else {ast.unparse(call)}"
    made = ast.parse(once, mode="eval").body
    for node in ast.walk(made):
        if "lineno" in node._attributes:
            ast.copy_location(node, call)
    return {id(call): made}


def _is_range(node: ast.expr) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"
    return called and isinstance(node, ast.Call) and len(node.args) in (1, 3) and not node.keywords and _plain(node)


def _plain(call: ast.Call) -> bool:
    """Whether its arguments may be computed more than once."""
    for argument in call.args:
        for node in ast.walk(argument):
            if isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Starred)):
                return False
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name not in _ASKS:
                    return False
    return True
