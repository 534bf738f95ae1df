"""Values that are linear in the numbers of a head, followed through a graph.

Each number of a head is a sum of terms

    coefficient * root[..., place] * factor[..., column]        (or without a factor)

where `root` [1, A, B, D] is a node, A and B its heads and tokens in either order, and factors do not depend on the head
or on `root`. Every op that only moves numbers of a head around, negates, adds or multiplies them has an exact rule; any
other op ends the walk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.form import Shape, shape_of
from ..framework.state import GraphState

Term: TypeAlias = tuple[int, "fx.Node | None", int]  # place in the root's head; factor and its column
Combination: TypeAlias = dict[Term, float]  # coefficients
Entries: TypeAlias = "np.ndarray[Any, Any]"

LEADING = 3  # dimensions in front of a head's numbers: 1, and heads and tokens in either order


@dataclass(frozen=True)
class Head:
    """A value that is linear in the root: what each number of a head is made of, and whether A and B are exchanged."""

    entries: Entries
    swapped: bool


class Walk:
    """From one root down."""

    def __init__(self, state: GraphState, root: fx.Node) -> None:
        self.root, self.length, self.shape = root, state.length, shape_of(root)
        dim = int(self.shape[-1])
        self.found: dict[fx.Node, Head | tuple[Head, ...]] = {
            root: Head(_array([{(d, None, 0): 1.0} for d in range(dim)], (dim,)), False)
        }
        self.widths: dict[fx.Node, int] = {}
        """Columns of every factor."""

    def to(self, turned: fx.Node, way: list[fx.Node]) -> Head | None:
        for node in way:
            if node is self.root or not any(a in self.found for a in node.all_input_nodes):
                continue
            rule = RULES.get(op_name(node))
            value = rule(self, node) if rule is not None else None
            if value is None or not self._holds(node, value):
                return None  # every way from the root must be understood
            self.found[node] = value
        return self.head(turned)

    def head(self, node: Any) -> Head | None:
        found = self.found.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Head) else None

    def trailing(self, node: fx.Node, swapped: bool) -> tuple[int, ...] | None:
        """Sizes of a node behind the leading dimensions, if those are the root's."""
        shape, leading = shape_of(node), self._leading(swapped)
        if shape[:LEADING] != leading or not all(s.is_Integer for s in shape[LEADING:]):
            return None
        return tuple(int(s) for s in shape[LEADING:])

    def times(self, x: Head, factor: fx.Node) -> Head | None:
        """x * factor, if the factor is one value for each token and column, whatever the head."""
        rank, shape = LEADING + x.entries.ndim, shape_of(factor)
        shape = (_ONE,) * (rank - len(shape)) + shape
        wanted = tuple(size if size == self.length else _ONE for size in self._leading(x.swapped))
        if len(shape) > rank or shape[:LEADING] != wanted or not all(s.is_Integer for s in shape[LEADING:]):
            return None
        sizes = tuple(int(s) for s in shape[LEADING:])
        factor = self._known(_without_ones(factor))
        self.widths[factor] = int(np.prod(sizes))
        entries, places = np.broadcast_arrays(x.entries, np.arange(self.widths[factor]).reshape(sizes))
        if any(f is not None for entry in entries.flat for _, f, _ in entry):
            return None
        made = [
            {(place, factor, int(column)): c for (place, _, _), c in entry.items()}
            for entry, column in zip(entries.flat, places.flat, strict=True)
        ]
        return Head(_array(made, entries.shape), x.swapped)

    def _leading(self, swapped: bool) -> Shape:
        one, a, b = self.shape[:LEADING]
        return (one, b, a) if swapped else (one, a, b)

    def _known(self, factor: fx.Node) -> fx.Node:
        """One node for all that hold the same value."""
        return next((other for other in self.widths if same_value(other, factor)), factor)

    def _holds(self, node: fx.Node, value: Head | tuple[Head, ...]) -> bool:
        """The node has the shape that was found, and on the way nothing is rounded to fewer bits than at its ends."""
        if isinstance(value, tuple):
            return True  # its parts are seen when they are taken out
        dtype, least = node.meta["val"].dtype, self.root.meta["val"].dtype
        wide = torch.promote_types(dtype, least) == dtype
        return wide and self.trailing(node, value.swapped) == value.entries.shape


def same_value(a: Any, b: Any, known: dict[tuple[fx.Node, fx.Node], bool] | None = None) -> bool:
    """Whether two nodes are one, or the same op of the same values. `known`: pairs that were compared already."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same_value(x, y, known) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if a.op != "call_function" or a.target is not b.target or a.kwargs != b.kwargs or _writes(a):
        return False
    # NOTE: values that are read twice would be compared twice on every level.
    known = {} if known is None else known
    if (a, b) not in known:
        known[a, b] = same_value(a.args, b.args, known)
    return known[a, b]


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


_ONE = sympy.Integer(1)


def _array(entries: list[Combination], shape: tuple[int, ...]) -> Entries:
    flat = np.empty(len(entries), dtype=object)
    flat[:] = entries
    return flat.reshape(shape)


def _without_ones(factor: fx.Node) -> fx.Node:
    """The node that dimensions of size 1 were added to or dropped from."""

    def sizes(node: fx.Node) -> list[sympy.Expr]:
        return [s for s in shape_of(node) if s != 1]

    while op_name(factor) in _RESHAPES and sizes(factor) == sizes(factor.args[0]):
        factor = factor.args[0]
    return factor


_RESHAPES = ("aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.flatten", "aten.unflatten")

HeadRule: TypeAlias = Callable[[Walk, fx.Node], "Head | tuple[Head, ...] | None"]


def _axis(dim: Any, rank: int) -> int | None:
    """Of the numbers of a head; None for a leading dimension."""
    if not isinstance(dim, int):
        return None
    dim = dim + rank if dim < 0 else dim
    return dim - LEADING if dim >= LEADING else None


def _moved(change: Callable[[Head, fx.Node], Entries | None]) -> HeadRule:
    """A rule for an op that moves the numbers of its first argument."""

    def rule(walk: Walk, node: fx.Node) -> Head | None:
        head = walk.head(node.args[0])
        entries = change(head, node) if head is not None else None
        return Head(entries, head.swapped) if head is not None and entries is not None else None

    return rule


def _slice(head: Head, node: fx.Node) -> Entries | None:
    dim, start, end, step = node.args[1:]
    axis = _axis(dim, LEADING + head.entries.ndim)
    if axis is None or any(isinstance(bound, fx.Node) for bound in (start, end, step)):
        return None
    return head.entries[(slice(None),) * axis + (slice(start, end, step),)]


def _select(head: Head, node: fx.Node) -> Entries | None:
    dim, index = node.args[1:]
    axis = _axis(dim, LEADING + head.entries.ndim)
    return None if axis is None or not isinstance(index, int) else _take(head.entries, axis, index)


def _take(entries: Entries, axis: int, index: int) -> Entries:
    index = index + entries.shape[axis] if index < 0 else index
    return entries[(slice(None),) * axis + (slice(index, index + 1),)].squeeze(axis)


def _unsqueeze(head: Head, node: fx.Node) -> Entries | None:
    axis = _axis(node.args[1], LEADING + head.entries.ndim + 1)
    return None if axis is None else np.expand_dims(head.entries, axis)


def _negated(head: Head, node: fx.Node) -> Entries:
    return _array([{term: -c for term, c in entry.items()} for entry in head.entries.flat], head.entries.shape)


def _reshaped(walk: Walk, node: fx.Node) -> Head | None:
    """Leading dimensions stay, so what is behind them is merged and split among itself."""
    head = walk.head(node.args[0])
    sizes = walk.trailing(node, head.swapped) if head is not None else None
    return Head(head.entries.reshape(sizes), head.swapped) if head is not None and sizes is not None else None


def _permuted(walk: Walk, node: fx.Node) -> Head | None:
    head = walk.head(node.args[0])
    if head is None:
        return None
    rank = LEADING + head.entries.ndim
    if op_name(node) == "aten.transpose":
        order = list(range(rank))
        a, b = (d % rank for d in node.args[1:])
        order[a], order[b] = b, a
    else:
        order = [d % rank for d in node.args[1]]
    if order[:LEADING] not in ([0, 1, 2], [0, 2, 1]):
        return None
    behind = [d - LEADING for d in order[LEADING:]]
    return Head(head.entries.transpose(behind), head.swapped != (order[1] == 2))


def _same(walk: Walk, node: fx.Node) -> Head | None:
    return walk.head(node.args[0])


def _joined(walk: Walk, node: fx.Node) -> Head | None:
    """cat and stack."""
    heads = [walk.head(part) for part in node.args[0]]
    dim = argument(node, "dim")
    known = [head for head in heads if head is not None]
    if len(known) < len(heads) or len({head.swapped for head in known}) > 1:
        return None
    stack = op_name(node) == "aten.stack"
    axis = _axis(dim, LEADING + known[0].entries.ndim + stack)
    if axis is None:
        return None
    entries = [head.entries for head in known]
    return Head(np.stack(entries, axis) if stack else np.concatenate(entries, axis), known[0].swapped)


def _parted(walk: Walk, node: fx.Node) -> tuple[Head, ...] | None:
    """split, chunk and unbind."""
    head, name = walk.head(node.args[0]), op_name(node)
    if head is None:
        return None
    dim: Any = argument(node, "dim")
    axis = _axis(dim, LEADING + head.entries.ndim)
    if axis is None:
        return None
    if name == "aten.unbind":
        parts = [_take(head.entries, axis, i) for i in range(head.entries.shape[axis])]
    else:
        sizes = [int(value.shape[dim]) for value in node.meta["val"]]
        parts = np.split(head.entries, np.cumsum(sizes)[:-1], axis)
    return tuple(Head(part, head.swapped) for part in parts)


def _part(walk: Walk, node: fx.Node) -> Head | None:
    parts, index = walk.found.get(node.args[0]), node.args[1]
    return parts[index] if isinstance(parts, tuple) else None


def _product(walk: Walk, node: fx.Node) -> Head | None:
    a, b = node.args
    x, other = (a, b) if walk.head(a) is not None else (b, a)
    head = walk.head(x)
    if head is None or walk.head(other) is not None:
        return None
    if isinstance(other, fx.Node):
        return walk.times(head, other) if isinstance(other.meta.get("val"), torch.Tensor) else None
    scaled = [{term: c * other for term, c in entry.items()} for entry in head.entries.flat]
    return Head(_array(scaled, head.entries.shape), head.swapped)


def _sum(walk: Walk, node: fx.Node) -> Head | None:
    """add and sub."""
    a, b = (walk.head(operand) for operand in node.args[:2])
    if (
        a is None
        or b is None
        or argument(node, "alpha") != 1
        or a.swapped != b.swapped
        or a.entries.shape != b.entries.shape
    ):
        return None
    sign = -1.0 if op_name(node) == "aten.sub" else 1.0
    made = []
    for first, second in zip(a.entries.flat, b.entries.flat, strict=True):
        entry = dict(first)
        for term, c in second.items():
            entry[term] = entry.get(term, 0.0) + sign * c
        made.append({term: c for term, c in entry.items() if c})
    return Head(_array(made, a.entries.shape), a.swapped)


RULES: dict[str, HeadRule] = {
    "aten.slice": _moved(_slice),
    "aten.select": _moved(_select),
    "aten.unsqueeze": _moved(_unsqueeze),
    "aten.neg": _moved(_negated),
    **dict.fromkeys(("aten.reshape", "aten.flatten", "aten.unflatten", "aten.squeeze"), _reshaped),
    **dict.fromkeys(("aten.transpose", "aten.permute"), _permuted),
    **dict.fromkeys(("aten._to_copy", "aten.type_as", "aten.clone", "aten.contiguous"), _same),
    **dict.fromkeys(("aten.cat", "aten.stack"), _joined),
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind"), _parted),
    "getitem": _part,
    "aten.mul": _product,
    "aten.add": _sum,
    "aten.sub": _sum,
}
