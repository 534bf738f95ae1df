"""Places that a Python list or range holds: `self.wpe[range(len(ids))]` reads the same rows as `torch.arange` does.

A trace writes the list out, for one length. A tensor that is indexed by whole numbers in a list is indexed by a tensor
of them, so the list's own expression may be that tensor, where nothing but an index reads it. What is indexed is no
list: to one, a tensor of several numbers is an error, with which the trace ends.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from types import FunctionType

_IMPORT = "import torch as _treespec_torch"
_LIST = "list"  # a tuple alone would be a number for each dimension


def listed_places(function: FunctionType, body: ast.FunctionDef, line: int) -> dict[int, ast.expr] | None:
    """What stands in for lists of places at the line, or of a name that is stored or read there, by their ids.

    None: there are none. The function must then know their names (`imported`).
    """
    names = {*function.__code__.co_varnames, *function.__code__.co_freevars, *function.__code__.co_cellvars}
    if any(n in names or function.__globals__.get(n) not in (None, getattr(builtins, n)) for n in ("range", _LIST)):
        return None
    indices = [e for node in ast.walk(body) if isinstance(node, ast.Subscript) for e in _parts(node.slice)]
    found: dict[int, ast.expr] = {}
    for index in indices:
        at = index.lineno <= line <= (index.end_lineno or index.lineno)
        if isinstance(index, ast.Name):
            made = _only_value(body, index.id, indices)
            if made is None or not (at or made.lineno <= line <= (made.end_lineno or made.lineno)):
                continue
            index, at = made, True
        numbers = _numbers(index) if at else None
        if numbers is not None:
            found[id(index)] = _arange(numbers, index)
    return found or None


def imported(body: ast.FunctionDef) -> None:
    """Let the function know the names that stand-ins use."""
    statement = ast.parse(_IMPORT).body[0]
    for node in ast.walk(statement):
        if "lineno" in getattr(node, "_attributes", ()):
            ast.copy_location(node, body.body[0])
    body.body.insert(0, statement)


def _parts(index: ast.expr) -> Iterator[ast.expr]:
    """What a tensor is indexed by; the numbers of a tuple that is no range are dimensions of their own."""
    yield from index.elts if isinstance(index, ast.Tuple) else [index]


def _numbers(node: ast.expr) -> ast.Call | None:
    """The `range` whose numbers a list, comprehension or range holds, in their order."""
    if isinstance(node, ast.ListComp) and len(node.generators) == 1:
        loop = node.generators[0]
        same = isinstance(node.elt, ast.Name) and isinstance(loop.target, ast.Name) and node.elt.id == loop.target.id
        return _numbers(loop.iter) if same and not loop.ifs and not loop.is_async else None
    if isinstance(node, ast.List) and len(node.elts) == 1 and isinstance(node.elts[0], ast.Starred):
        return _numbers(node.elts[0].value)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
        return None
    if any(isinstance(a, ast.Starred) for a in node.args):
        return None
    if node.func.id == _LIST and len(node.args) == 1:
        return _numbers(node.args[0])
    return node if node.func.id == "range" and node.args else None


def _only_value(body: ast.FunctionDef, name: str, indices: list[ast.expr]) -> ast.expr | None:
    """What a name holds that is stored once and read by indices alone."""
    read = {id(i) for i in indices}
    uses = [n for n in ast.walk(body) if isinstance(n, ast.Name) and n.id == name]
    stores = [n for n in uses if not isinstance(n.ctx, ast.Load)]
    values = [
        s.value for s in ast.walk(body) if isinstance(s, ast.Assign) and len(s.targets) == 1 and s.targets[0] in stores
    ]
    arguments = {a.arg for a in ast.walk(body) if isinstance(a, ast.arg)}
    if len(values) != 1 or len(stores) != 1 or name in arguments:
        return None
    return values[0] if all(n in stores or id(n) in read for n in uses) else None


def _arange(numbers: ast.Call, at: ast.expr) -> ast.expr:
    made = ast.Call(ast.Attribute(ast.Name("_treespec_torch", ast.Load()), "arange", ast.Load()), numbers.args, [])
    return ast.fix_missing_locations(ast.copy_location(made, at))
