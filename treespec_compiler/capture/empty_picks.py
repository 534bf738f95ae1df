"""Branches that are left out where nothing is picked: `if mask.any(): out[mask] = f(x[mask])`, `if not len(rows): ...`.

A trace cannot decide them, and need not: where the mask is false everywhere, or the list of rows is empty, each
statement of such a branch leaves everything as it is, so it may be run in any case. Here the syntax of the branch shows
that: what it stores goes to rows that the mask picks, or to names that nothing else reads, and what it calls is given
nothing but picked rows, which are copies.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch.nn import functional

# Where a mask is false everywhere so is what these make of it; where there are no rows, none are left.
_KEEPS = {
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "expand_as", "bool", "nonzero", "any", "transpose",
    "t", "contiguous", "clone", "repeat",
}  # fmt: skip
_FINDS = {"where", "nonzero", "argwhere"}
_INTO = {"index_add_", "index_copy_", "index_fill_", "index_put_", "masked_fill_", "masked_scatter_"}
_PURE = _KEEPS | {
    "add", "chunk", "dim", "float", "long", "masked_fill", "matmul", "mul", "numel", "relu", "sigmoid", "size",
    "softmax", "split", "sum", "tanh", "to", "type_as",
}  # fmt: skip
_VIEWS = {"align_tensors", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "broadcast_to", "meshgrid"}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.Pass, ast.If, ast.With)


@dataclass(frozen=True)
class AskedFor:
    """What a branch asks for."""

    text: str
    mask: bool
    """Whether it is a mask, which must be of booleans, rather than rows."""


def branch_at(function: FunctionType, body: ast.FunctionDef, line: int) -> dict[int, list[ast.stmt]] | None:
    """What stands in for the branch at the line: by the ids of statements, others; None: it is no such branch."""
    for block in blocks(body):
        for at, statement in enumerate(block):
            if not isinstance(statement, ast.If) or statement.orelse or not spans(statement.test, line):
                continue
            skips = len(statement.body) == 1 and isinstance(statement.body[0], ast.Continue)
            picked = _picks(statement.test, nothing=skips)
            if picked is None:
                continue
            inside = block[at + 1 :] if skips else statement.body
            others, mask = _made_with(block[:at], picked.text)
            first = Branch(function, {picked.text} | others)
            if not all(map(first.leaves, inside)) or read_outside(body, [statement, *inside], first.ever):
                continue
            again = Branch(function, {picked.text} | others, later=frozenset(first.ever))
            if not all(map(again.leaves, inside)):
                continue
            masks = ([picked.text] if picked.mask else []) + ([mask] if mask else [])
            return located(_taken(statement, inside, skips, masks, again), statement)
    return None


def _taken(
    statement: ast.If, inside: Sequence[ast.stmt], skips: bool, masks: Sequence[str], branch: Branch
) -> dict[int, list[ast.stmt]]:
    """The branch taken, where a trace finds that things are what they are taken for; else as it was."""
    asked = [f"({m}).dtype == _treespec_torch.bool" for m in masks]
    asked += [f"isinstance({x}, _treespec_torch.Tensor)" for x in sorted(branch.tensors)]
    fits = ast.parse(" and ".join(asked) or "True", mode="eval").body
    kinds = [(f"_treespec_kind_{i}", f"({name}.dtype, {name}.shape)") for i, name in enumerate(sorted(branch.kept))]
    first = ast.parse("\n".join(["import torch as _treespec_torch", *(f"{k} = {now}" for k, now in kinds)])).body
    stops = ast.If(statement.test, [ast.Pass()], [])
    last: list[ast.stmt] = [ast.If(ast.parse(f"{k} != {now}", mode="eval").body, [stops], []) for k, now in kinds]
    if not skips:
        return {id(statement): [*first, ast.If(fits, [*statement.body, *last], [statement])]}
    found = {id(statement): [*first, ast.If(ast.UnaryOp(ast.Not(), fits), [statement], [])]}
    return found | ({id(inside[-1]): [inside[-1], *last]} if last and inside else {})


def located(found: dict[int, list[ast.stmt]], at: ast.stmt) -> dict[int, list[ast.stmt]]:
    """New statements at the line of the branch."""
    for statements in found.values():
        for statement in statements:
            for node in ast.walk(statement):
                if "lineno" in node._attributes and getattr(node, "lineno", 0) < at.lineno:
                    ast.copy_location(node, at)
    return found


def _picks(test: ast.expr, nothing: bool) -> AskedFor | None:
    """What the test asks for: `m` of `m.any()`; `nothing`: of `not m.any()`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _called(test.operand, "all")
        if inner is not None and not nothing:
            return AskedFor(f"~{inner}", True)
        return _picks(test.operand, not nothing)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.comparators[0], ast.Constant):
        bound, op = test.comparators[0].value, test.ops[0]
        some = (isinstance(op, (ast.Gt, ast.NotEq)) and bound == 0) or (isinstance(op, ast.GtE) and bound == 1)
        none = isinstance(op, (ast.Eq, ast.LtE)) and bound == 0
        return _counted(test.left) if type(bound) is int and (none if nothing else some) else None
    if nothing:
        return None
    asked = _called(test, "any")
    return _counted(test) if asked is None else AskedFor(asked, True)


def _called(test: ast.expr, name: str) -> str | None:
    """`m` of `m.any()`, `torch.any(m)`, `bool(m.any())`, `m.any().item()`."""
    if not isinstance(test, ast.Call) or test.keywords:
        return None
    if isinstance(test.func, ast.Name) and test.func.id == "bool" and len(test.args) == 1:
        return _called(test.args[0], name)
    if not isinstance(test.func, ast.Attribute):
        return None
    owner = test.func.value
    if test.func.attr == "item" and not test.args:
        return _called(owner, name)
    if test.func.attr != name:
        return None
    if isinstance(owner, ast.Name) and owner.id == "torch":
        return ast.unparse(test.args[0]) if len(test.args) == 1 else None
    return None if test.args else ast.unparse(owner)


def _counted(value: ast.expr) -> AskedFor | None:
    """`m` of `m.sum()`, `m.numel()`, `m.shape[0]`, `m.size(0)`, `len(m)`, `m.sum().item()`."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and len(value.args) == 1:
        return AskedFor(ast.unparse(value.args[0]), False) if value.func.id == "len" else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and not value.keywords:
        owner = ast.unparse(value.func.value)
        if value.func.attr == "size" and len(value.args) == 1 and is_zero(value.args[0]):
            return AskedFor(owner, False)
        if value.args or value.func.attr not in ("item", "numel", "sum"):
            return None
        return _counted(value.func.value) if value.func.attr == "item" else AskedFor(owner, value.func.attr == "sum")
    if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Attribute) and value.value.attr == "shape":
        return AskedFor(ast.unparse(value.value.value), False) if is_zero(value.slice) else None
    return None


def is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value == 0


def _made_with(before: Sequence[ast.stmt], picked: str) -> tuple[set[str], str | None]:
    """What else picks nothing then: the other rows of the same `torch.where`, and the mask that they come from."""
    between: list[ast.stmt] = []
    for statement in reversed(before):
        if picked in _stored([statement]):
            break
        between.append(statement)
    else:
        return set(), None
    names = _names_of_target(statement.targets[0]) if isinstance(statement, ast.Assign) else None
    mask = found_in(statement.value) if isinstance(statement, ast.Assign) else None
    if names is None or mask is None or len(statement.targets) != 1 or _names(mask) & _stored([statement]):  # type: ignore[attr-defined]
        return set(), None
    mentioned = {n.id for s in between for n in ast.walk(s) if isinstance(n, ast.Name)}
    return (set(), None) if mentioned & (_names(mask) | {*names}) else ({*names, mask}, mask)


def found_in(value: ast.expr) -> str | None:
    """`m` of `torch.where(m)`, `torch.where(m)[0]`, `m.nonzero(as_tuple=True)`."""
    if isinstance(value, ast.Subscript):
        return found_in(value.value)
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return None
    owner = value.func.value
    if isinstance(owner, ast.Name) and owner.id == "torch":
        return ast.unparse(value.args[0]) if value.func.attr in _FINDS and len(value.args) == 1 else None
    return ast.unparse(owner) if value.func.attr == "nonzero" and not value.args else None


@dataclass
class Branch:
    """Statements that run where something is picked, read in order."""

    function: FunctionType
    empty: set[str]
    """Expressions that are false everywhere, or without rows, where nothing is picked."""
    later: frozenset[str] = frozenset()
    """Names that it stores for itself, sooner or later."""
    own: set[str] = field(default_factory=set)
    """Those that it has stored by now, whichever way it went."""
    ever: set[str] = field(default_factory=set)
    """Those that it stores some way or other."""
    copies: set[str] = field(default_factory=set)
    """Those of them that are made of picked rows."""
    weights: set[str] = field(default_factory=set)
    """Names of the module's tensors, and of parts of them."""
    tensors: set[str] = field(default_factory=set)
    """What must be a tensor: its picked rows are written, or what is called is taken for a tensor's."""
    kept: set[str] = field(default_factory=set)
    """Names that are stored again as what they are."""

    def leaves(self, statement: ast.stmt) -> bool:
        """Whether the statement leaves everything but names of the branch's own as it was, if nothing is picked."""
        if not isinstance(statement, _STATEMENTS):
            return False
        if isinstance(statement, ast.Pass):
            return True
        if isinstance(statement, ast.With):
            gradless = all(self._is_gradless(item) for item in statement.items)
            return gradless and all(map(self.leaves, statement.body))
        if isinstance(statement, ast.If):
            return self._harmless(statement.test) and self._leaves_either_way(statement)
        if isinstance(statement, ast.Expr):
            return self._writes(statement.value)
        if statement.value is None or not self._harmless(statement.value):
            return False
        targets = [statement.target] if isinstance(statement, ast.AugAssign) else statement.targets
        return len(targets) == 1 and self._stores(targets[0], statement)

    def _is_gradless(self, item: ast.withitem) -> bool:
        called = item.context_expr
        if not isinstance(called, ast.Call) or not isinstance(called.func, ast.Attribute) or item.optional_vars:
            return False
        return called.func.attr == "no_grad" and self._of_torch(called) and not called.args

    def _leaves_either_way(self, statement: ast.If) -> bool:
        before = [set(known) for known in (self.empty, self.own, self.copies, self.weights)]
        if not all(map(self.leaves, statement.body)):
            return False
        there = (self.empty, self.own, self.copies, self.weights)
        self.empty, self.own, self.copies, self.weights = before
        if not all(map(self.leaves, statement.orelse)):
            return False
        for here, other in zip((self.empty, self.own, self.copies, self.weights), there, strict=True):
            here &= other
        return True

    def _stores(self, target: ast.expr, statement: ast.Assign | ast.AugAssign) -> bool:
        if isinstance(target, ast.Subscript):
            if not isinstance(target.value, ast.Name) or not self._none(target.slice):
                return False
            self.tensors.add(target.value.id)
            return self._harmless(target.slice)
        names = _names_of_target(target)
        if names is None:
            return False
        if isinstance(statement, ast.AugAssign):
            return {*names} <= self.own & self.copies
        if len(names) == 1 and names[0] not in self.own and self._same(names[0], statement.value):
            self.kept.add(names[0])
            return True
        none, copy = self._none(statement.value), self._is_copy(statement.value)
        for name in names:
            self.empty = {e for e in self.empty if name not in _names(e)}
            self.copies.discard(name)
        self.weights.difference_update(names)
        if len(names) == 1 and self._is_weight(statement.value):
            self.weights.add(names[0])
        self.own |= {*names}
        self.ever |= {*names}
        self.empty |= {*names} if none else set()
        self.copies |= {*names} if copy else set()
        return True

    def _same(self, name: str, value: ast.expr) -> bool:
        """`x = x.masked_fill(m, v)`, `x = torch.where(m, a, x)`: x itself where m is false everywhere."""
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or value.keywords:
            return False
        owner, args = ast.unparse(value.func.value), value.args
        if value.func.attr == "masked_fill":
            return owner == name and len(args) == 2 and self._none(args[0])
        found = value.func.attr == "where" and owner == "torch" and len(args) == 3 and self._none(args[0])
        return found and ast.unparse(args[2]) == name

    def _none(self, value: ast.expr) -> bool:
        """Whether it picks nothing where the branch would not be run."""
        if ast.unparse(value) in self.empty:
            return True
        if isinstance(value, ast.Tuple):
            return any(self._none(e) for e in value.elts)
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitAnd):
            return self._none(value.left) or self._none(value.right)
        if isinstance(value, ast.Subscript):  # an entry of a tuple of rows; another dimension; a part
            part = isinstance(value.value, ast.Call) or (isinstance(value.slice, ast.Tuple) and _sliced(value.slice))
            return part and self._none(value.value)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            owner = value.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch":
                return value.func.attr in _FINDS and len(value.args) == 1 and self._none(value.args[0])
            return value.func.attr in _KEEPS and self._none(owner)
        return False

    def _is_copy(self, value: ast.expr) -> bool:
        """Whether it is made of picked rows, so that nothing else sees what is done to it."""
        if isinstance(value, ast.Subscript) and self._none(value.slice):
            return True
        if isinstance(value, ast.Name):
            return value.id in self.copies
        if isinstance(value, ast.Call):
            if isinstance(value.func, ast.Attribute) and self._is_copy(value.func.value):
                return True
            if not value.args or not self._is_copy(value.args[0]):
                return False
            method = isinstance(value.func, ast.Attribute) and value.func.attr in _PURE and not self._of_torch(value)
            return not method and not (isinstance(value.func, ast.Attribute) and value.func.attr in _VIEWS)
        if isinstance(value, ast.BinOp):
            return self._is_copy(value.left) or self._is_copy(value.right)
        return isinstance(value, ast.Subscript) and self._is_copy(value.value)

    def _writes(self, value: ast.expr) -> bool:
        """`out.index_add_(0, rows, y)`: nothing is written where there are no rows."""
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            return False
        if value.func.attr not in _INTO or not isinstance(value.func.value, ast.Name):
            return False
        given = [*value.args, *(k.value for k in value.keywords)]
        whole = value.func.attr in ("index_put_", "masked_fill_", "masked_scatter_")
        where = value.args[:1] if whole else value.args[1:2]
        self.tensors.add(value.func.value.id)
        return bool(where) and self._none(where[0]) and all(map(self._harmless, given))

    def _harmless(self, value: ast.expr) -> bool:
        """Whether making it changes nothing: what is called is torch's, or is given picked rows alone."""
        for node in ast.walk(value):
            if isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Lambda, ast.Starred)):
                return False
            if isinstance(node, _COMPREHENSIONS):
                return False
            if isinstance(node, ast.Name) and node.id in self.later - self.own:
                return False  # what an earlier branch left
            if isinstance(node, ast.Call) and not self._calls(node):
                return False
        return True

    def _of_torch(self, call: ast.Call) -> bool:
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        return owner is not None and module_of(self.function, owner) in (torch, functional)

    def _calls(self, call: ast.Call) -> bool:
        called = call.func
        if isinstance(called, ast.Name) and called.id == "isinstance" and "isinstance" not in self.function.__globals__:
            return True
        if isinstance(called, ast.Attribute):
            if called.attr.endswith("_"):
                return False
            if self._of_torch(call):
                told = any(isinstance(a, ast.Constant) and a.value is True for a in call.args)
                return not told and not any(k.arg in ("out", "inplace") for k in call.keywords)
            if called.attr in _PURE and (not _of_self(called.value) or self._is_weight(called.value)):
                return True
            if called.attr in _FINDS and self._none(called.value):
                return True
        given = [*call.args, *(k.value for k in call.keywords)]
        copied = [g for g in given if not isinstance(g, ast.Constant) and not self._is_weight(g)]
        return bool(given) and all(map(self._is_copy, copied))

    def _is_weight(self, value: ast.expr) -> bool:
        """Whether it is a tensor of the module's, or a part of one: a trace that changes it is refused."""
        if isinstance(value, ast.Name):
            return value.id in self.weights
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _PURE:
            return self._is_weight(value.func.value)
        if isinstance(value, ast.Subscript):
            return self._is_weight(value.value)
        inner = value
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        if inner is value or not isinstance(inner, ast.Name) or inner.id != "self":
            return False
        self.tensors.add(ast.unparse(value))
        return True


def module_of(function: FunctionType, node: ast.expr) -> object:
    """The module that a name such as `torch`, `F` or `nn.functional` stands for."""
    if isinstance(node, ast.Name):
        return function.__globals__.get(node.id)
    return getattr(module_of(function, node.value), node.attr, None) if isinstance(node, ast.Attribute) else None


def _of_self(node: ast.expr) -> bool:
    """Whether it is the module, or something of its."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def _sliced(index: ast.Tuple) -> bool:
    """Whether an index leaves dimensions or adds some."""
    marks = (isinstance(e, ast.Slice) or (isinstance(e, ast.Constant) and e.value in (None, ...)) for e in index.elts)
    return any(marks)


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for each in ast.walk(node):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(each, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def spans(node: ast.expr, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _names_of_target(target: ast.expr) -> list[str] | None:
    if isinstance(target, ast.Name):
        return [target.id]
    if isinstance(target, ast.Tuple) and all(isinstance(e, ast.Name) for e in target.elts):
        return [e.id for e in target.elts if isinstance(e, ast.Name)]
    return None


def _stored(statements: Sequence[ast.stmt]) -> set[str]:
    nodes = (n for s in statements for n in ast.walk(s))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _names(text: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name)}


def read_outside(body: ast.FunctionDef, inside: Sequence[ast.stmt], names: set[str]) -> bool:
    """Whether something else reads what the branch stores for itself."""
    within = {id(n) for s in inside for n in ast.walk(s)}
    others = (n for n in ast.walk(body) if id(n) not in within)
    return any(isinstance(n, ast.Name) and n.id in names and isinstance(n.ctx, ast.Load) for n in others)
