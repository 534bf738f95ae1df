"""Checks of values in forward that only raise or tell: `if ids.max() >= n: raise`, `assert (x == x).all()`.

A trace cannot decide them, and has nothing to decide: where such a check does not raise, what follows is the same. The
function is traced without the statement at which the trace stopped; nothing else of it changes.
"""

from __future__ import annotations

import ast

# What a test may call: it reads values and changes nothing.
_READS = {
    "abs", "all", "allclose", "any", "bool", "cpu", "detach", "dim", "eq", "equal", "float", "ge", "gt", "hasattr",
    "int", "is_floating_point", "isfinite", "isinf", "isinstance", "isnan", "item", "le", "len", "logical_and",
    "logical_not", "logical_or", "lt", "max", "mean", "min", "ne", "ndimension", "numel", "size", "std", "sum",
    "tolist",
}  # fmt: skip
_TELLS = {"print", "warn", "debug", "info", "warning", "error", "critical", "exception", "log"}


def check_at(body: ast.FunctionDef, line: int) -> ast.stmt | None:
    """The statement of a function at the line, if it is a check."""
    return next((s for s in ast.walk(body) if _is_check(s) and _spans(s.test, line)), None)  # type: ignore


def _spans(node: ast.expr, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return _only_reads(node.test)
    if not isinstance(node, ast.If) or node.orelse:
        return False
    return _only_reads(node.test) and all(isinstance(s, ast.Raise) or _only_tells(s) for s in node.body)


def _only_tells(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call):
        return False
    parts = [*call.args, *(k.value for k in call.keywords)]
    return _name(call.func) in _TELLS and all(map(_only_reads, parts))


def _only_reads(value: ast.expr) -> bool:
    for node in ast.walk(value):
        if isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Lambda)):
            return False
        if isinstance(node, ast.Call) and _name(node.func) not in _READS:
            return False
    return True


def _name(value: ast.expr) -> str:
    return value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
