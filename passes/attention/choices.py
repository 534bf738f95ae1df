"""Keys that an indexer chooses by content, read from the mask that hides the others (`ir.chosen_attention`).

    seen & scatter(topk(scores behind a mask of their own, min(chosen, T)))

where scores are an indexer's: products of its queries and keys, rectified, weighted by head and added up. How queries,
keys and weights are made is no matter here: token locality proves that each token makes its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..framework.state import GraphState

aten = torch.ops.aten

_AND, _NOT = ("aten.__and__", "aten.bitwise_and", "aten.logical_and"), ("aten.bitwise_not", "aten.logical_not")


@dataclass(frozen=True)
class Choice:
    """What is left of a mask without its choice, and the indexer's arguments as `treespec::attention` has them."""

    mask: fx.Node | None
    index: dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    """Which of the tokens a query sees: what was chosen by `topk`; `mask`: and what this says."""

    topk: fx.Node
    mask: fx.Node | None


class ChoiceReader:
    """Reads masks [1, 1, T, T] of bool. Nodes that it makes are dead code if the attempt fails."""

    def __init__(self, state: GraphState, forms: ClosedForms, at: fx.Node) -> None:
        self.state, self.forms, self.at = state, forms, at
        self.square = (sympy.Integer(1), state.length, state.length)

    def read(self, mask: fx.Node) -> Choice | None:
        kept = self._kept(mask, True)
        index = None if kept is None else self._index(kept.topk)
        return None if kept is None or index is None else Choice(kept.mask, index)

    def _depends(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.forms.tainted

    def _emit(self, op: Any, *args: Any) -> fx.Node:
        return self.state.call(op, args, like=self.at)

    def _kept(self, node: Any, when: bool) -> _Kept | None:
        """Where `node == when`, as a choice and a mask of positions; None: it is no such thing."""
        name = op_name(node) if self._depends(node) else ""
        if name in _NOT:
            return self._kept(node.args[0], not when)
        if name == "aten.unsqueeze" and len(shape_of(node.args[0])) == 3 and node.args[1] == 1:
            return self._kept(node.args[0], when)
        if name in _AND and when and node.meta["val"].dtype is torch.bool:
            parts = node.args[:2]
            chosen = [p for p in parts if self._depends(p)]
            found = self._kept(chosen[0], True) if len(chosen) == 1 else None
            if found is None:
                return None
            other: Any = next(p for p in parts if p is not chosen[0])
            return _Kept(
                found.topk, other if found.mask is None else self._emit(aten.logical_and.default, found.mask, other)
            )
        return self._scattered(node, when) if name == "aten.scatter" else None

    def _scattered(self, node: fx.Node, when: bool) -> _Kept | None:
        """A table of one truth, with the other one where a token was chosen."""
        table, index, value = argument(node, "self"), argument(node, "index"), argument(node, "value", None)
        form = None if self._depends(table) else self.forms.of(table)
        if form is None or shape_of(node) != self.square or argument(node, "dim") not in (-1, 2):
            return None
        if value is not when or form.expr != (sympy.false if when else sympy.true):
            return None
        while op_name(index) == "aten._to_copy" and index.meta["val"].dtype in (torch.int32, torch.int64):
            index = index.args[0]
        chosen = index.args[0] if op_name(index) == "getitem" and index.args[1] == 1 else None
        return _Kept(chosen, None) if chosen is not None and op_name(chosen) == "aten.topk" else None

    def _index(self, topk: fx.Node) -> dict[str, Any] | None:
        count, scores = argument(topk, "k"), argument(topk, "self")
        chosen = _at_most(count, self.state.length)
        if chosen is None or argument(topk, "dim") not in (-1, 2) or not argument(topk, "largest"):
            return None
        masked = self._masked(scores)
        summed = None if masked is None else self._summed(masked[0])
        if masked is None or summed is None:
            return None
        return {**summed, "index_mask": masked[1], "chosen": chosen}

    def _masked(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Scores that are minus infinity where a mask of positions hides, and where it does not."""
        if op_name(node) != "aten.masked_fill" or argument(node, "value") != -math.inf or shape_of(node) != self.square:
            return None
        hidden = argument(node, "mask")
        if self._depends(hidden):
            return None
        return argument(node, "self"), self._emit(aten.logical_not.default, hidden)

    def _summed(self, node: fx.Node) -> dict[str, Any] | None:
        """weights [1, T, 1, H] @ relu(scale * q [1, T, H, D] @ k [1, 1, D, T])."""
        node = _behind(node, "aten.squeeze")
        if op_name(node) != "aten.matmul" or shape_of(node) != (1, self.state.length, 1, self.state.length):
            return None
        weights, rectified = node.args[:2]
        if op_name(rectified) != "aten.relu" or not isinstance(weights, fx.Node):
            return None
        product: Any = rectified.args[0]
        scale = 1.0
        if op_name(product) == "aten.mul" and isinstance(product.args[1], (int, float)):
            product, scale = product.args[0], float(product.args[1])
        if op_name(product) != "aten.matmul":
            return None
        q, transposed = product.args[:2]
        k = _behind(transposed, "aten.unsqueeze", "aten._to_copy", "aten.transpose", "aten.squeeze", until=self._keys)
        if not self._keys(k) or len(shape_of(q)) != 4 or shape_of(q)[:2] != (1, self.state.length):
            return None
        if shape_of(weights) != (1, self.state.length, 1, shape_of(q)[2]) or not all(
            map(self._depends, (q, weights, k))
        ):
            return None
        if shape_of(transposed) != (1, 1, shape_of(k)[2], self.state.length):
            return None
        weights = self._emit(aten.squeeze.dim, weights, 2)
        return {"index_q": q, "index_k": k, "index_weights": weights, "index_scale": scale}

    def _keys(self, node: fx.Node) -> bool:
        """Whether [1, T, D]."""
        shape = shape_of(node)
        return len(shape) == 3 and shape[:2] == (1, self.state.length) and shape[2].is_Integer


def _behind(node: Any, *names: str, until: Callable[[fx.Node], bool] = lambda node: False) -> Any:
    """What these ops, which move or widen numbers alone, were given."""
    while op_name(node) in names and not until(node):
        before = node.args[0]
        if op_name(node) == "aten._to_copy" and not _widens(before, node):
            break
        node = before
    return node


def _widens(before: fx.Node, after: fx.Node) -> bool:
    a, b = before.meta["val"].dtype, after.meta["val"].dtype
    return a.is_floating_point and b.is_floating_point and torch.promote_types(a, b) == b


def _at_most(count: Any, length: sympy.Symbol) -> int | None:
    """n of min(n, T)."""
    value = count.meta["val"] if isinstance(count, fx.Node) else count
    expr = value.node.expr if isinstance(value, torch.SymInt) else None
    if not isinstance(expr, sympy.Basic) or expr.func.__name__ != "Min" or length not in expr.args:
        return None
    numbers = [int(a) for a in expr.args if a != length and a.is_Integer]
    return numbers[0] if len(numbers) == 1 == len(expr.args) - 1 else None
