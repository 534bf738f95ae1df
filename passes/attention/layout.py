"""How attention scores are laid out: a product of tokens by tokens, followed up to the product with the values.

What is done to the scores is followed dimension by dimension: which one counts queries, which keys, and which are
(factors of) heads. Nothing is proved here about what is computed; `plain_layout` writes it down again on
[1, heads, queries, keys], and the reader of attention sees that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..framework.state import GraphState
from .spelled_out import SOFTMAXES

PRODUCTS = ("aten.matmul", "aten.bmm")
POINTWISE = {
    f"aten.{name}"
    for name in ("mul", "div", "add", "sub", "tanh", "where", "masked_fill", "maximum", "clamp", "clamp_min", "neg")
} | {"aten._to_copy", "aten.exp", "aten.minimum"}
REDUCTIONS = ("aten.amax", "aten.sum", "aten.logsumexp", "aten.max")


@dataclass(frozen=True, eq=False)
class Atom:
    """One factor of a dimension: queries, keys, or a number of heads."""

    size: sympy.Expr
    by_keys: bool = False
    """For heads: whether the keys differ along it."""


Layout = tuple[tuple[Atom, ...], ...]
"""The atoms of every dimension, outermost first; none for a dimension of size 1."""


@dataclass(frozen=True)
class Region:
    """The scores from one product to the product with the values, and the layout of each node."""

    product: fx.Node
    rows: Atom
    columns: Atom
    layouts: dict[fx.Node, Layout]
    softmax: fx.Node
    output: fx.Node


def is_plain(region: Region) -> bool:
    rows, columns = (region.rows,), (region.columns,)
    if softmax_dim(region.softmax) != len(region.layouts[region.softmax]) - 1:
        return False
    for layout in region.layouts.values():
        if len(layout) not in (3, 4) or layout[-1] not in (columns, ()) or layout[-2] not in (rows, ()):
            return False
        if len(layout) == 4 and layout[0]:
            return False
    return True


class Tracer:
    """Follows the layout of one product's result."""

    def __init__(self, state: GraphState, forms: ClosedForms, product: fx.Node) -> None:
        self.state, self.forms, self.product = state, forms, product
        self.layouts: dict[fx.Node, Layout] = {}

    def region(self) -> Region | None:
        begin = self._product()
        if begin is None:
            return None
        self.layouts[self.product] = begin[0]
        softmax: fx.Node | None = None
        reached = False
        for node in self.state.graph.nodes:
            if node is self.product:
                reached = True
                continue
            inside = [a for a in node.all_input_nodes if a in self.layouts]
            if not reached or not inside or node.op != "call_function":
                continue
            if softmax is not None and self._is_output(node, softmax):
                return Region(self.product, begin[1], begin[2], self.layouts, softmax, node)
            layout = self._layout(node)
            if layout is None:
                continue
            self.layouts[node] = layout
            if op_name(node) in SOFTMAXES:
                softmax = node
        return None

    def _product(self) -> tuple[Layout, Atom, Atom] | None:
        a, b = self.product.args[:2]
        left, right, length = shape_of(a), shape_of(b), self.state.length
        if len(left) < 2 or len(right) < 2 or right[-1] != length or length in left[-1].free_symbols:
            return None
        query, key = Atom(length), Atom(length)
        rows = _row_atoms(a, length, query)
        if rows is None:
            return None
        batch: list[tuple[Atom, ...]] = []
        rank = len(shape_of(self.product))
        for i in range(rank - 2):
            size = shape_of(self.product)[i]
            if not size.is_Integer:
                return None
            at = i - (rank - len(right))
            own = at >= 0 and right[at] != 1
            batch.append(() if size == 1 else (Atom(size, own),))
        return (*batch, rows, (key,)), query, key

    def _is_output(self, node: fx.Node, softmax: fx.Node) -> bool:
        """Whether this is the product of the weights with the values."""
        if op_name(node) not in PRODUCTS:
            return False
        a, b = node.args[:2]
        if not _reaches(a if a in self.layouts else b, softmax):
            return False
        key = self.layouts[softmax][softmax_dim(softmax)]
        if a in self.layouts and b not in self.layouts and b in self.forms.tainted:
            return self.layouts[a][-1] == key and len(self.layouts[a]) >= 2
        return b in self.layouts and a not in self.layouts and a in self.forms.tainted and self.layouts[b][-2] == key

    def _layout(self, node: fx.Node) -> Layout | None:
        name = op_name(node)
        source: Any = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if name in SOFTMAXES:
            layout = self.layouts.get(source)
            dim = None if layout is None else layout[softmax_dim(node)]
            return layout if dim is not None and len(dim) == 1 and dim[0].size == self.state.length else None
        if name in POINTWISE:
            return self._pointwise(node)
        layout = self.layouts.get(source)
        if layout is None:
            return None
        if name in REDUCTIONS:
            return self._reduced(node, layout)
        if node.target is operator.getitem:
            return layout if node.args[1] == 0 else None
        rule = _MOVES.get(name)
        return None if rule is None else rule(node, layout)

    def _pointwise(self, node: fx.Node) -> Layout | None:
        found: list[tuple[Atom, ...]] = []
        for operand in node.all_input_nodes:
            layout = self.layouts.get(operand)
            if layout is None:
                continue
            if len(layout) != len(shape_of(node)):
                return None
            for i, atoms in enumerate(layout):
                if len(found) <= i:
                    found.append(atoms)
                elif not found[i]:
                    found[i] = atoms
                elif atoms and atoms != found[i]:
                    return None
        sizes = [product_of(atoms) for atoms in found]
        return tuple(found) if sizes == list(shape_of(node)) else None

    def _reduced(self, node: fx.Node, layout: Layout) -> Layout | None:
        """A reduction over the keys that keeps the dimension."""
        dims: Any = argument(node, "dim")
        if isinstance(dims, (list, tuple)):
            if len(dims) != 1:
                return None
            dims = dims[0]
        if not isinstance(dims, int) or not argument(node, "keepdim"):
            return None
        at = dims % len(layout)
        return (*layout[:at], (), *layout[at + 1 :]) if len(layout[at]) == 1 else None


def softmax_dim(node: fx.Node) -> int:
    dim: Any = argument(node, "dim")
    return int(dim) % len(shape_of(node))


def _reaches(node: fx.Node, source: fx.Node) -> bool:
    """Whether the node is computed from `source` in a few steps of layout or casts."""
    while node is not source:
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def product_of(atoms: Sequence[Atom]) -> sympy.Expr:
    return sympy.Mul(*(a.size for a in atoms))


def _row_atoms(a: Any, length: sympy.Symbol, query: Atom) -> tuple[Atom, ...] | None:
    """What the rows of the first operand count: queries, or heads and queries that a reshape merged."""
    rows = shape_of(a)[-2]
    if rows == length:
        return (query,)
    if op_name(a) not in ("aten.reshape", "aten.flatten"):
        return None
    before, after = list(shape_of(a.args[0])), list(shape_of(a))
    if before[-1] != after[-1] or sympy.Mul(*before) != sympy.Mul(*after):
        return None
    before = before[:-1]
    atoms: list[Atom] = []
    while before and product_of(atoms) != rows:
        size = before.pop()
        if size == 1:
            continue
        if size != length and not size.is_Integer:
            return None
        atoms.insert(0, query if size == length else Atom(size))
    return tuple(atoms) if atoms.count(query) == 1 and product_of(atoms) == rows else None


# ------------------------------------------------------------------------------- ops that only move dimensions


def _permuted(node: fx.Node, layout: Layout) -> Layout:
    rank = len(layout)
    if op_name(node) == "aten.permute":
        order = [int(d) % rank for d in node.args[1]]
    else:
        i, j = (int(d) % rank for d in node.args[1:3]) if op_name(node) == "aten.transpose" else (0, 1)
        order = [*range(rank)]
        order[i], order[j] = j, i
    return tuple(layout[i] for i in order)


def _unsqueezed(node: fx.Node, layout: Layout) -> Layout:
    at = int(node.args[1]) % (len(layout) + 1)
    return (*layout[:at], (), *layout[at:])


def _squeezed(node: fx.Node, layout: Layout) -> Layout | None:
    dims: Any = argument(node, "dim", range(len(layout)))
    gone = {int(d) % len(layout) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}
    return tuple(atoms for i, atoms in enumerate(layout) if i not in gone or atoms)


def _reshaped(node: fx.Node, layout: Layout) -> Layout | None:
    """The same atoms in order, grouped by the new sizes; none is split."""
    left = [atom for atoms in layout for atom in atoms]
    found: list[tuple[Atom, ...]] = []
    for size in shape_of(node):
        group: list[Atom] = []
        while product_of(group) != size:
            if not left:
                return None
            group.append(left.pop(0))
            if len(group) > 8:
                return None
        found.append(tuple(group))
    return tuple(found) if not left else None


_MOVES: dict[str, Callable[[fx.Node, Layout], Layout | None]] = {
    "aten.permute": _permuted,
    "aten.transpose": _permuted,
    "aten.t": _permuted,
    "aten.unsqueeze": _unsqueezed,
    "aten.squeeze": _squeezed,
    "aten.reshape": _reshaped,
    "aten.flatten": _reshaped,
    "aten.unflatten": _reshaped,
}
