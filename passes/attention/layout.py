"""Attention scores in any layout, rewritten to [1, heads, queries, keys].

A product of token by token, and what is done to it up to the product with the values, is followed dimension by
dimension: which one counts queries, which keys, and which are (factors of) heads. Where the layout is not the plain one
(more dimensions than four, heads merged with queries, permuted or transposed scores), the same computation is written
down again on [1, H, T, T], and its result is brought into the layout that was expected. Nothing is proved here about
what is computed: the reader of attention sees the plain spelling afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..forms.closed_form import ClosedForms, shape_of
from ..framework.provenance import op_name
from ..framework.state import GraphState
from .spelled_out import SOFTMAXES

aten = torch.ops.aten

_PRODUCTS = ("aten.matmul", "aten.bmm")
_POINTWISE = {
    f"aten.{name}"
    for name in ("mul", "div", "add", "sub", "tanh", "where", "masked_fill", "maximum", "clamp", "clamp_min", "neg")
} | {"aten._to_copy", "aten.exp", "aten.minimum"}
_REDUCTIONS = ("aten.amax", "aten.sum", "aten.logsumexp", "aten.max")


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


def plain_layouts(state: GraphState) -> int:
    """Rewrite every attention whose scores are not laid out as [1, H, T, T] or [H, T, T]; returns how many."""
    forms = ClosedForms(state.gm, state.constants, state.position_inputs, state.tokens)
    matches = 0
    for node in list(state.graph.nodes):
        if op_name(node) not in _PRODUCTS or not all(a in forms.tainted for a in node.args[:2]):
            continue
        region = _Tracer(state, forms, node).region()
        if region is not None and not _is_plain(region):
            _Writer(state, forms, region).rewrite()
            matches += 1
    if matches:
        state.clean()
    return matches


def _is_plain(region: Region) -> bool:
    rows, columns = (region.rows,), (region.columns,)
    if _softmax_dim(region.softmax) != len(region.layouts[region.softmax]) - 1:
        return False
    for layout in region.layouts.values():
        if len(layout) not in (3, 4) or layout[-1] not in (columns, ()) or layout[-2] not in (rows, ()):
            return False
        if len(layout) == 4 and layout[0]:
            return False
    return True


class _Tracer:
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
        if op_name(node) not in _PRODUCTS:
            return False
        a, b = node.args[:2]
        if not _reaches(a if a in self.layouts else b, softmax):
            return False
        key = self.layouts[softmax][_softmax_dim(softmax)]
        if a in self.layouts and b not in self.layouts and b in self.forms.tainted:
            return self.layouts[a][-1] == key and len(self.layouts[a]) >= 2
        return b in self.layouts and a not in self.layouts and a in self.forms.tainted and self.layouts[b][-2] == key

    def _layout(self, node: fx.Node) -> Layout | None:
        name = op_name(node)
        source: Any = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if name in SOFTMAXES:
            layout = self.layouts.get(source)
            dim = None if layout is None else layout[_softmax_dim(node)]
            return layout if dim is not None and len(dim) == 1 and dim[0].size == self.state.length else None
        if name in _POINTWISE:
            return self._pointwise(node)
        layout = self.layouts.get(source)
        if layout is None:
            return None
        if name in _REDUCTIONS:
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
        sizes = [_product_of(atoms) for atoms in found]
        return tuple(found) if sizes == list(shape_of(node)) else None

    def _reduced(self, node: fx.Node, layout: Layout) -> Layout | None:
        """A reduction over the keys that keeps the dimension."""
        dims: Any = node.args[1] if len(node.args) > 1 else None
        if isinstance(dims, (list, tuple)):
            if len(dims) != 1:
                return None
            dims = dims[0]
        if not isinstance(dims, int) or not (len(node.args) > 2 and node.args[2]):
            return None
        at = dims % len(layout)
        return (*layout[:at], (), *layout[at + 1 :]) if len(layout[at]) == 1 else None


def _softmax_dim(node: fx.Node) -> int:
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return int(dim) % len(shape_of(node))


def _reaches(node: fx.Node, source: fx.Node) -> bool:
    """Whether the node is computed from `source` in a few steps of layout or casts."""
    while node is not source:
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _product_of(atoms: Sequence[Atom]) -> sympy.Expr:
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
    while before and _product_of(atoms) != rows:
        size = before.pop()
        if size == 1:
            continue
        if size != length and not size.is_Integer:
            return None
        atoms.insert(0, query if size == length else Atom(size))
    return tuple(atoms) if atoms.count(query) == 1 and _product_of(atoms) == rows else None


# ------------------------------------------------------------------------------- ops that only move dimensions


def _permuted(node: fx.Node, layout: Layout) -> Layout:
    rank = len(layout)
    if op_name(node) == "aten.permute":
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr]
    else:
        i, j = (int(d) % rank for d in node.args[1:3]) if op_name(node) == "aten.transpose" else (0, 1)
        order = [*range(rank)]
        order[i], order[j] = j, i
    return tuple(layout[i] for i in order)


def _unsqueezed(node: fx.Node, layout: Layout) -> Layout:
    at = int(node.args[1]) % (len(layout) + 1)  # type: ignore[arg-type]
    return (*layout[:at], (), *layout[at:])


def _squeezed(node: fx.Node, layout: Layout) -> Layout | None:
    dims: Any = node.args[1] if len(node.args) > 1 else range(len(layout))
    gone = {int(d) % len(layout) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}
    return tuple(atoms for i, atoms in enumerate(layout) if i not in gone or atoms)


def _reshaped(node: fx.Node, layout: Layout) -> Layout | None:
    """The same atoms in order, grouped by the new sizes; none is split."""
    left = [atom for atoms in layout for atom in atoms]
    found: list[tuple[Atom, ...]] = []
    for size in shape_of(node):
        group: list[Atom] = []
        while _product_of(group) != size:
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


# ------------------------------------------------------------------------------- the plain spelling


class _Writer:
    """Writes a region down again on [1, H, queries, keys]."""

    def __init__(self, state: GraphState, forms: ClosedForms, region: Region) -> None:
        self.state, self.region, self.at = state, region, region.output
        self.layouts = region.layouts
        keys = self.layouts[region.softmax][_softmax_dim(region.softmax)]
        self.key = keys[0]
        self.turned = self.key is region.rows  # softmax over the first operand's tokens
        self.query = region.columns if self.turned else region.rows
        tokens = (self.query, self.key)
        heads = [atom for atoms in self.layouts[region.product] for atom in atoms if atom not in tokens]
        shared = [h for h in heads if h.by_keys != self.turned]
        self.heads = [*shared, *(h for h in heads if h not in shared)]
        self.done: dict[fx.Node, fx.Node] = {}

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.at)

    def rewrite(self) -> None:
        output = self.region.output
        a, b = output.args[:2]
        turned = a not in self.layouts  # values^T @ weights^T
        weights, values = (b, a) if turned else (a, b)
        layout = self.layouts[weights]
        if turned:
            layout, values = (*layout[:-2], layout[-1], layout[-2]), self.emit(aten.transpose.int, values, -2, -1)
        v = self._operand(values, layout[:-2], (self.key,))
        result = self.emit(aten.matmul.default, self._plain(weights), v)  # [1, H, T, D]
        result = self._laid_out(result, layout[:-1])
        if turned:
            result = self.emit(aten.transpose.int, result, -2, -1)
        if shape_of(result) != shape_of(output):
            raise AssertionError(f"got shape {shape_of(result)}, expected {shape_of(output)}")
        output.replace_all_uses_with(result)

    def _plain(self, node: fx.Node) -> fx.Node:
        if node not in self.done:
            self.done[node] = self._written(node)
        return self.done[node]

    def _written(self, node: fx.Node) -> fx.Node:
        name = op_name(node)
        if node is self.region.product:
            return self._scores()
        if name in SOFTMAXES:
            rest = node.args[2:]
            return self.emit(node.target, self._plain(node.args[0]), -1, *rest, **node.kwargs)  # type: ignore[arg-type]
        if name in _REDUCTIONS:
            dims: Any = -1 if isinstance(node.args[1], int) else [-1]
            return self.emit(node.target, self._plain(node.args[0]), dims, True)  # type: ignore[arg-type]
        if node.target is operator.getitem:
            return self.emit(operator.getitem, self._plain(node.args[0]), 0)  # type: ignore[arg-type]
        if name in _POINTWISE:
            mapped = [self._argument(a, node) for a in node.args]
            return self.emit(node.target, *mapped, **node.kwargs)
        return self._plain(node.args[0])  # type: ignore[arg-type]  # it only moves dimensions

    def _argument(self, value: Any, reader: fx.Node) -> Any:
        if not isinstance(value, fx.Node):
            return value
        return self._plain(value) if value in self.layouts else self._beside(value, self.layouts[reader])

    def _scores(self) -> fx.Node:
        a, b = self.region.product.args[:2]
        layout = self.layouts[self.region.product]
        if self.turned:
            a, b = self.emit(aten.transpose.int, b, -2, -1), self.emit(aten.transpose.int, a, -2, -1)
            rows, columns = layout[-1], layout[-2]
        else:
            rows, columns = layout[-2], layout[-1]
        q = self._operand(a, layout[:-2], rows)
        k = self._operand(self.emit(aten.transpose.int, b, -2, -1), layout[:-2], columns)
        return self.emit(aten.matmul.default, q, self.emit(aten.transpose.int, k, -2, -1))

    def _operand(self, node: Any, batch: Layout, rows: tuple[Atom, ...]) -> fx.Node:
        """[batch.., rows, D] -> [1, H, T, D]; heads that it does not have are repeated from a view."""
        shape = shape_of(node)
        own = batch[len(batch) - (len(shape) - 2) :] if len(shape) > 2 else ()
        dims: list[tuple[Atom, ...]] = [atoms if size != 1 else () for atoms, size in zip(own, shape, strict=False)]
        node, atoms = self._split(node, [*dims, rows], keep_last=True)
        heads = [h for h in self.heads if h in atoms]
        (token,) = [a for a in atoms if a in (self.query, self.key)]
        order = [*heads, token]
        node = self._permute(node, [*(atoms.index(a) for a in order), len(atoms)])
        node = self._merge_heads(node, len(heads))
        missing = [h for h in self.heads if h not in heads]
        if not missing or self.heads[: len(heads)] != heads:
            return self._repeat_any(node, heads) if missing else node
        times = int(_product_of(missing))
        if not heads:
            return self.emit(aten.expand.default, node, [1, times, -1, -1])
        have = int(_product_of(heads))
        node = self.emit(aten.unsqueeze.default, node, 2)
        node = self.emit(aten.expand.default, node, [1, have, times, -1, -1])
        return self.emit(aten.reshape.default, node, [1, have * times, -1, int(shape[-1])])

    def _repeat_any(self, node: fx.Node, heads: list[Atom]) -> fx.Node:
        """[1, some heads, T, D] -> [1, H, T, D] where those it has are not the first ones."""
        sizes = [int(h.size) if h in heads else 1 for h in self.heads]
        node = self.emit(aten.unflatten.int, node, 1, sizes)
        node = self.emit(aten.expand.default, node, [1, *(int(h.size) for h in self.heads), -1, -1])
        return self.emit(aten.flatten.using_ints, node, 1, len(self.heads))

    def _split(self, node: fx.Node, dims: list[tuple[Atom, ...]], keep_last: bool) -> tuple[fx.Node, list[Atom]]:
        """One dimension an atom; those without atoms are dropped. The last dimension stays last."""
        gone = [i for i, atoms in enumerate(dims) if not atoms]
        if gone:
            node = self.emit(aten.squeeze.dims, node, gone)
        flat: list[Atom] = []
        for atoms in dims:
            if len(atoms) > 1:
                sizes = [int(a.size) if a.size.is_Integer else -1 for a in atoms]
                node = self.emit(aten.unflatten.int, node, len(flat), sizes)
            flat += atoms
        return node, flat

    def _permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        return node if order == sorted(order) else self.emit(aten.permute.default, node, order)

    def _merge_heads(self, node: fx.Node, heads: int) -> fx.Node:
        """[heads.., T, D] -> [1, H, T, D]."""
        if heads > 1:
            node = self.emit(aten.flatten.using_ints, node, 0, heads - 1)
        for _ in range(4 - (len(shape_of(node)))):
            node = self.emit(aten.unsqueeze.default, node, 0)
        return node

    def _beside(self, node: fx.Node, layout: Layout) -> fx.Node:
        """An operand that is broadcast against a node of this layout -> one that is against [1, H, q, k]."""
        shape = shape_of(node)
        if all(size == 1 for size in shape):
            return node
        tail = layout[len(layout) - len(shape) :]
        dims = [atoms if size != 1 else () for atoms, size in zip(tail, shape, strict=True)]
        node, atoms = self._split(node, dims, keep_last=False)
        heads = [h for h in self.heads if h in atoms]
        tokens = [a for a in (self.query, self.key) if a in atoms]
        node = self._permute(node, [atoms.index(a) for a in (*heads, *tokens)])
        for i, token in enumerate((self.query, self.key)):
            if token not in atoms:
                node = self.emit(aten.unsqueeze.default, node, len(heads) + i)
        if not heads:
            return node
        for i, h in enumerate(self.heads):
            if h not in heads:
                node = self.emit(aten.unsqueeze.default, node, i)
        if len(heads) != len(self.heads):
            node = self.emit(aten.expand.default, node, [*(int(h.size) for h in self.heads), -1, -1])
        if len(self.heads) > 1:
            node = self.emit(aten.flatten.using_ints, node, 0, len(self.heads) - 1)
        return self.emit(aten.unsqueeze.default, node, 0)

    def _laid_out(self, node: fx.Node, layout: Layout) -> fx.Node:
        """[1, H, T, D] -> the layout's dimensions, then D."""
        node = self.emit(aten.squeeze.dims, node, [0] if self.heads else [0, 1])
        if len(self.heads) > 1:
            node = self.emit(aten.unflatten.int, node, 0, [int(h.size) for h in self.heads])
        now = [*self.heads, self.query]
        wanted = [atom for atoms in layout for atom in atoms]
        node = self._permute(node, [*(now.index(a) for a in wanted), len(now)])
        for i, atoms in enumerate(layout):
            if len(atoms) > 1:
                node = self.emit(aten.flatten.using_ints, node, i, i + len(atoms) - 1)
            elif not atoms:
                node = self.emit(aten.unsqueeze.default, node, i)
        return node
