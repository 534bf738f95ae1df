"""Checks of values in forward that only raise or tell: `if ids.max() >= n: raise`, `assert (x == x).all()`.

A trace cannot decide them, and has nothing to decide: where such a check does not raise, what follows is the same. The
function is traced without the statement at which the trace stopped; nothing else of it changes.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from ..errors import Refusal, Unsupported

# What a test may call: it reads values and changes nothing.
_READS = {
    "abs", "all", "allclose", "any", "bool", "cpu", "detach", "dim", "eq", "equal", "float", "ge", "gt", "hasattr",
    "int", "is_floating_point", "isfinite", "isinf", "isinstance", "isnan", "item", "le", "len", "logical_and",
    "logical_not", "logical_or", "lt", "max", "mean", "min", "ne", "ndimension", "numel", "size", "std", "sum",
    "tolist",
}  # fmt: skip
_TELLS = {"print", "warn", "debug", "info", "warning", "error", "critical", "exception", "log"}


@dataclass(frozen=True)
class Unchecked:
    """A function, and its code without a check."""

    function: FunctionType
    before: CodeType
    code: CodeType
    lines: tuple[int, ...]
    """Of the checks that are gone."""


def without_check(refusal: Unsupported, known: Sequence[Unchecked]) -> list[Unchecked] | None:
    """The functions of `known` and that at whose line a trace stopped, without its check; None: there is no check."""
    frames = list(getattr(refusal.__cause__, "real_stack", None) or [])
    if refusal.kind not in (Refusal.CONTROL, Refusal.NO_GRAPH) or not frames:
        return None
    frame = frames[-1]
    function = _function_at(frame.filename, frame.lineno)
    if function is None:
        return None
    lines = [line for each in known if each.function is function for line in each.lines]
    code = None if frame.lineno in lines else _without(function, [*lines, frame.lineno])
    if code is None:
        return None
    others = [each for each in known if each.function is not function]
    return [*others, Unchecked(function, function.__code__, code, (*lines, frame.lineno))]


@contextlib.contextmanager
def unchecked(those: Sequence[Unchecked]) -> Iterator[None]:
    """With these functions as they are without their checks."""
    held = [(each.function, each.function.__code__) for each in those]
    try:
        for each in those:
            each.function.__code__ = each.code
        yield
    finally:
        for function, code in reversed(held):
            function.__code__ = code


def _function_at(filename: str, line: int) -> FunctionType | None:
    """The function of a module, or method of one of its classes, that holds the line."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) != filename:
            continue
        for value in list(vars(module).values()):
            for each in (value, *(vars(value).values() if isinstance(value, type) else ())):
                function = inspect.unwrap(each) if isinstance(each, FunctionType) else getattr(each, "__func__", None)
                if isinstance(function, FunctionType) and _holds(function.__code__, filename, line):
                    return function
    return None


def _holds(code: CodeType, filename: str, line: int) -> bool:
    lines = [at for _, _, at in code.co_lines() if at is not None]
    return code.co_filename == filename and bool(lines) and min(lines) <= line <= max(lines)


def _without(function: FunctionType, lines: Sequence[int]) -> CodeType | None:
    """The function's code without the checks at these lines; None where one is no check."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef) or any(_is_private(node) for node in ast.walk(body)):
        return None
    for line in lines:
        found = next((s for s in ast.walk(body) if _is_check(s) and _spans(s.test, line)), None)  # type: ignore[attr-defined]
        if found is None:
            return None
        _Taken(found).visit(body)
    body.decorator_list = []
    return _compiled(body, function)


def _is_private(node: ast.AST) -> bool:
    """A name that means another one inside a class."""
    name = getattr(node, "attr", getattr(node, "id", ""))
    return isinstance(name, str) and name.startswith("__") and not name.endswith("__")


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


class _Taken(ast.NodeTransformer):
    """Puts nothing in the place of one statement."""

    def __init__(self, gone: ast.AST) -> None:
        self.gone = gone

    def visit(self, node: ast.AST) -> Any:
        if node is self.gone:
            return ast.copy_location(ast.Pass(), node)
        return super().generic_visit(node)


def _compiled(body: ast.FunctionDef, function: FunctionType) -> CodeType | None:
    """The code of the function, with the same variables of the functions around it."""
    old = function.__code__
    around = ast.parse(f"def around({', '.join(old.co_freevars)}):\n    pass")
    outer = around.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [body]
    ast.fix_missing_locations(around)
    whole = compile(around, old.co_filename, "exec")
    outer_code = next(c for c in whole.co_consts if isinstance(c, CodeType))
    found = [c for c in outer_code.co_consts if isinstance(c, CodeType) and c.co_name == body.name]
    if len(found) != 1 or found[0].co_freevars != old.co_freevars:
        return None
    return found[0].replace(co_qualname=old.co_qualname)
