"""The values of picked rows, for all rows: what a graph computes for the true elements of a mask, for every element.

A tensor with one dimension of picked rows becomes one with the dimensions of the mask in its place; a dimension that
the values do not depend on has size 1. Only ops that act on each row alone are followed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState
from ..locality.token_rules import RULES
from .picks import Coordinate, alike, as_mask, coordinate

aten = torch.ops.aten


@dataclass(frozen=True)
class Picked:
    """All rows of a value; the mask's dimensions begin at `at`, where the picked rows were."""

    node: fx.Node
    at: int


class Whole:
    """Emits the values for every element of `mask` before the node `before`."""

    def __init__(self, state: GraphState, mask: fx.Node, before: fx.Node) -> None:
        self.state, self.mask, self.before = state, mask, before
        self.more = mask.meta["val"].dim() - 1  # how many dimensions more than the picked rows'
        self._memo: dict[fx.Node, Picked | None] = {}

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.before)

    def of(self, node: Any) -> Picked | None:
        """All rows of a node, or None where it holds no picked rows or is computed in an unknown way."""
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        if node not in self._memo:
            self._memo[node] = self._computed(node)
        return self._memo[node]

    def _computed(self, node: fx.Node) -> Picked | None:
        name = op_name(node)
        if RULES.get(name) is RULES["aten.add"] and isinstance(node.meta["val"], torch.Tensor):
            return self._pointwise(node)
        rule = _ROWS.get(name) or (_ROWS["getitem"] if node.target is operator.getitem else None)
        return None if rule is None else rule(self, node)

    def operand(self, value: Any, at: int, rank: int) -> Any:
        """An operand of an element-wise op whose result [.., picked, ..] has the rows in dimension `at` of `rank`.

        A `Picked`, or the value with size-1 dimensions for the mask's; None where it does not fit.
        """
        if not isinstance(value, fx.Node) or not hasattr(value.meta["val"], "dim"):
            return value
        found = self.of(value)
        own = value.meta["val"].dim()
        if found is not None:
            return found if found.at + rank - own == at else None
        place = at - (rank - own)
        if place < 0:
            return value
        size = value.meta["val"].shape[place]
        if not isinstance(size, int) or size != 1:
            return None
        for _ in range(self.more):
            value = self.emit(aten.unsqueeze.default, value, place)
        return value

    def _pointwise(self, node: fx.Node) -> Picked | None:
        rank = node.meta["val"].dim()
        held = [(a, found) for a in node.all_input_nodes if (found := self.of(a)) is not None]
        places = {found.at + rank - a.meta["val"].dim() for a, found in held}
        if len(places) != 1:
            return None
        at = places.pop()
        args: list[Any] = []
        for value in node.args:
            if isinstance(value, (list, tuple)) and any(isinstance(v, fx.Node) for v in value):
                return None
            found = self.operand(value, at, rank)
            if found is None and value is not None:
                return None
            args.append(found.node if isinstance(found, Picked) else found)
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            return None
        return Picked(self.emit(node.target, *args, **node.kwargs), at)


def _index(whole: Whole, node: fx.Node) -> Picked | None:
    source, indices = node.args[0], list(node.args[1])
    used = [i for i, x in enumerate(indices) if x is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return None
    if len(used) == 1 and alike(as_mask(indices[used[0]]), whole.mask):
        return Picked(source, used[0])
    return _taken(whole, source, used[0], [coordinate(indices[i]) for i in used])


def _index_select(whole: Whole, node: fx.Node) -> Picked | None:
    source: Any = node.args[0]
    return _taken(whole, source, int(node.args[1]) % source.meta["val"].dim(), [coordinate(node.args[2])])


def _taken(whole: Whole, source: Any, at: int, places: list[Coordinate | None]) -> Picked | None:
    """source[.., i, j, ..] for coordinates i, j, ... of the mask: the source itself, its dimensions in their order."""
    if whole.of(source) is not None or any(p is None or not alike(p.mask, whole.mask) for p in places):
        return None
    dims = [p.dim for p in places if p is not None]
    shape, mask = source.meta["val"].shape, whole.mask.meta["val"].shape
    if len(set(dims)) != len(dims) or any(str(shape[at + i]) != str(mask[d]) for i, d in enumerate(dims)):
        return None
    order = sorted(range(len(dims)), key=dims.__getitem__)
    if order != list(range(len(dims))):
        rank = source.meta["val"].dim()
        ranks = [*range(at), *(at + i for i in order), *range(at + len(dims), rank)]
        source = whole.emit(aten.permute.default, source, ranks)
    for d in range(whole.more + 1):
        if d not in dims:
            source = whole.emit(aten.unsqueeze.default, source, at + d)
    return Picked(source, at)


def _first(whole: Whole, node: fx.Node) -> Picked | None:
    """All rows of the first operand, where no other one holds picked rows."""
    found = whole.of(node.args[0])
    others = [a for a in node.all_input_nodes if a is not node.args[0]]
    return None if found is None or any(whole.of(a) is not None for a in others) else found


def _linear(whole: Whole, node: fx.Node) -> Picked | None:
    found = _first(whole, node)
    if found is None or found.at == _rank(node.args[0]) - 1:
        return None
    return Picked(whole.emit(node.target, found.node, *node.args[1:], **node.kwargs), found.at)


def _matmul(whole: Whole, node: fx.Node) -> Picked | None:
    """Rows by a matrix."""
    found = _first(whole, node)
    if found is None or found.at == _rank(node.args[0]) - 1 or _rank(node.args[1]) != 2:
        return None
    return Picked(whole.emit(aten.matmul.default, found.node, node.args[1]), found.at)


def _addmm(whole: Whole, node: fx.Node) -> Picked | None:
    bias, rows, matrix = node.args[:3]
    found = whole.of(rows)
    if found is None or found.at != 0 or argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        return None
    if whole.of(bias) is not None or whole.of(matrix) is not None or _rank(bias) != 1:
        return None
    product = whole.emit(aten.matmul.default, found.node, matrix)
    return Picked(whole.emit(aten.add.Tensor, product, bias), 0)


def _normalised(whole: Whole, node: fx.Node) -> Picked | None:
    found = _first(whole, node)
    if found is None or found.at >= _rank(node.args[0]) - len(node.args[1]):
        return None
    return Picked(whole.emit(node.target, found.node, *node.args[1:], **node.kwargs), found.at)


def _along(name: str, *, drops: bool = False) -> Callable[[Whole, fx.Node], Picked | None]:
    """An op along dimensions other than the rows'; `drops`: they go unless it keeps them."""

    def rule(whole: Whole, node: fx.Node) -> Picked | None:
        found = _first(whole, node)
        asked = argument(node, name)
        if found is None or asked is None:
            return None
        rank = _rank(node.args[0])
        dims = [int(d) % rank for d in (asked if isinstance(asked, (list, tuple)) else [asked])]
        if found.at in dims or not dims:
            return None
        moved = [d + whole.more if d > found.at else d for d in dims]
        new = moved if isinstance(asked, (list, tuple)) else moved[0]
        known = [argument(node, a.name) if a.name != name else new for a in node.target._schema.arguments]
        places = [v for v, a in zip(known[1:], node.target._schema.arguments[1:], strict=True) if not a.kwarg_only]
        result = whole.emit(node.target, found.node, *places, **node.kwargs)
        gone = drops and not argument(node, "keepdim", False)
        return Picked(result, found.at - sum(d < found.at for d in dims) if gone else found.at)

    return rule


def _unsqueeze(whole: Whole, node: fx.Node) -> Picked | None:
    found = whole.of(node.args[0])
    if found is None:
        return None
    dim = int(node.args[1]) % _rank(node)
    at = found.at + (dim <= found.at)
    place = dim if dim <= found.at else dim + whole.more
    return Picked(whole.emit(aten.unsqueeze.default, found.node, place), at)


def _squeeze(whole: Whole, node: fx.Node) -> Picked | None:
    found = whole.of(node.args[0])
    dims = [int(d) for d in argument(node, "dim") or ()]
    if found is None or found.at in dims:
        return None
    moved = [d + whole.more if d > found.at else d for d in dims]
    return Picked(whole.emit(aten.squeeze.dims, found.node, moved), found.at - sum(d < found.at for d in dims))


def _reshape(whole: Whole, node: fx.Node) -> Picked | None:
    """Dimensions before and behind the rows are regrouped, each side on its own."""
    source: Any = node.args[0]
    found = whole.of(source)
    if found is None:
        return None
    before, after = source.meta["val"].shape, node.meta["val"].shape
    rows = str(before[found.at])
    at = next((i for i, s in enumerate(after) if str(s) == rows and not isinstance(s, int)), None)
    fixed = [*before[: found.at], *before[found.at + 1 :], *(s for i, s in enumerate(after) if i != at)]
    if at is None or any(not isinstance(s, int) for s in fixed) or _product(before[: found.at]) != _product(after[:at]):
        return None
    mask = found.node.meta["val"].shape[found.at : found.at + whole.more + 1]
    sizes = [*after[:at], *(s if isinstance(s, int) else -1 for s in mask), *after[at + 1 :]]
    return Picked(whole.emit(aten.reshape.default, found.node, sizes), at) if sizes.count(-1) < 2 else None


def _getitem(whole: Whole, node: fx.Node) -> Picked | None:
    found = whole.of(node.args[0])
    return None if found is None else Picked(whole.emit(operator.getitem, found.node, node.args[1]), found.at)


def _cat(whole: Whole, node: fx.Node) -> Picked | None:
    parts = [whole.of(p) for p in node.args[0]]
    at = parts[0].at if parts[0] is not None else None
    dim = int(node.args[1]) % _rank(node)
    if at is None or dim == at or any(p is None or p.at != at for p in parts):
        return None
    shapes = {tuple(map(str, p.node.meta["val"].shape[at : at + whole.more + 1])) for p in parts if p is not None}
    nodes = [p.node for p in parts if p is not None]
    return Picked(whole.emit(aten.cat.default, nodes, dim + whole.more * (dim > at)), at) if len(shapes) == 1 else None


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total


_ROWS: dict[str, Callable[[Whole, fx.Node], Picked | None]] = {
    "aten.index": _index,
    "aten.index_select": _index_select,
    "aten.linear": _linear,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.addmm": _addmm,
    "aten.layer_norm": _normalised,
    "aten.rms_norm": _normalised,
    "aten.softmax": _along("dim"),
    "aten.log_softmax": _along("dim"),
    "aten.glu": _along("dim"),
    "aten.slice": _along("dim"),
    "aten.split": _along("dim"),
    "aten.split_with_sizes": _along("dim"),
    "aten.chunk": _along("dim"),
    "aten.sum": _along("dim", drops=True),
    "aten.mean": _along("dim", drops=True),
    "aten.amax": _along("dim", drops=True),
    "aten.linalg_vector_norm": _along("dim", drops=True),
    "aten.select": _along("dim", drops=True),
    "aten.unsqueeze": _unsqueeze,
    "aten.squeeze": _squeeze,
    "aten.reshape": _reshape,
    "aten.flatten": _reshape,
    "aten.unflatten": _reshape,
    "aten.cat": _cat,
    "getitem": _getitem,
}
