"""Terms of scores that are a query's product with a vector of its distance to the key: q'[i] . r[i - j].

Shaw et al. 2018 (arXiv:1803.02155) multiply with a table read at clipped distances, [T, T, D]; Huang et al. 2018
(arXiv:1809.04281, Music Transformer), after Dai et al. 2019 (arXiv:1901.02860), with one vector a distance, and bring
the product [T, T] into place by padding it with a column and laying it out anew. Here both become q' and the vectors of
all pairs; that a vector depends on the distance alone is `classify`'s to prove, as of a bias with a head for each
dimension. In a tree, where a distance is a difference of depths, each node computes its product with every vector once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import BY_PLACE, ClosedForms, shape_of
from ..framework.state import GraphState
from .weight_path import PRODUCTS

aten = torch.ops.aten


@dataclass(frozen=True)
class RelativeTerm:
    """q'[0, h, i] . pairs[h or 0, :, i, j] for j <= i; what lies above the diagonal counts for nothing."""

    queries: fx.Node
    """[1, H, T, D]"""
    pairs: fx.Node
    """[1 or H, D, T, T]: numbers of places alone, and minus infinity for keys that come later."""


def relative_term(state: GraphState, forms: ClosedForms, node: Any, at: fx.Node) -> RelativeTerm | None:
    """The term that a node [.., H, T, T] is; new nodes stand in front of `at`. None: it is another one."""
    if not isinstance(node, fx.Node) or len(shape_of(node)) not in (3, 4):
        return None
    return _Finder(state, forms, at).of(node)


class _Finder:
    def __init__(self, state: GraphState, forms: ClosedForms, at: fx.Node) -> None:
        self.state, self.forms, self.at = state, forms, at

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.at)

    def of(self, node: fx.Node) -> RelativeTerm | None:
        outer = _moved(node)
        shifted = self._shifted(outer)
        return self._by_row(self._bare(node)) if shifted is None else self._by_shift(shifted)

    def _bare(self, node: fx.Node) -> fx.Node:
        """Without layouts in which only dimensions of one come or go."""
        while op_name(node) == "aten.reshape" and _wide(node) == _wide(node.args[0]):
            node = node.args[0]
        return node

    def _shifted(self, outer: _Moved) -> fx.Node | None:
        """S [.., T, T] of R[i, j] = S[i, T - 1 - (i - j)], which holds for j <= i.

        With a column in front, element (i, c) of S stands at i * (T + 1) + c + 1. In rows of T that is row i + 1 and
        column j where c = T - 1 - (i - j); the first row is cut off. Rows and columns may be any two dimensions side
        by side (Transformer-XL has them in front), as long as R has them where S has.
        """
        node, length = outer.source, self.state.length
        if op_name(node) != "aten.slice" or argument(node, "step") != 1 or argument(node, "start") != 1:
            return None
        shape, source = [*shape_of(node)], node.args[0]
        at = int(argument(node, "dim")) % len(shape)
        if shape[at : at + 2] != [length, length] or outer.dims[-2:] != (at, at + 1):
            return None
        padded: Any = source.args[0] if op_name(source) == "aten.reshape" else None
        before, after = ([*shape[:at], *two, *shape[at + 2 :]] for two in ((length, length + 1), (length + 1, length)))
        if padded is None or [*shape_of(padded)] != before or [*shape_of(source)] != after:
            return None
        scores = _without_column(padded, at + 1)
        return None if scores is None else _put_back(outer, _moved(scores))

    def _product(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(of tokens, of places alone), multiplied."""
        if op_name(node) not in PRODUCTS:
            return None
        a, b = node.args[:2]
        known = isinstance(a, fx.Node) and isinstance(b, fx.Node)
        return (a, b) if known and a in self.forms.tainted and b not in self.forms.tainted else None

    def _by_shift(self, product: fx.Node) -> RelativeTerm | None:
        """[1, H, T, D] times [D, T] or [H, D, T], whose last column is that of distance 0."""
        found = self._product(product)
        if found is None:
            return None
        queries, vectors = (self._heads_in_front(operand) for operand in found)
        length, shape = self.state.length, shape_of(vectors)
        if len(shape_of(queries)) == 3:
            queries = self.emit(aten.unsqueeze.default, queries, 0)
        if len(shape) == 4 and shape[0] == 1:
            vectors, shape = self.emit(aten.squeeze.dim, vectors, 0), shape[1:]
        heads = shape_of(queries)[1]
        if len(shape_of(queries)) != 4 or len(shape) not in (2, 3) or shape[-1] != length:
            return None
        if len(shape) == 3 and shape[0] not in (1, heads):
            return None
        away = self.emit(aten.abs.default, self._distances())
        by_distance = self._known(self.emit(aten.flip.default, vectors, [len(shape) - 1]))
        pairs = self.emit(aten.index.Tensor, by_distance, [*[None] * (len(shape) - 1), away])
        return self._made(queries, pairs)

    def _heads_in_front(self, node: fx.Node) -> fx.Node:
        """[H, 1, x, y] -> [1, H, x, y]."""
        shape = shape_of(node)
        if len(shape) != 4 or shape[1] != 1:
            return node
        return self.emit(aten.transpose.int, node, 0, 1)

    def _known(self, by_distance: fx.Node) -> fx.Node:
        """Vectors without a closed form, such as projected sines (Transformer-XL), are a table of distances, if the
        values agree (`classify` compares them)."""
        if self.state.closed_forms().of(by_distance) is None:
            by_distance.meta[BY_PLACE] = True
            self.state.proved_by(by_distance)
            self.state.rewritten()
        return by_distance

    def _by_row(self, node: fx.Node) -> RelativeTerm | None:
        """A product with the queries in front: [T, H, D] times [T, D, T]; a dimension of one may stand behind them."""
        name, order = op_name(node), None
        rank = len(shape_of(node))
        if name == "aten.permute":
            order = [int(d) % rank for d in node.args[1]]
        elif name == "aten.transpose":
            order = list(range(rank))
            i, j = (int(argument(node, d)) % rank for d in ("dim0", "dim1"))
            order[i], order[j] = order[j], order[i]
        source: Any = node.args[0] if order is not None else None
        found = None if order is None else self._product(source)
        if found is None:
            return None
        queries, vectors = found
        if rank == 4 and order == [1, 2, 0, 3] and shape_of(vectors)[1:2] == (1,):
            return self._made(self.emit(aten.permute.default, queries, order), self._turned(vectors, [1, 2, 0, 3]))
        if rank == 3 and order == [1, 0, 2]:
            moved = self.emit(aten.transpose.int, queries, 0, 1)
            return self._made(self.emit(aten.unsqueeze.default, moved, 0), self._turned(vectors, [1, 0, 2]))
        return None

    def _turned(self, vectors: fx.Node, order: list[int]) -> fx.Node | None:
        """[D, T, T] or [1, D, T, T] of vectors with the queries in front."""
        return self.emit(aten.permute.default, vectors, order) if len(shape_of(vectors)) == len(order) else None

    def _distances(self) -> fx.Node:
        """i - j, [T, T]."""
        tokens = self.state.node(self.state.tokens)
        size = self.emit(aten.sym_size.int, tokens, 1)
        steps = self.emit(aten.arange.default, size, device=tokens.meta["val"].device)
        rows, columns = (self.emit(aten.unsqueeze.default, steps, d) for d in (1, 0))
        return self.emit(aten.sub.Tensor, rows, columns)

    def _made(self, queries: fx.Node, pairs: fx.Node | None) -> RelativeTerm | None:
        """With pairs [.., D, T, T] of four dimensions, hidden where keys come later."""
        length = self.state.length
        if pairs is None or shape_of(pairs)[-2:] != (length, length):
            return None
        if shape_of(pairs)[-3] != shape_of(queries)[-1] or not pairs.meta["val"].is_floating_point():
            return None
        if shape_of(queries)[0] != 1 or shape_of(queries)[2] != length:
            return None
        if len(shape_of(pairs)) == 3:
            pairs = self.emit(aten.unsqueeze.default, pairs, 0)
        later = self.emit(aten.lt.Scalar, self._distances(), 0)
        return RelativeTerm(queries, self.emit(aten.masked_fill.Scalar, pairs, later, -math.inf))


def _wide(node: Any) -> list[Any]:
    return [s for s in shape_of(node) if s != 1]


def _without_column(padded: fx.Node, at: int) -> fx.Node | None:
    """S of [0, S], a column in front in dimension `at`."""
    name, rank = op_name(padded), len(shape_of(padded))
    if name in ("aten.pad", "aten.constant_pad_nd"):
        plain = name == "aten.constant_pad_nd" or argument(padded, "mode") == "constant"
        widths: Any = padded.args[1]
        return padded.args[0] if plain and list(widths) == [0, 0] * (rank - 1 - at) + [1, 0] else None
    parts: Any = padded.args[0] if name == "aten.cat" else ()
    if len(parts) != 2 or argument(padded, "dim") not in (at - rank, at) or shape_of(parts[0])[at] != 1:
        return None
    return parts[1]


@dataclass(frozen=True)
class _Moved:
    """A value whose dimensions were moved; `dims`: where those that are not 1 stand in `source`, in order."""

    source: fx.Node
    dims: tuple[int, ...]


def _moved(node: fx.Node) -> _Moved:
    """What is left of a node without ops that only move dimensions."""
    dims = [i for i, s in enumerate(shape_of(node)) if s != 1]
    while (before := _before(node)) is not None:
        dims = [before[d] for d in dims]
        node = node.args[0]
    return _Moved(node, tuple(dims))


def _before(node: fx.Node) -> dict[int, int] | None:
    """Where each dimension that is not 1 was before an op that moves dimensions; None: it is another op."""
    name, source = op_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    rank = len(shape_of(node))
    if name in ("aten.permute", "aten.transpose"):
        order = list(range(rank))
        if name == "aten.permute":
            asked: Any = node.args[1]
            order = [int(d) % rank for d in asked]
        else:
            i, j = (int(argument(node, d)) % rank for d in ("dim0", "dim1"))
            order[i], order[j] = order[j], order[i]
        return dict(enumerate(order))
    if name not in ("aten.reshape", "aten.squeeze", "aten.unsqueeze") or _wide(node) != _wide(source):
        return None
    wide = ([i for i, s in enumerate(shape_of(n)) if s != 1] for n in (node, source))
    return dict(zip(*wide, strict=True))


def _put_back(outer: _Moved, inner: _Moved) -> fx.Node | None:
    """The product whose dimensions were moved to be shifted, where `outer` moved them back; None: it did not.

    `outer.source` and the value that `inner` is of have the same shape.
    """
    here = [i for i, s in enumerate(shape_of(outer.source)) if s != 1]
    net = [inner.dims[here.index(d)] for d in outer.dims]
    return inner.source if net == sorted(net) and net[-2:] == [*range(len(shape_of(inner.source)))][-2:] else None
