"""One spelling of einsum: products of matrices, sums and permutations, whose token dimensions can be followed.

Operands are combined from left to right. Dimensions of two operands that are kept side by side are never merged when
one of them counts tokens: they become dimensions that the matrix product broadcasts over.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState, refuse
from .sizes import refresh, same_sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """A tensor and the label of each of its dimensions."""

    node: fx.Node
    labels: str

    def size(self, label: str) -> Any:
        return self.node.meta["val"].shape[self.labels.index(label)]


def spell_einsum(state: GraphState, node: fx.Node) -> bool:
    """Rewrite `einsum(equation, operands)` to matmul, mul, sum and permute; False for any other op."""
    if op_name(node) != "aten.einsum":
        return False
    equation, operands = node.args[0], list(node.args[1])
    labels, output = parse(str(equation), [x.meta["val"].dim() for x in operands])
    writer = _Writer(state, node)
    terms = [writer.diagonals(_Term(x, names)) for x, names in zip(operands, labels, strict=True)]
    while len(terms) > 1:
        later = "".join(t.labels for t in terms[2:]) + output
        terms[:2] = [writer.combine(terms[0], terms[1], later)]
    last = writer.sum_out(terms[0], output)
    result = writer.permute(last, output).node
    if not same_sizes(result, node):
        got, wanted = list(result.meta["val"].shape), list(node.meta["val"].shape)
        raise AssertionError(f"einsum {equation!r} was spelled with shape {got}, expected {wanted}")
    roundabout = shape_of(result) != shape_of(node)
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)
    if roundabout:
        refresh(state, result)
    return True


def parse(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Labels of every operand and of the output, `...` and implicit outputs written out."""
    inputs, arrow, given = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    widest = max((r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    ellipsis = "".join(free[:widest])
    spelled = []
    for term, rank in zip(terms, ranks, strict=True):
        own = rank - len(term.replace("...", ""))
        spelled.append(term.replace("...", ellipsis[widest - own :]))
    if arrow:
        return spelled, given.replace("...", ellipsis)
    every = "".join(spelled)
    once = sorted(c for c in set(every) if every.count(c) == 1 and c not in ellipsis)
    return spelled, ellipsis + "".join(once)


class _Writer:
    """Emits the nodes that take the place of one einsum."""

    def __init__(self, state: GraphState, at: fx.Node) -> None:
        self.state, self.at = state, at

    def emit(self, op: Any, *args: Any) -> fx.Node:
        return self.state.call(op, args, like=self.at)

    def diagonals(self, term: _Term) -> _Term:
        """A label that an operand has twice reads its diagonal, which comes last."""
        node, labels = term.node, term.labels
        for label in dict.fromkeys(labels):
            while labels.count(label) > 1:
                first = labels.index(label)
                second = labels.index(label, first + 1)
                node = self.emit(aten.diagonal.default, node, 0, first, second)
                labels = labels[:first] + labels[first + 1 : second] + labels[second + 1 :] + label
        return _Term(node, labels)

    def sum_out(self, term: _Term, kept: str) -> _Term:
        gone = [i for i, label in enumerate(term.labels) if label not in kept]
        if not gone:
            return term
        dtype = term.node.meta["val"].dtype
        node = self.state.call(aten.sum.dim_IntList, (term.node, gone), {"dtype": dtype}, like=self.at)
        return _Term(node, "".join(label for label in term.labels if label in kept))

    def permute(self, term: _Term, order: str) -> _Term:
        if term.labels == order:
            return term
        return _Term(self.emit(aten.permute.default, term.node, [term.labels.index(x) for x in order]), order)

    def broadcast(self, term: _Term, order: str) -> fx.Node:
        """The term with dimensions in this order, size 1 where it has none."""
        node = self.permute(term, "".join(x for x in order if x in term.labels)).node
        for i, label in enumerate(order):
            if label not in term.labels:
                node = self.emit(aten.unsqueeze.default, node, i)
        return node

    def combine(self, a: _Term, b: _Term, later: str) -> _Term:
        """Their product, summed over what neither a later operand nor the output has."""
        a, b = self._without_ones(a, b), self._without_ones(b, a)
        a, b = self.sum_out(a, later + b.labels), self.sum_out(b, later + a.labels)
        shared = [x for x in a.labels if x in b.labels]
        summed = "".join(x for x in shared if x not in later)
        batch = "".join(x for x in shared if x in later)
        if not summed:
            order = batch + "".join(x for x in a.labels + b.labels if x not in batch)
            order = "".join(dict.fromkeys(order))
            return _Term(self.emit(aten.mul.Tensor, self.broadcast(a, order), self.broadcast(b, order)), order)
        left = self._unknown_last(a, "".join(x for x in a.labels if x not in shared))
        right = self._unknown_last(b, "".join(x for x in b.labels if x not in shared))
        if not batch and self._static(b, right + summed):
            return self._by_matrix(a, b, left, summed, right)
        if not batch and self._static(a, left + summed):
            return self._by_matrix(b, a, right, summed, left)
        return self._by_batches(a, b, batch, left, summed, right)

    def _without_ones(self, term: _Term, other: _Term) -> _Term:
        """Dimensions of size 1 that are broadcast over the other term's: dropped."""
        shared = [x for x in term.labels if x in other.labels]
        gone = [term.labels.index(x) for x in shared if _is_one(term.size(x)) and not _is_one(other.size(x))]
        if not gone:
            return term
        labels = "".join(x for i, x in enumerate(term.labels) if i not in gone)
        return _Term(self.emit(aten.squeeze.dims, term.node, gone), labels)

    def _unknown_last(self, term: _Term, labels: str) -> str:
        """Dimensions of unknown size, the tokens, come last: they are the rows and columns of products."""
        return "".join(sorted(labels, key=lambda x: not isinstance(term.size(x), int)))

    @staticmethod
    def _static(term: _Term, labels: str) -> bool:
        return all(isinstance(term.size(x), int) for x in labels if x in term.labels)

    def _merged(self, term: _Term, outer: str, inner: str) -> fx.Node:
        """[outer.., product of inner]: one last dimension of all of `inner`."""
        node = self.permute(term, outer + inner).node
        if len(inner) == 1:
            return node
        sizes = node.meta["val"].shape
        last = 1
        for size in sizes[len(outer) :]:
            last = last * size
        return self._reshape(node, [*sizes[: len(outer)], last])

    def _reshape(self, node: fx.Node, shape: list[Any]) -> fx.Node:
        """NOTE at most one size is symbolic: it is written -1, which needs no node for the number of tokens."""
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) > 1:
            raise refuse(Refusal.LENGTH, "an einsum joins several dimensions of unknown size", self.at)
        return self.emit(aten.reshape.default, node, sizes)

    def _by_matrix(self, a: _Term, b: _Term, left: str, summed: str, right: str) -> _Term:
        """a [left.., K] @ b [K, N] for a matrix b of known size; N is split again."""
        rows = self._merged(a, left, summed)
        matrix = self._merged(b, right, summed)  # [right.., K]
        sizes = [b.size(x) for x in right]
        if len(right) != 1:
            count = 1
            for size in sizes:
                count *= size
            matrix = self.emit(aten.reshape.default, matrix, [count, matrix.meta["val"].shape[-1]])
        product = self.emit(aten.matmul.default, rows, self.emit(aten.permute.default, matrix, [1, 0]))
        if len(right) != 1:
            product = self._split_last(product, sizes)
        return _Term(product, left + right)

    def _split_last(self, node: fx.Node, sizes: list[int]) -> fx.Node:
        if not sizes:
            return self.emit(aten.squeeze.dims, node, [node.meta["val"].dim() - 1])
        return self.emit(aten.unflatten.int, node, node.meta["val"].dim() - 1, sizes)

    def _by_batches(self, a: _Term, b: _Term, batch: str, left: str, summed: str, right: str) -> _Term:
        """matmul of [batch.., left.., 1.., row, K] and [batch.., 1.., right.., K, column]."""
        row, column = left[-1:], right[-1:]
        outer_left, outer_right = left[:-1], right[:-1]
        x = self._merged(a, batch + outer_left + row, summed)
        y = self._merged(b, batch + outer_right + column, summed)
        for i in range(len(outer_right)):
            x = self.emit(aten.unsqueeze.default, x, len(batch + outer_left) + i)
        for i in range(len(outer_left)):
            y = self.emit(aten.unsqueeze.default, y, len(batch) + i)
        if not row:
            x = self.emit(aten.unsqueeze.default, x, -2)
        if not column:
            y = self.emit(aten.unsqueeze.default, y, -2)
        product = self.emit(aten.matmul.default, x, self.emit(aten.transpose.int, y, -2, -1))
        rank = product.meta["val"].dim()
        gone = ([] if row else [rank - 2]) + ([] if column else [rank - 1])
        if gone:
            product = self.emit(aten.squeeze.dims, product, gone)
        return _Term(product, batch + outer_left + outer_right + row + column)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
