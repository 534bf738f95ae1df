"""What a function computes from the number of tokens alone, in Python.

A trace would run such code for one length. Here the syntax of a function is read: which statements and expressions
around a line depend on sizes, constants and each other only, what they read, and what is read of them afterwards.
That it is so is looked at again when they run (`tables`): what they are given must be numbers there, not tensors.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType

_OF_TENSORS = {
    "shape", "size", "device", "dtype", "dim", "ndim", "view", "reshape", "transpose", "permute", "unsqueeze", "to",
    "float", "mT", "T", "is_cuda", "numel", "contiguous", "chunk", "split", "new_zeros", "new_ones", "new_full",
}  # fmt: skip
_FORBIDDEN = (
    ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.Raise, ast.Global, ast.Nonlocal, ast.Delete, ast.NamedExpr,
    ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.AsyncFor, ast.AsyncWith,
)  # fmt: skip
_SCALAR = (
    ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Name, ast.Attribute, ast.Subscript, ast.Load,
    ast.Store, ast.Call, ast.Tuple,
)  # fmt: skip
_SCALAR_CALLS = {"size", "len", "int", "min", "max", "dim", "numel", "float", "abs", "getattr"}
_OF_CACHES = {"get", "setdefault"}
_READS = {"device", "dtype", "is_cuda"}


@dataclass
class Stretch:
    """Statements that depend on sizes alone, what they read and what is read of them."""

    at: ast.stmt
    """The statement that a table stands in for."""
    body: list[ast.stmt]
    results: list[ast.expr]
    """Plain names, or expressions each of which a name stands in for."""
    inputs: list[str]
    """Expressions of the function around: numbers, strings, and the like."""
    caches: list[str]
    """Those of the inputs that are containers kept by length."""


def regions_at(body: ast.FunctionDef, line: int, function: FunctionType) -> Iterator[Stretch]:
    """Stretches that hold the line, larger ones first."""
    reader = _Reader(body, function)
    for block, at in _statements_at(body, line):
        if reader.is_static(at) and not isinstance(at, (ast.Import, ast.ImportFrom)):
            found = _whole(reader, block, at)
        elif isinstance(at, (ast.Return, ast.Assign, ast.Expr, ast.AugAssign, ast.AnnAssign)):
            found = _within(reader, block, at, line)
        else:
            continue
        if found is not None:
            yield found


def _statements_at(body: ast.FunctionDef, line: int) -> Iterator[tuple[list[ast.stmt], ast.stmt]]:
    """Statements that span the line with the blocks that they are in, outer ones first."""
    pending: list[ast.AST] = [body]
    while pending:
        for block in _blocks(pending.pop()):
            for statement in block:
                if statement.lineno <= line <= (statement.end_lineno or statement.lineno):
                    if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                        yield block, statement
                        pending.append(statement)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block
    for handler in getattr(node, "handlers", ()):
        yield handler.body


def _whole(reader: _Reader, block: list[ast.stmt], at: ast.stmt) -> Stretch | None:
    """The statement, what makes the things that it fills, and what is made of them right afterwards."""
    place = block.index(at)
    before = _needed(reader, block[:place], [at])
    if before is None:
        return None
    own = [*before, at]
    for later in block[place + 1 :]:
        names = _names_of(reader, own)
        if not _mentions(later) & names:
            continue
        if isinstance(later, ast.Return) or not reader.is_static(later):
            break
        own.append(later)
    return _region(reader, at, own, block)


def _within(reader: _Reader, block: list[ast.stmt], at: ast.stmt, line: int) -> Stretch | None:
    """The parts of one statement that depend on sizes alone."""
    parts = [p for p in _largest(reader, at) if not isinstance(p, (ast.Name, ast.Constant)) and _makes(p)]
    if not any(p.lineno <= line <= (p.end_lineno or p.lineno) for p in parts):
        return None
    before = _needed(reader, block[: block.index(at)], parts)
    return None if before is None else _region(reader, at, before, block, parts)


def _makes(part: ast.expr) -> bool:
    """Whether the expression makes something, rather than read a size."""
    return any(isinstance(n, (ast.Call, ast.ListComp, ast.GeneratorExp)) for n in ast.walk(part)) and not _is_scalar(
        part
    )


def _needed(reader: _Reader, before: Sequence[ast.stmt], of: Sequence[ast.AST]) -> list[ast.stmt] | None:
    """Those statements that make what `of` reads; None where others have to do with it too."""
    targets = {n for s in of if isinstance(s, ast.For) for n in _bound(s.target)}
    own = set().union(*(_stored(n) for n in of)) - targets
    wanted = (set().union(*(_mentions(n) for n in of)) & reader.made) | own
    found: list[ast.stmt] = []
    for statement in reversed(before):
        if not _mentions(statement) & wanted:
            continue
        if not reader.is_static(statement):
            return None
        if _is_scalar(getattr(statement, "value", None) or statement) and not _stored(statement) & (wanted & own):
            continue  # a size, which is given
        found.insert(0, statement)
        wanted |= _mentions(statement) & reader.made
    return found


def _region(
    reader: _Reader,
    at: ast.stmt,
    own: list[ast.stmt],
    block: list[ast.stmt],
    parts: Sequence[ast.expr] = (),
) -> Stretch | None:
    inside = {id(n) for s in own for n in ast.walk(s)}
    names = _names_of(reader, own)
    places = [n for n in ast.walk(reader.body) if id(n) not in inside and _text(n) in names and not _is_target(n)]
    if any(getattr(n, "lineno", 0) < own[0].lineno for n in places) if own else False:
        return None  # something else had to do with it before
    read = [n for n in places if isinstance(getattr(n, "ctx", None), ast.Load) and not reader.set_again(n, at, own)]
    results: list[ast.expr] = list(parts)
    if not parts:
        static = [p for s in reader.after(at) if s not in own for p in _largest(reader, s)]
        holding = [p for p in static if {id(n) for n in ast.walk(p)} & {id(n) for n in read}]
        covered = {id(n) for p in holding for n in ast.walk(p)}
        if all(id(n) in covered for n in read) and any(not isinstance(p, ast.Name) for p in holding):
            results = holding
        else:
            results = [ast.Name(t, ast.Load()) for t in dict.fromkeys(_text(n) for n in read)]
            if any("." in r.id for r in results if isinstance(r, ast.Name)):
                return None
    elif any(id(n) not in {id(m) for p in parts for m in ast.walk(p)} for n in read):
        return None
    if not results:
        return None
    inputs, caches = reader.inputs([*own, *(r for r in results if not isinstance(r, ast.Name))], _stored_all(own))
    changed = (
        set().union(*(_stored(s) for s in block[block.index(own[0]) :] if s not in own))
        if own and own[0] in block
        else set()
    )
    if (
        not parts
        and changed & {t.split(".")[0].split("[")[0] for t in inputs}
        and not all(isinstance(r, ast.Name) for r in results)
    ):
        return None
    return Stretch(at, own, results, inputs, caches)


def _names_of(reader: _Reader, own: Sequence[ast.stmt]) -> set[str]:
    """What the statements store: names, and containers kept by length."""
    return _stored_all(own) | {t for s in own for t in reader.caches_in(s)}


def _stored_all(own: Sequence[ast.stmt]) -> set[str]:
    return set().union(*(_stored(s) for s in own)) if own else set()


def _stored(node: ast.AST) -> set[str]:
    """Names that a statement binds, comprehensions aside."""
    bound = {
        n.id
        for c in ast.walk(node)
        if isinstance(c, ast.comprehension)
        for n in ast.walk(c.target)
        if isinstance(n, ast.Name)
    }
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} - bound
    imported = {
        (a.asname or a.name).split(".")[0]
        for n in ast.walk(node)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    return names | imported


def _bound(target: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _mentions(node: ast.AST) -> set[str]:
    return (
        {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        | _stored(node)
        | {_text(n) for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    )


def _text(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def _is_target(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))


def _is_scalar(value: ast.AST) -> bool:
    """Whether an expression can only be a number that is read off sizes: it is given as it is."""
    for node in ast.walk(value):
        if not isinstance(node, _SCALAR):
            return False
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in _SCALAR_CALLS:
                return False
    return True


def _largest(reader: _Reader, node: ast.AST) -> Iterator[ast.expr]:
    """The largest expressions in a statement that depend on sizes alone."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
        return
    if isinstance(node, ast.expr) and not isinstance(node, (ast.Starred, ast.Slice)) and not _is_target(node):
        if reader.is_static(node):
            yield node
            return
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.comprehension, ast.keyword)) or isinstance(child, ast.keyword):
            yield from _largest(reader, child)


@dataclass
class _Reader:
    """What the names of a function are."""

    body: ast.FunctionDef
    function: FunctionType
    data: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    """Names that only statements which depend on sizes store, and that are no mere sizes."""

    def __post_init__(self) -> None:
        code = self.function.__code__
        self.locals = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        parameters = {a.arg for a in (*self.body.args.posonlyargs, *self.body.args.args, *self.body.args.kwonlyargs)}
        self.self = self.body.args.args[0].arg if self.body.args.args and "self" in parameters else ""
        for node in ast.walk(self.body):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in _OF_TENSORS:
                if node.value.id in parameters - {self.self}:
                    self.data.add(node.value.id)
        for _ in range(3):  # loops may use a name before it is stored, textually
            self._follow()

    def _follow(self) -> None:
        stores: dict[str, list[bool]] = {}
        for statement in ast.walk(self.body):
            if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.With, ast.Import)):
                continue
            static = self.is_static(statement)
            value = getattr(statement, "value", None)
            for name in _stored(statement):
                if isinstance(statement, ast.For):
                    if name in _bound(statement.target) and not self.is_static(statement.iter):
                        self.data.add(name)
                elif not static and (value is None or not _is_scalar(value) or self._is_data(value)):
                    self.data.add(name)
                stores.setdefault(name, []).append(static and not (value is not None and _is_scalar(value)))
        self.made = {name for name, kinds in stores.items() if any(kinds)} - self.data

    def _is_data(self, value: ast.expr) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self.data for n in ast.walk(value)) and not isinstance(
            value, (ast.Attribute, ast.Subscript, ast.Call, ast.Tuple)
        )

    def is_static(self, node: ast.AST) -> bool:
        """Whether a statement or expression reads nothing but sizes, constants and what is made of them."""
        if isinstance(node, _FORBIDDEN):
            return False
        if isinstance(node, ast.expr) and self._is_input(node):
            return True
        if isinstance(node, ast.Name):
            return node.id not in self.data and node.id != self.self
        if isinstance(node, ast.Attribute):
            if _is_target(node):
                return False
            return self.is_static(node.value)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            kept = self._chain(node.value) is not None
            return (kept or self.is_static(node.value)) and self.is_static(node.slice)
        if isinstance(node, ast.Call) and not self._calls(node.func):
            return False
        return all(self.is_static(child) for child in ast.iter_child_nodes(node))

    def _calls(self, called: ast.expr) -> bool:
        """Whether what is called may be called: a function, or a method of what is made here."""
        if isinstance(called, ast.Attribute):
            if self._chain(called.value) is not None:
                return called.attr in _OF_CACHES
            return self.is_static(called.value)
        return (
            isinstance(called, ast.Name)
            and called.id not in self.data
            and called.id not in ("print", "input", "exec", "eval", "open", "setattr")
        )

    def _chain(self, node: ast.expr) -> str | None:
        """`self.a.b` as text; None: something else."""
        inner = node
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        plain = isinstance(inner, ast.Name) and inner.id == self.self and inner is not node and bool(self.self)
        return ast.unparse(node) if plain else None

    def _is_input(self, node: ast.expr) -> bool:
        """A size, a device or a setting that is read off something: it is given as a number or the like."""
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return False
        if self._chain(node) is not None:
            return True
        if isinstance(node, ast.Attribute) and node.attr in _READS:
            return self._is_path(node.value)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            return self._is_path(node.value.value) and _is_number(node.slice)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("size", "dim"):
            return (
                self._is_path(node.func.value)
                and len(node.args) == (node.func.attr == "size")
                and all(map(_is_number, node.args))
            )
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "len"
            and len(node.args) == 1
        ):
            return self._is_path(node.args[0]) and bool(
                {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)} & self.data
            )
        return False

    def _is_path(self, node: ast.expr) -> bool:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node, ast.Subscript) and not _is_number(node.slice):
                return False
            node = node.value
        return isinstance(node, ast.Name) and (node.id in self.data or node.id == self.self)

    def caches_in(self, statement: ast.AST) -> set[str]:
        """Containers kept by length that a statement stores into: `self.masks[t] = ...`, `MASKS[t] = ...`."""
        found: set[str] = set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                chain = self._chain(node.value)
                found |= {chain} if chain else set()
                if isinstance(node.value, ast.Name) and node.value.id not in self.locals:
                    found.add(node.value.id)
        return found

    def inputs(self, own: Sequence[ast.AST], stored: set[str]) -> tuple[list[str], list[str]]:
        """What the statements read from the function around, and the containers among it."""
        found: dict[str, None] = {}
        caches = {t: None for s in own for t in self.caches_in(s)}
        for part in own:
            for node in _outermost(part, self._is_input):
                text = ast.unparse(node)
                if isinstance(node, ast.Name):
                    bound = {
                        n.id
                        for c in ast.walk(part)
                        if isinstance(c, ast.comprehension)
                        for n in ast.walk(c.target)
                        if isinstance(n, ast.Name)
                    }
                    if node.id in stored or node.id in bound or not isinstance(node.ctx, ast.Load):
                        continue
                    if node.id not in self.locals and node.id not in caches:
                        continue
                found[text] = None
        found |= caches
        return list(found), list(caches)

    def after(self, at: ast.stmt) -> list[ast.stmt]:
        """Simple statements, and the heads of others, that come after a statement textually."""
        simple = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)
        return [s for s in ast.walk(self.body) if isinstance(s, simple) and s.lineno > (at.end_lineno or at.lineno)]

    def set_again(self, read: ast.AST, at: ast.stmt, own: Sequence[ast.stmt]) -> bool:
        """Whether a name that is read after the statement is another loop's or comprehension's by then."""
        if not isinstance(read, ast.Name):
            return False
        inside = {id(n) for s in own for n in ast.walk(s)}
        for node in ast.walk(self.body):
            targets = (
                [node.target] if isinstance(node, ast.For) else [g.target for g in getattr(node, "generators", ())]
            )
            if id(node) not in inside and any(read.id in _bound(t) for t in targets):
                if any(n is read for n in ast.walk(node)):
                    return True
        return False


def _outermost(part: ast.AST, is_input: object) -> Iterator[ast.expr]:
    """Inputs in a part, and the other names; what an input is made of is not looked into."""
    assert callable(is_input)
    if isinstance(part, ast.expr) and is_input(part):
        yield part
        return
    if isinstance(part, ast.Name):
        yield part
        return
    for child in ast.iter_child_nodes(part):
        yield from _outermost(child, is_input)


def _is_number(node: ast.expr) -> bool:
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(inner, ast.Constant) and isinstance(inner.value, int)
