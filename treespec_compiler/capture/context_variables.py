"""Context variables that forward reads: a trace cannot ask for them, so their values are written in their place.

`scale.get()` becomes the number that it gives; a program is made anew once the variable gives another one, which is
looked at on every call, in the context of whoever calls.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any

from ..errors import Unsupported

_PLAIN = (bool, int, float, str, type(None))
_UNSET = object()


def context_reads_at(
    function: FunctionType, body: ast.FunctionDef, line: int
) -> tuple[dict[int, Any], tuple[Callable[[], bool], ...]] | None:
    """What stands in for reads of context variables in a statement at the line, by their ids, and whether each gives
    something else now; None: there are none, or what they hold is no number, text or truth value.
    """
    found: dict[int, Any] = {}
    watched: list[Callable[[], bool]] = []
    for call, value in _reads(function, body, line):
        if type(value) not in _PLAIN:
            return None
        found[id(call)] = ast.copy_location(ast.Constant(value), call)
        watched.append(_is_another(function, call, value))
    return (found, tuple(watched)) if found else None


def explain_context(refusal: Unsupported, function: FunctionType, body: ast.FunctionDef, line: int) -> None:
    """Say in the refusal of a trace that stopped at the line which context variable is in the way."""
    for call, value in _reads(function, body, line):
        name = ast.unparse(call.func).removesuffix(".get")
        if type(value) not in _PLAIN:
            what = "nothing" if value is _UNSET else f"a {type(value).__name__}"
            refusal.reason = f"forward reads the context variable {name}, which holds {what}"
            refusal.way_out = (
                "keep a number, a text or a truth value in it, or give the model the object as an attribute"
            )


def _reads(function: FunctionType, body: ast.FunctionDef, line: int) -> Iterator[tuple[ast.Call, Any]]:
    stored = {n.id for n in ast.walk(body) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    stored |= {n.arg for n in ast.walk(body) if isinstance(n, ast.arg)}
    for call in ast.walk(body):
        if not isinstance(call, ast.Call) or not call.lineno <= line <= (call.end_lineno or call.lineno):
            continue
        names = {n.id for n in ast.walk(call.func) if isinstance(n, ast.Name)}
        variable = None if names & stored else _variable(function, call)
        if variable is not None:
            yield call, _value(variable, call)


def _variable(function: FunctionType, call: ast.Call) -> ContextVar[Any] | None:
    """The variable of `NAME.get()` or `module.NAME.get(default)`; None: the call is none of these."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "get" or call.keywords or len(call.args) > 1:
        return None
    if not all(isinstance(a, ast.Constant) for a in call.args):
        return None
    found = _named(function, call.func.value)
    return found if isinstance(found, ContextVar) else None


def _named(function: FunctionType, node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute):
        inside = _named(function, node.value)
        return vars(inside).get(node.attr) if isinstance(inside, ModuleType) else None
    if not isinstance(node, ast.Name):
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    if node.id in cells:
        try:
            return cells[node.id].cell_contents
        except ValueError:
            return None
    return function.__globals__.get(node.id)


def _value(variable: ContextVar[Any], call: ast.Call) -> Any:
    default = [a.value for a in call.args if isinstance(a, ast.Constant)]
    return variable.get(*default) if default else variable.get(_UNSET) if _unset(variable) else variable.get()


def _unset(variable: ContextVar[Any]) -> bool:
    """Whether it has neither a value nor a default of its own."""
    try:
        variable.get()
    except LookupError:
        return True
    return False


def _is_another(function: FunctionType, call: ast.Call, value: Any) -> Callable[[], bool]:
    def is_another() -> bool:
        variable = _variable(function, call)
        if variable is None:
            return True
        now = _value(variable, call)
        return type(now) is not type(value) or repr(now) != repr(value)

    return is_another
