"""Checks of values in forward that only raise or tell: `if ids.max() >= n: raise`, `assert (x == x).all()`.

A trace cannot decide them, and has nothing to decide: where such a check does not raise, what follows is the same. The
function is traced without the statement at which the trace stopped; nothing else of it changes. Where somebody catches
what it raises, or is told by a method of the model's own, it is no such check.
"""

from __future__ import annotations

import ast
import builtins
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType

# What a test may call: it reads values and changes nothing.
_READS = {
    "abs", "all", "allclose", "amax", "amin", "any", "bool", "cpu", "detach", "dim", "eq", "equal", "float", "ge", "gt",
    "hasattr", "int", "is_floating_point", "isfinite", "isinf", "isinstance", "isnan", "item", "le", "len",
    "logical_and", "logical_not", "logical_or", "lt", "max", "mean", "min", "ne", "ndimension", "numel", "size", "std",
    "sum", "tolist",
}  # fmt: skip
_TELLS = {"warn", "debug", "info", "warning", "error", "critical", "exception", "log"}
_LOGGERS = {"logger", "_logger", "logging", "getLogger"}  # `self.logger.info`, `logging.getLogger(name).info`


def check_at(function: FunctionType, body: ast.FunctionDef, line: int) -> ast.stmt | None:
    """The statement of the function at the line, if it is a check."""
    return next((s for s in ast.walk(body) if _is_check(s, function) and _spans(s.test, line)), None)  # type: ignore


def caught(places: Sequence[tuple[str, int]]) -> bool:
    """Whether what is raised in one of these files, at its line, is caught there: by a handler, or by `suppress`."""
    return any(_caught(filename, line) for filename, line in places)


def _caught(filename: str, line: int) -> bool:
    try:
        tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return True  # nobody knows
    return any(
        _catches(node) and node.body[0].lineno <= line <= (node.body[-1].end_lineno or line)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Try, ast.TryStar, ast.With, ast.AsyncWith))
    )


def _catches(node: ast.Try | ast.TryStar | ast.With | ast.AsyncWith) -> bool:
    """Handlers that raise again in the end do not."""
    if isinstance(node, (ast.Try, ast.TryStar)):
        return any(not isinstance(handler.body[-1], ast.Raise) for handler in node.handlers)
    calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
    return any(_name(call.func) == "suppress" for call in calls)


def _spans(node: ast.expr, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _is_check(node: ast.AST, function: FunctionType) -> bool:
    if isinstance(node, ast.Assert):
        return _only_reads(node.test)
    if not isinstance(node, ast.If) or node.orelse:
        return False
    return _only_reads(node.test) and all(isinstance(s, ast.Raise) or _only_tells(s, function) for s in node.body)


def _only_tells(statement: ast.stmt, function: FunctionType) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not _is_teller(call.func, function):
        return False
    return all(map(_only_reads, [*call.args, *(k.value for k in call.keywords)]))


def _is_teller(called: ast.expr, function: FunctionType) -> bool:
    """`print`, or one of `warnings`, `logging` or a logger: a method `log` of the model's own may do anything."""
    if isinstance(called, ast.Name):
        found = function.__globals__.get(called.id, getattr(builtins, called.id, None))
        return found in (print, warnings.warn)
    if not isinstance(called, ast.Attribute) or called.attr not in _TELLS:
        return False
    if isinstance(called.value, ast.Name) and called.value.id in function.__globals__:
        known = function.__globals__[called.value.id]
        return known in (warnings, logging) or isinstance(known, (logging.Logger, logging.LoggerAdapter))
    owner = called.value.func if isinstance(called.value, ast.Call) else called.value
    return _name(owner) in _LOGGERS


def _only_reads(value: ast.expr) -> bool:
    for node in ast.walk(value):
        if isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Lambda)):
            return False
        if isinstance(node, ast.Call) and (_name(node.func) not in _READS or _of_the_model(node.func)):
            return False
    return True


def _of_the_model(called: ast.expr) -> bool:
    """A method of the model's own, which may bear the name of a tensor's."""
    return isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self"


def _name(value: ast.expr) -> str:
    return value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
