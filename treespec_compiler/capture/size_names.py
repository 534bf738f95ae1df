"""Which names of a function hold sizes, constants and what is made of them alone, and which hold tensors of the text.

That it is so is looked at again when the code runs (`tables`).
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
class SizeNames:
    """What the names of a function are."""

    body: ast.FunctionDef
    function: FunctionType
    data: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    """Names that only statements which depend on sizes store, and that are no mere sizes."""

    def __post_init__(self) -> None:
        code = self.function.__code__
        self.own = {*code.co_varnames, *code.co_cellvars}
        self.locals = {*self.own, *code.co_freevars}
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
            for name in stored(statement):
                if isinstance(statement, ast.For):
                    if name in bound(statement.target) and not self.is_static(statement.iter):
                        self.data.add(name)
                elif not static and (value is None or not is_scalar(value) or self._is_data(value)):
                    self.data.add(name)
                stores.setdefault(name, []).append(static and not (value is not None and is_scalar(value)))
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
            if is_target(node):
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
                if isinstance(node.value, ast.Name) and node.value.id not in self.own:
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
                    looped = {
                        n.id
                        for c in ast.walk(part)
                        if isinstance(c, ast.comprehension)
                        for n in ast.walk(c.target)
                        if isinstance(n, ast.Name)
                    }
                    if node.id in stored or node.id in looped or not isinstance(node.ctx, ast.Load):
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
            if id(node) not in inside and any(read.id in bound(t) for t in targets):
                if any(n is read for n in ast.walk(node)):
                    return True
        return False


def stored(node: ast.AST) -> set[str]:
    """Names that a statement binds, comprehensions aside."""
    looped = {
        n.id
        for c in ast.walk(node)
        if isinstance(c, ast.comprehension)
        for n in ast.walk(c.target)
        if isinstance(n, ast.Name)
    }
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} - looped
    imported = {
        (a.asname or a.name).split(".")[0]
        for n in ast.walk(node)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    return names | imported


def bound(target: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def is_target(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))


def is_scalar(value: ast.AST) -> bool:
    """Whether an expression can only be a number that is read off sizes: it is given as it is."""
    for node in ast.walk(value):
        if not isinstance(node, _SCALAR):
            return False
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in _SCALAR_CALLS:
                return False
    return True


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
