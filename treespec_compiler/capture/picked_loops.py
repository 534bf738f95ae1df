"""Loops over what was picked by some token: `for expert in (marks.sum((1, 2)) > 0).nonzero(): ...`.

A trace cannot know which experts that are, and need not: where no token picked one, each statement of the loop leaves
everything as it is (`empty_picks`), so that the loop may go over all of them. Marks are those of `one_hot`, which are
not negative: a sum of zero is a slice of zeros.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType

from .empty_picks import Branch, blocks, found_in, is_zero, read_outside, spans

NUMBER = "_treespec_number"
MOST_TURNS = 64
"""Every turn is traced. With more experts than this, rows that are sorted by expert are the way (docs/refusals.md)."""
_KEEPS_SIGN = {"permute", "transpose", "to", "long", "int", "float", "contiguous"}


class Kind(Enum):
    ROW = "a tensor [1]"
    SCALAR = "a tensor []"
    NUMBER = "Python's"


@dataclass(frozen=True)
class HitSlices:
    """What is gone over: the numbers of those slices of `marks` that are not zeros."""

    marks: str
    reduced: int
    """Dimensions that are added up: all but the first."""
    kind: Kind
    """Of one number."""


def loop_at(function: FunctionType, body: ast.FunctionDef, line: int) -> dict[int, list[ast.stmt]] | None:
    """What stands in for the loop at the line: by the ids of statements, others; None: it is no such loop."""
    for block in blocks(body):
        for loop in block:
            if not isinstance(loop, ast.For) or loop.orelse or not spans(loop.iter, line):
                continue
            if not isinstance(loop.target, ast.Name):
                continue
            picked = _picked(body, loop)
            if picked is None:
                continue
            inside = _numbered(loop, picked)
            if inside is None:
                continue
            branch = _all_left(function, inside, picked)
            if branch is None or read_outside(body, [loop], branch.ever | {loop.target.id}):
                continue
            return {id(loop): _over_all(loop, inside, picked, branch)}
    return None


def _all_left(function: FunctionType, inside: Sequence[ast.stmt], picked: HitSlices) -> Branch | None:
    """The statements, read; None where one may do something though nothing is picked."""
    first = Branch(function, _slices(picked.marks))
    if not all(map(first.leaves, inside)):
        return None
    # What an earlier turn left would be another's, now that there are turns between.
    again = Branch(function, _slices(picked.marks), later=frozenset(first.ever))
    return again if all(map(again.leaves, inside)) and picked.marks not in again.ever else None


def _over_all(loop: ast.For, inside: list[ast.stmt], picked: HitSlices, branch: Branch) -> list[ast.stmt]:
    """The loop over all numbers, where a trace finds that things are what they are taken for; else as it was."""
    asked = [f"{picked.marks}.dim() == {picked.reduced + 1}", f"{picked.marks}.shape[0] <= {MOST_TURNS}"]
    asked += [f"isinstance({x}, _treespec_torch.Tensor)" for x in sorted(branch.tensors)]
    fits = ast.parse(" and ".join(asked), mode="eval").body
    # There may be more marks than experts: where one more was picked, the loop raised an error.
    most = [f"{picked.marks}.shape[0]", *(f"len({text})" for text in sorted(_indexed(inside, branch.ever)))]
    numbers = ast.parse(f"range(min([{', '.join(most)}]))", mode="eval").body
    whole = ast.For(ast.Name(NUMBER, ast.Store()), numbers, inside, [])
    found = [*ast.parse("import torch as _treespec_torch").body, ast.If(fits, [whole], [loop])]
    kept = {id(node) for node in ast.walk(loop)} | {id(node) for each in inside for node in ast.walk(each)}
    for statement in found:
        for node in ast.walk(statement):
            if id(node) not in kept and "lineno" in node._attributes:
                ast.copy_location(node, loop)
    return found


def _indexed(inside: Sequence[ast.stmt], own: set[str]) -> set[str]:
    """What of the module's has an entry of every number that is picked: what is read of it on every way."""
    found: set[str] = set()
    pending: list[ast.AST] = [*inside]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) or (isinstance(node, ast.IfExp) and not _is_ours(node)):
            pending.append(node.test)
            continue
        if isinstance(node, ast.BoolOp):
            pending.append(node.values[0])
            continue
        if isinstance(node, ast.Subscript) and ast.unparse(node.slice) in (NUMBER, f"{NUMBER}:{NUMBER} + 1"):
            names = _names(node.value)
            if "self" in names and not names & (own | {NUMBER}):
                found.add(ast.unparse(node.value))
        pending += ast.iter_child_nodes(node)
    return found


def _is_ours(node: ast.IfExp) -> bool:
    return "_treespec_torch" in _names(node.test)


# -- what is gone over -----------------------------------------------------------------------------------------------


def _picked(body: ast.FunctionDef, loop: ast.For) -> HitSlices | None:
    value, kind = loop.iter, Kind.ROW
    while True:
        if isinstance(value, ast.Name):
            made = _made(body, value.id)
            if made is None:
                return None
            value = made
            continue
        inner, now = _flattened(value, kind)
        if inner is None:
            break
        value, kind = inner, now
    found, kind = _nonzero(value, kind)
    summed = None if found is None else _positive(found)
    if summed is None:
        return None
    marks, reduced = summed
    return HitSlices(marks.id, reduced, kind) if _are_marks(body, loop, marks) else None


def _made(body: ast.FunctionDef, name: str) -> ast.expr | None:
    """What the name stands for, if it is given once."""
    stores = [n for n in ast.walk(body) if isinstance(n, ast.Name) and n.id == name and not isinstance(n.ctx, ast.Load)]
    given = [s.value for s in ast.walk(body) if isinstance(s, ast.Assign) and s.targets == stores]
    return given[0] if len(given) == 1 == len(stores) else None


def _flattened(value: ast.expr, kind: Kind) -> tuple[ast.expr | None, Kind]:
    """`x` of `x.flatten()`, `x.squeeze(-1)`, `x.view(-1)`, `x[:, 0]`, and of `.tolist()` of a flat one."""
    if isinstance(value, ast.Subscript) and ast.unparse(value.slice) in (":, 0", "(slice(None), 0)"):
        return value.value, Kind.SCALAR if kind is Kind.ROW else kind
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or value.keywords:
        return None, kind
    name, args = value.func.attr, [ast.unparse(a) for a in value.args]
    if name == "tolist" and not args:
        flat = _flattened(value.func.value, kind)[0] is not None or _nonzero(value.func.value, kind)[1] is Kind.SCALAR
        return (value.func.value, Kind.NUMBER) if flat else (None, kind)
    flattens = not args if name == "flatten" else name in ("view", "reshape", "squeeze") and args == ["-1"]
    if flattens or (name == "squeeze" and args == ["1"]):
        return value.func.value, Kind.SCALAR if kind is Kind.ROW else kind
    return None, kind


def _nonzero(value: ast.expr, kind: Kind) -> tuple[ast.expr | None, Kind]:
    """`x` of `x.nonzero()`, `torch.nonzero(x)`, and of `torch.where(x)[0]`, whose rows are numbers."""
    entry = isinstance(value, ast.Subscript) and is_zero(value.slice)
    call = value.value if isinstance(value, ast.Subscript) and entry else value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return None, kind
    of_torch, finds = ast.unparse(call.func.value) == "torch", call.func.attr
    given = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if len(call.args) != of_torch or not given.keys() <= {"as_tuple"}:
        return None, kind
    tuples = (finds == "where" and of_torch and not given) or (finds == "nonzero" and given == {"as_tuple": "True"})
    if tuples is not entry or (not tuples and (finds != "nonzero" or given.get("as_tuple") == "True")):
        return None, kind
    found = call.args[0] if of_torch else call.func.value
    return found, Kind.SCALAR if entry and kind is Kind.ROW else kind


def _positive(value: ast.expr) -> tuple[ast.Name, int] | None:
    """`m` of `m.sum(dim=(-1, -2)) > 0`, `torch.greater(m.sum((1, 2)), 0)`, and how many dimensions are added up."""
    inner: ast.expr | None = None
    if isinstance(value, ast.Compare) and len(value.ops) == 1:
        inner = value.left if isinstance(value.ops[0], ast.Gt) and is_zero(value.comparators[0]) else None
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and not value.keywords:
        of_torch = ast.unparse(value.func.value) == "torch"
        if of_torch and value.func.attr in ("greater", "gt") and len(value.args) == 2 and is_zero(value.args[1]):
            inner = value.args[0]
        elif not of_torch and value.func.attr in ("greater", "gt") and len(value.args) == 1 and is_zero(value.args[0]):
            inner = value.func.value
    if not isinstance(inner, ast.Call) or not isinstance(inner.func, ast.Attribute) or inner.func.attr != "sum":
        return None
    marks, given = inner.func.value, [*inner.args, *(k.value for k in inner.keywords if k.arg == "dim")]
    if not isinstance(marks, ast.Name) or len(given) != 1 or len(inner.args) + len(inner.keywords) != 1:
        return None
    try:
        dims = ast.literal_eval(given[0])
    except ValueError:
        return None
    dims = (dims,) if isinstance(dims, int) else tuple(dims) if isinstance(dims, (tuple, list)) else ()
    whole = {d % (len(dims) + 1) for d in dims if type(d) is int} == {*range(1, len(dims) + 1)}
    return (marks, len(dims)) if dims and whole else None


def _are_marks(body: ast.FunctionDef, loop: ast.For, summed: ast.Name) -> bool:
    """Whether what is added up is made by `one_hot` and steps that keep what is not negative so, and is the same when
    the loop reads it: besides that, nothing names it.
    """
    named = [n for n in ast.walk(body) if isinstance(n, ast.Name) and n.id == summed.id]
    stores = [n for n in named if not isinstance(n.ctx, ast.Load)]
    given = [s for s in ast.walk(body) if isinstance(s, ast.Assign) and len(s.targets) == 1 and s.targets[0] in stores]
    if not given or len(given) != len(stores) or any(s.lineno >= summed.lineno for s in given):
        return False
    within = {id(n) for each in (*loop.body, *given) for n in ast.walk(each)} | {id(summed)}
    return all(id(n) in within for n in named) and all(_is_mark(s.value, summed.id) for s in given)


def _is_mark(value: ast.expr, name: str) -> bool:
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _KEEPS_SIGN:
        value = value.func.value
    if isinstance(value, ast.Name):
        return value.id == name
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "one_hot"


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


# -- the loop, by numbers --------------------------------------------------------------------------------------------


def _numbered(loop: ast.For, picked: HitSlices) -> list[ast.stmt] | None:
    """A copy of what is in the loop with Python's own number in its variable's place; None where that means another
    thing.
    """
    assert isinstance(loop.target, ast.Name)
    inside = [copy.deepcopy(each) for each in loop.body]
    name, kind = loop.target.id, picked.kind
    again = _again(inside[0], name, kind)  # `expert = expert[0]`
    if again is not None:
        other, kind = again
        inside = inside[1:]
        if name != other and any(name in _names(each) for each in inside):
            return None
        name = other
    by_number = _ByNumber(name, kind, picked.marks)
    inside = [by_number.visit(each) for each in inside]
    if any(name in _names(each) for each in inside):
        return None
    return [*_without_skips(inside, picked.marks)]


def _again(statement: ast.stmt, name: str, kind: Kind) -> tuple[str, Kind] | None:
    """The name that the number gets, and what it is then."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, value = statement.targets[0], ast.unparse(statement.value)
    if not isinstance(target, ast.Name):
        return None
    if value in (f"{name}.item()", f"int({name}.item())", f"int({name})"):
        return target.id, Kind.NUMBER
    return (target.id, Kind.SCALAR) if kind is Kind.ROW and value in (f"{name}[0]", f"{name}.squeeze()") else None


def _without_skips(inside: Sequence[ast.stmt], marks: str) -> Iterator[ast.stmt]:
    """`if not rows.numel(): continue` leaves out what does nothing then, if the rows are all that are marked."""
    rows: set[str] = set()
    for each in inside:
        for made in each.body if isinstance(each, ast.With) else [each]:
            if isinstance(made, ast.Assign) and len(made.targets) == 1:
                mask = (found_in(made.value) or "").removesuffix(".squeeze(0)")
                rows -= _names(made.targets[0])
                rows |= _names(made.targets[0]) if mask in _slices(marks) else set()
        asks = ast.unparse(each.test) if isinstance(each, ast.If) and not each.orelse else ""
        skips = isinstance(each, ast.If) and len(each.body) == 1 and isinstance(each.body[0], ast.Continue)
        if not (skips and any(asks in (f"{r}.numel() == 0", f"len({r}) == 0", f"not len({r})") for r in rows)):
            yield each


def _slices(marks: str) -> set[str]:
    return {f"{marks}[{NUMBER}]", f"{marks}[{NUMBER}:{NUMBER} + 1]"}


class _ByNumber(ast.NodeTransformer):
    """Puts the number where the loop's variable stands. A use in which it is not the same is left."""

    def __init__(self, name: str, kind: Kind, marks: str) -> None:
        self.name, self.kind, self.marks = name, kind, marks

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if self.kind is Kind.ROW and ast.unparse(node) == f"{self.name}[0]":
            return ast.Name(NUMBER, ast.Load())
        if not isinstance(node.slice, ast.Name) or node.slice.id != self.name or not isinstance(node.ctx, ast.Load):
            return self.generic_visit(node)
        node.value = self.visit(node.value)
        node.slice = ast.Name(NUMBER, ast.Load())
        if self.kind is not Kind.ROW:
            return node
        text = ast.unparse(node.value)
        kept = ast.parse(f"{text}[{NUMBER}:{NUMBER} + 1]", mode="eval").body  # of a tensor, the dimension stays
        if text == self.marks:
            return kept
        test = ast.parse(f"isinstance({text}, _treespec_torch.Tensor)", mode="eval").body
        return ast.IfExp(test, kept, node)  # else an entry of a list of modules

    def visit_Call(self, node: ast.Call) -> ast.AST:
        forms = (f"{self.name}.item()", f"int({self.name}.item())", f"int({self.name})", f"{self.name}[0].item()")
        if ast.unparse(node) in forms:
            return ast.Name(NUMBER, ast.Load())
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        is_number = node.id == self.name and self.kind is Kind.NUMBER and isinstance(node.ctx, ast.Load)
        return ast.Name(NUMBER, ast.Load()) if is_number else node
