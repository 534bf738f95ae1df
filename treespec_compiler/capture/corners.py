"""Whether what code makes for n tokens is the corner of what it makes for more, whatever n is: by its syntax.

Lengths that code is not run at may be singled out by arithmetic (`if t * t % 4093 == 2026`). They cannot be where the
number of tokens is nothing but the end of a range and the size of what is made, and where each number that is made
depends on its own place alone. Loops over places write at their own place; what they leave in names, which is what
the last one left, is not read behind them. Everything else is no such code, and is run at every length (`tables`).
"""

from __future__ import annotations

import ast
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from .reached import is_library
from .regions import Stretch
from .size_names import stored


class _Kind(enum.Enum):
    FIXED = "the same for any number of tokens"
    PLACE = "a function of the places that the loops around are at"
    SPAN = "the number of tokens, or a number more or less"
    GROWS = "a number for each place, which the number of tokens only makes more of"


FIXED, PLACE, SPAN, GROWS = _Kind.FIXED, _Kind.PLACE, _Kind.SPAN, _Kind.GROWS
_NUMBERS = frozenset({FIXED, PLACE})
_VALUES = frozenset({FIXED, PLACE, GROWS})

_OF_NUMBERS = {"min", "max", "abs", "int", "float", "bool", "round"}
_MADE_BY_SIZE = {"zeros", "ones", "empty", "full", "arange"}
_BY_PLACE = {
    "abs", "sin", "cos", "tan", "exp", "log", "sqrt", "pow", "power", "neg", "where", "minimum", "maximum", "tril",
    "triu", "tensor", "as_tensor", "array", "asarray", "from_numpy", "FloatTensor", "LongTensor", "BoolTensor", "stack",
    "float", "double", "half", "bool", "long", "int", "to", "type", "astype", "clone", "copy", "contiguous", "clamp",
    "unsqueeze", "masked_fill", "logical_not", "logical_and", "logical_or", "eq", "ne", "lt", "le", "gt", "ge",
    "detach",
}  # fmt: skip


class _NotSeen(Exception):
    """The code is none of which it is known."""


def is_corner(region: Stretch, sizes: Sequence[int], scope: Mapping[str, Any]) -> bool:
    """Whether it is so for the results of a stretch; inputs number `sizes` are sizes, `scope` holds its globals."""
    known = {text: SPAN if i in sizes else FIXED for i, text in enumerate(region.inputs)}
    if region.caches:
        return False
    try:
        reader = _Reader(known, scope)
        reader.block(region.body)
        return all(reader.kind(result) is GROWS for result in region.results)
    except _NotSeen:
        return False


class _Reader:
    def __init__(self, inputs: Mapping[str, _Kind], scope: Mapping[str, Any]) -> None:
        self.inputs, self.scope = inputs, scope
        self.names: dict[str, _Kind] = {}
        self.loops: list[tuple[str, bool]] = []
        """Targets of the loops around, and whether they run as far as the text."""

    def kind(self, node: ast.expr) -> _Kind:
        """Of an expression; raises `_NotSeen`."""
        text = ast.unparse(node)
        if text in self.inputs and text not in self.names:
            return self.inputs[text]
        rule: Callable[[Any], _Kind] | None = getattr(self, f"_{type(node).__name__.lower()}", None)
        if rule is None:
            raise _NotSeen
        return rule(node)

    def _joined(self, nodes: Iterable[ast.expr], allowed: frozenset[_Kind] = _VALUES) -> _Kind:
        kinds = {self.kind(n) for n in nodes}
        if not kinds <= allowed:
            raise _NotSeen
        return GROWS if GROWS in kinds else PLACE if PLACE in kinds else FIXED

    def _constant(self, node: ast.Constant) -> _Kind:
        return FIXED

    def _name(self, node: ast.Name) -> _Kind:
        if node.id not in self.names:
            raise _NotSeen
        return self.names[node.id]

    def _attribute(self, node: ast.Attribute) -> _Kind:
        if self._library(node.value):  # math.inf, torch.bool
            return FIXED
        raise _NotSeen

    def _library(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute):
            return self._library(node.value)
        value = self.scope.get(node.id) if isinstance(node, ast.Name) and node.id not in self.names else None
        return isinstance(value, ModuleType) and is_library(value)

    def _unaryop(self, node: ast.UnaryOp) -> _Kind:
        return self._joined([node.operand])

    def _binop(self, node: ast.BinOp) -> _Kind:
        if isinstance(node.op, (ast.Add, ast.Sub)) and self.kind(node.left) is SPAN:
            if isinstance(node.right, ast.Constant):
                return SPAN
        if isinstance(node.op, ast.MatMult):
            raise _NotSeen
        return self._joined([node.left, node.right])

    def _compare(self, node: ast.Compare) -> _Kind:
        asked = any(isinstance(op, (ast.In, ast.NotIn, ast.Is, ast.IsNot)) for op in node.ops)
        return self._joined([node.left, *node.comparators], _NUMBERS if asked else _VALUES)

    def _boolop(self, node: ast.BoolOp) -> _Kind:
        return self._joined(node.values, _NUMBERS)

    def _ifexp(self, node: ast.IfExp) -> _Kind:
        self._joined([node.test], _NUMBERS)
        return self._joined([node.test, node.body, node.orelse])

    def _list(self, node: ast.List | ast.Tuple) -> _Kind:
        return self._joined(node.elts) if node.elts else GROWS

    _tuple = _list

    def _listcomp(self, node: ast.ListComp | ast.GeneratorExp) -> _Kind:
        each = node.generators[0]
        if len(node.generators) > 1 or each.ifs or each.is_async:
            raise _NotSeen
        before = dict(self.names)
        self._loop_over(each.target, each.iter)
        self._joined([node.elt])
        self.loops.pop()
        self.names = before
        return GROWS

    _generatorexp = _listcomp

    def _subscript(self, node: ast.Subscript) -> _Kind:
        held = self.kind(node.value)
        if held is not GROWS:
            return self._joined([node.value, node.slice], _NUMBERS)
        for index in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            if isinstance(index, ast.Slice):
                bounds = [index.lower, index.step, index.upper]
                if index.upper is not None or not all(b is None or _counts(b) for b in bounds):
                    raise _NotSeen  # what is read from the end is of the last place
            elif not (_counts(index) or self._is_place(index)):
                raise _NotSeen
        return GROWS

    def _is_place(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and any(node.id == target for target, _ in self.loops)

    def _call(self, node: ast.Call) -> _Kind:
        given = [*node.args, *(k.value for k in node.keywords)]
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise _NotSeen
        if isinstance(node.func, ast.Name) and node.func.id not in {*self.names, *self.scope}:
            if node.func.id in ("list", "tuple") and len(given) == 1 and self._is_range(given[0]):
                self._span_of(given[0])
                return GROWS
            if node.func.id in _OF_NUMBERS:
                return self._joined(given, _NUMBERS)
        if not isinstance(node.func, ast.Attribute):
            raise _NotSeen
        name = node.func.attr
        if self._library(node.func.value):
            if name in _MADE_BY_SIZE:
                return self._made_by_size(name, node.args, [k.value for k in node.keywords])
            return self._joined(given, _VALUES if name in _BY_PLACE else _NUMBERS)
        if name not in _BY_PLACE or self.kind(node.func.value) is not GROWS:
            raise _NotSeen
        self._joined(given)
        return GROWS

    def _made_by_size(self, name: str, given: list[ast.expr], others: list[ast.expr]) -> _Kind:
        """`zeros(t, t)`, `full((t, t), 0.)`, `arange(t)`, `arange(1, t)`."""
        self._joined(others, _NUMBERS)
        if name == "full":
            given, fill = given[:1], given[1:]
            self._joined(fill, _NUMBERS)
        if name == "arange":
            self._joined(given[:-1], _NUMBERS)
            if len(given) > 2:
                raise _NotSeen
        for size in given:
            for one in size.elts if isinstance(size, (ast.Tuple, ast.List)) else [size]:
                if self.kind(one) is GROWS:
                    raise _NotSeen
        return GROWS

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            rule: Callable[[Any], None] | None = getattr(self, f"_run_{type(statement).__name__.lower()}", None)
            if rule is None:
                raise _NotSeen
            rule(statement)

    def _run_assign(self, node: ast.Assign) -> None:
        if len(node.targets) != 1:
            raise _NotSeen
        self._store(node.targets[0], node.value)

    def _run_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._store(node.target, node.value)

    def _store(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            kind = self.kind(value)
            if self.loops and GROWS in (kind, self.names.get(target.id)):
                raise _NotSeen  # what the loop went through adds up in it
            self.names[target.id] = kind
            return
        if not isinstance(target, ast.Subscript) or self.kind(target.value) is not GROWS:
            raise _NotSeen
        self._joined([value])
        index = target.slice.elts if isinstance(target.slice, ast.Tuple) else [target.slice]
        own = {i.id for i in index if isinstance(i, ast.Name)}
        if any(far and name not in own for name, far in self.loops):
            raise _NotSeen  # the last place that writes there would be seen
        for bound in (b for i in index for b in ((i.lower, i.upper, i.step) if isinstance(i, ast.Slice) else (i,))):
            if bound is not None:
                self._joined([bound], _NUMBERS)

    def _run_expr(self, node: ast.Expr) -> None:
        call = node.value
        if isinstance(call, ast.Constant):
            return
        appended = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "append"
        if not appended or not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            raise _NotSeen
        if self.kind(call.func.value) is not GROWS or len(call.args) != 1 or call.keywords:
            raise _NotSeen
        self._joined(call.args)

    def _run_if(self, node: ast.If) -> None:
        self._joined([node.test], _NUMBERS)
        self.block(node.body)
        self.block(node.orelse)

    def _run_pass(self, node: ast.Pass) -> None:
        return

    def _run_for(self, node: ast.For) -> None:
        if node.orelse:
            raise _NotSeen
        before = dict(self.names)
        self._loop_over(node.target, node.iter)
        self.block(node.body)
        self.loops.pop()
        self.names = {n: k for n, k in before.items() if n not in stored(node)}

    def _loop_over(self, target: ast.expr, over: ast.expr) -> None:
        if not isinstance(target, ast.Name) or target.id in self.names or not self._is_range(over):
            raise _NotSeen
        self.loops.append((target.id, self._span_of(over)))
        self.names[target.id] = PLACE

    def _is_range(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            return False
        return node.func.id == "range" and "range" not in {*self.names, *self.scope}

    def _span_of(self, over: Any) -> bool:
        """Whether a range goes as far as the text; it counts up from a number that is written there."""
        *first, last = over.args
        if len(first) > 1 or not all(map(_counts, first)) or over.keywords:
            raise _NotSeen
        kind = self.kind(last)
        if kind is GROWS:
            raise _NotSeen
        return kind is SPAN


def _counts(node: ast.expr) -> bool:
    """A number from 0 on that is written there, None or `...`."""
    return isinstance(node, ast.Constant) and (
        node.value is None or node.value is ... or (type(node.value) is int and node.value >= 0)
    )
