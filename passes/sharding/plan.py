"""The plan: which weights are cut by outputs. Everything else follows from the rules.

Attention sites come first: their queries, keys and values are wanted by head, and a want is taken back, op by op, to
the products that make them. Then every product whose input can be made in parts by cutting the products before it (an
MLP's second one). The head is cut by vocabulary rows. A want that ends anywhere else is not followed: that value stays
whole, and a rank takes its part of it.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.attention import tree_attention
from treespec_compiler.ir.library import definition

from ..forms.form import shape_of
from ..framework.state import GraphState
from .placements import Segment, Sharded
from .rule import Want, meaning, named
from .rules.attention import head_cuts, wants_of
from .rules.products import PRODUCTS
from .table import op_of, rule_of

# What may read a value whole beside those that read its parts: sums of squares, which are partial sums then.
_SUMS = {"aten.pow", "aten.mul", "aten.square", "aten.mean", "aten.sum", "aten._to_copy", "aten.abs", "aten.sym_size"}


@dataclass
class CutPlan:
    """`columns`: products cut by outputs, with the cut of their results; `sites`: attention cut by head."""

    columns: dict[fx.Node, Sharded] = field(default_factory=dict)
    rows: set[fx.Node] = field(default_factory=set)
    """Products whose input comes in parts."""
    sites: dict[fx.Node, tuple[Sharded, Sharded]] = field(default_factory=dict)
    """The cuts of queries and of keys."""
    whole: dict[fx.Node, str] = field(default_factory=dict)
    """Attention that stays whole, and why."""

    @property
    def empty(self) -> bool:
        return not self.columns and not self.sites


@dataclass
class _Found:
    """Where a sweep ended."""

    columns: dict[fx.Node, Sharded] = field(default_factory=dict)
    cut: int = 0
    """Values that are cut already as it is wanted."""
    left: list[fx.Node] = field(default_factory=list)
    """Values of tokens that stay whole."""


def make_plan(state: GraphState, ranks: int) -> CutPlan:
    """The plan for a graph of whole values at level "rows"."""
    return _Planning(state, ranks).plan()


def constants(state: GraphState) -> set[fx.Node]:
    """Nodes computed from weights alone."""
    found: set[fx.Node] = set()
    for node in state.graph.nodes:
        weight = node.op == "placeholder" and node.name in state.weights
        made = node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if weight or made:
            found.add(node)
    return found


class _Planning:
    def __init__(self, state: GraphState, ranks: int) -> None:
        self.state, self.ranks = state, ranks
        self.order = {node: i for i, node in enumerate(state.graph.nodes)}
        self.constant = constants(state)
        self.made = CutPlan()

    def plan(self) -> CutPlan:
        self._attention()
        self._head()
        for node in self.order:
            if self._is_product(node) and node not in self.made.columns:
                self._row(node)
        return self.made

    def _attention(self) -> None:
        wants: list[tuple[fx.Node, Want]] = []
        for node in self.order:
            if node.op != "call_function" or definition(node.target) is not tree_attention:
                continue
            spec = self.state.sites[node.meta["site"]]
            cuts = head_cuts(spec.heads, spec.kv_heads, self.ranks)
            if cuts is None:
                heads = f"{spec.heads} heads in {spec.kv_heads} KV groups"
                self.made.whole[node] = f"{heads} cannot be dealt out to {self.ranks} ranks"
                continue
            self.made.sites[node] = cuts
            wants += [(node, want) for want in wants_of(op_of(node, self.ranks), *cuts)]
        self.made.columns |= self._sweep(wants).columns

    def _row(self, node: fx.Node) -> None:
        """Cut what makes the input of a product, where that needs no communication."""
        op = op_of(node, self.ranks)
        at = op.names.index(PRODUCTS[meaning(node)][0])
        size = op.shapes[at][-1]
        if not size.is_Integer:
            return
        cut = Sharded(len(op.shapes[at]) - 1, (Segment(int(size)),))
        if not cut.fits(self.ranks) or op.operands[at] in self.constant:
            return
        found = self._sweep([(node, Want(at, cut))])
        if not found.left and (found.columns or found.cut) and self._free(found):
            self.made.columns |= found.columns
            self.made.rows.add(node)

    def _head(self) -> None:
        logits = self.state.logits
        dim = self.state.logits_given.vocabulary % len(shape_of(logits))
        size = shape_of(logits)[dim]
        if not size.is_Integer:
            return
        cut = Sharded(dim, (Segment(int(size)),), "vocabulary row")
        if not cut.fits(self.ranks):
            return
        found = self._sweep([(self.state.output, Want(-1, cut))])
        if not found.left and found.columns and self._free(found):
            self.made.columns |= found.columns

    def _free(self, found: _Found) -> bool:
        """Nothing that was planned is planned otherwise."""
        known = self.made.columns
        return all(known.get(n, cut) == cut and n not in self.made.rows for n, cut in found.columns.items())

    def _sweep(self, wants: Iterable[tuple[fx.Node, Want]]) -> _Found:
        """Take wants back to the products that can be cut. Every reader of a value is looked at before the value."""
        found, pieces, edges = _Found(), {}, set()  # type: ignore[var-annotated]
        heap: list[int] = []
        nodes = list(self.order)

        def put(reader: fx.Node, of: fx.Node, cut: Sharded, start: int) -> None:
            edges.add((reader, of))
            if of not in pieces:
                pieces[of] = []
                heapq.heappush(heap, -self.order[of])
            pieces[of].append((cut, start))

        for reader, want in wants:
            of = self.state.logits if want.operand < 0 else op_of(reader, self.ranks).operands[want.operand]
            put(reader, of, want.cut, want.start)
        while heap:
            node = nodes[-heapq.heappop(heap)]
            cut = _whole_cut(node, pieces[node], self.ranks)
            if node in self.constant:
                continue
            if cut is None or not self._follow(node, cut, edges, found, put):
                found.left.append(node)
        return found

    def _follow(self, node: fx.Node, cut: Sharded, edges: set[Any], found: _Found, put: Any) -> bool:
        if node in self.made.sites:
            found.cut += self.made.sites[node][0] == cut
            return self.made.sites[node][0] == cut
        if self._is_product(node):
            if cut.dim == node.meta["val"].dim() - 1:
                found.columns[node] = cut
            return node in found.columns
        readers = (user for user in node.users if (user, node) not in edges)
        if node.op != "call_function" or any(user.op == "output" or meaning(user) not in _SUMS for user in readers):
            return False
        if node.target is operator.getitem:
            return _through_getitem(node, cut, edges, put)
        rule = rule_of(node)
        op = op_of(node, self.ranks)
        wanted = rule.wants(op, cut) if rule is not None else None
        if wanted is None:
            return False
        for want in wanted:
            put(node, op.operands[want.operand], want.cut, want.start)
        return True

    def _is_product(self, node: fx.Node) -> bool:
        """Whether the node is a product with a weight, or with what weights alone make."""
        if node.op != "call_function" or meaning(node) not in PRODUCTS:
            return False
        x, weight = PRODUCTS[meaning(node)]
        found = named(node)
        return found[weight] in self.constant and found[x] not in self.constant


def _whole_cut(node: fx.Node, pieces: list[tuple[Sharded, int]], ranks: int) -> Sharded | None:
    """The cuts that readers want of parts of a dimension as one of all of it; what nobody wants cut stays whole."""
    dims = {cut.dim for cut, _ in pieces}
    value = node.meta.get("val")
    if len(dims) != 1 or not isinstance(value, torch.Tensor):
        return None
    dim = dims.pop()
    size, at = shape_of(node)[dim], 0
    if not size.is_Integer:
        return None
    segments: list[Segment] = []
    known: dict[int, Sharded] = {}
    for cut, start in pieces:
        if known.setdefault(start, cut) != cut:
            return None
    for start in sorted(known):
        if start < at:
            return None
        if start > at:
            segments.append(Segment(start - at, ranks))
        segments += known[start].segments
        at = start + known[start].size
    if at < size:
        segments.append(Segment(int(size) - at, ranks))
    made = Sharded(dim, tuple(segments), known[min(known)].unit)
    return made if made.fits(ranks) and at <= size else None


def _through_getitem(node: fx.Node, cut: Sharded, edges: set[Any], put: Any) -> bool:
    """From a piece of a split to what was split."""
    source, at = node.args
    assert isinstance(source, fx.Node)
    edges.add((node, source))
    name = meaning(source)
    if name not in ("aten.split", "aten.split_with_sizes", "aten.unbind"):
        return False
    x: Any = source.args[0]
    dim = source.kwargs.get("dim", source.args[-1])
    dim = int(dim) % x.meta["val"].dim()
    if name == "aten.unbind":
        put(source, x, cut.moved(cut.dim + (cut.dim >= dim)), 0)
        return True
    start = sum(int(v.shape[dim]) for v in source.meta["val"][:at]) if cut.dim == dim else 0
    put(source, x, cut, start)
    return True
