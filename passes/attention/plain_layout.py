"""The plain layout of scores: a region that `layout` followed is written down again on [1, H, queries, keys]."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..framework.state import GraphState
from .layout import POINTWISE, PRODUCTS, REDUCTIONS, Atom, Layout, Region, Tracer, is_plain, product_of, softmax_dim
from .spelled_out import SOFTMAXES

aten = torch.ops.aten


def plain_layouts(state: GraphState) -> int:
    """Rewrite every attention whose scores are not laid out as [1, H, T, T] or [H, T, T]; returns how many."""
    forms = state.closed_forms()
    matches = 0
    for node in list(state.graph.nodes):
        if op_name(node) not in PRODUCTS or not all(a in forms.tainted for a in node.args[:2]):
            continue
        region = Tracer(state, forms, node).region()
        if region is not None and not is_plain(region):
            _Writer(state, forms, region).rewrite()
            matches += 1
    if matches:
        state.clean()
    return matches


class _Writer:
    """Writes a region down again on [1, H, queries, keys]."""

    def __init__(self, state: GraphState, forms: ClosedForms, region: Region) -> None:
        self.state, self.region, self.at = state, region, region.output
        self.layouts = region.layouts
        keys = self.layouts[region.softmax][softmax_dim(region.softmax)]
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
            return self.emit(node.target, self._plain(node.args[0]), -1, *rest, **node.kwargs)
        if name in REDUCTIONS:
            dims: Any = -1 if isinstance(node.args[1], int) else [-1]
            return self.emit(node.target, self._plain(node.args[0]), dims, True)
        if node.target is operator.getitem:
            return self.emit(operator.getitem, self._plain(node.args[0]), 0)
        if name in POINTWISE:
            mapped = [self._argument(a, node) for a in node.args]
            return self.emit(node.target, *mapped, **node.kwargs)
        return self._plain(node.args[0])  # it only moves dimensions

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
        node, atoms = self._split(node, [*dims, rows])
        heads = [h for h in self.heads if h in atoms]
        (token,) = [a for a in atoms if a in (self.query, self.key)]
        order = [*heads, token]
        node = self._permute(node, [*(atoms.index(a) for a in order), len(atoms)])
        node = self._merge_heads(node, len(heads))
        missing = [h for h in self.heads if h not in heads]
        if not missing or self.heads[: len(heads)] != heads:
            return self._repeat_any(node, heads) if missing else node
        times = int(product_of(missing))
        if not heads:
            return self.emit(aten.expand.default, node, [1, times, -1, -1])
        have = int(product_of(heads))
        node = self.emit(aten.unsqueeze.default, node, 2)
        node = self.emit(aten.expand.default, node, [1, have, times, -1, -1])
        return self.emit(aten.reshape.default, node, [1, have * times, -1, int(shape[-1])])

    def _repeat_any(self, node: fx.Node, heads: list[Atom]) -> fx.Node:
        """[1, some heads, T, D] -> [1, H, T, D] where those it has are not the first ones."""
        sizes = [int(h.size) if h in heads else 1 for h in self.heads]
        node = self.emit(aten.unflatten.int, node, 1, sizes)
        node = self.emit(aten.expand.default, node, [1, *(int(h.size) for h in self.heads), -1, -1])
        return self.emit(aten.flatten.using_ints, node, 1, len(self.heads))

    def _split(self, node: fx.Node, dims: list[tuple[Atom, ...]]) -> tuple[fx.Node, list[Atom]]:
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
        node, atoms = self._split(node, dims)
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
