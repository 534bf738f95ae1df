"""Keys that an indexer chooses by content, read from the mask that hides the others (`ir.chosen_attention`).

    seen & scatter(topk(scores behind a mask of their own, min(chosen, T)))

where scores are an indexer's: products of its queries and keys, rectified, weighted by head and added up; or whole
blocks of keys (`block_choices`). The mask may be one that is added, of 0 and of what hides. How queries, keys and
weights are made is no matter here: token locality proves that each token makes its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..forms.patterns import HIDDEN
from ..framework.state import GraphState
from .block_choices import block_index
from .choice_parts import ChoiceParts, at_most, behind, scaled, topk_of

aten = torch.ops.aten

_AND, _NOT = ("aten.__and__", "aten.bitwise_and", "aten.logical_and"), ("aten.bitwise_not", "aten.logical_not")


@dataclass(frozen=True)
class Choice:
    """What is left of a mask without its choice, and the indexer's arguments as `treespec::attention` has them."""

    mask: fx.Node | None
    index: dict[str, Any]


class ChoiceReader(ChoiceParts):
    """Reads masks [1, heads, T, T]: bool, or numbers that are added to scores."""

    def __init__(self, state: GraphState, forms: ClosedForms, at: fx.Node) -> None:
        super().__init__(state, forms, at)
        self.square = (sympy.Integer(1), state.length, state.length)

    def read(self, mask: fx.Node) -> Choice | None:
        return self._kept(mask, True) if mask.meta["val"].dtype is torch.bool else self._added(mask)

    def _added(self, node: fx.Node) -> Choice | None:
        """0 where a choice and a mask of positions let a key be seen, and what hides it elsewhere."""
        value = argument(node, "value") if op_name(node) == "aten.masked_fill" else None
        if not isinstance(value, (int, float)) or value > HIDDEN or self.depends(argument(node, "self")):
            return None
        kept = self._kept(argument(node, "mask"), False)
        form = self.forms.of(argument(node, "self"))
        if kept is None or form is None or form.is_bool or form.expr != 0:
            return None
        return kept

    def _kept(self, node: Any, when: bool) -> Choice | None:
        """Where `node == when`, as a choice and a mask of positions; None: it is no such thing."""
        name = op_name(node) if self.depends(node) else ""
        if name in _NOT:
            return self._kept(node.args[0], not when)
        if name == "aten.unsqueeze" and len(shape_of(node.args[0])) == 3 and node.args[1] == 1:
            return self._kept(node.args[0], when)
        if name in _AND and when and node.meta["val"].dtype is torch.bool:
            parts = node.args[:2]
            chosen = [p for p in parts if self.depends(p)]
            found = self._kept(chosen[0], True) if len(chosen) == 1 else None
            if found is None:
                return None
            other: Any = next(p for p in parts if p is not chosen[0])
            mask = other if found.mask is None else self.emit(aten.logical_and.default, found.mask, other)
            return Choice(mask, found.index)
        if name in ("aten.slice", "aten.repeat_interleave") and when:
            blocks = block_index(self, node)
            return None if blocks is None else Choice(None, blocks)
        return self._scattered(node, when) if name == "aten.scatter" else None

    def _scattered(self, node: fx.Node, when: bool) -> Choice | None:
        """A table of one truth, with the other one where a token was chosen."""
        table, index, value = argument(node, "self"), argument(node, "index"), argument(node, "value", None)
        form = None if self.depends(table) else self.forms.of(table)
        if form is None or shape_of(node) != self.square or argument(node, "dim") not in (-1, 2):
            return None
        if value is not when or form.expr != (sympy.false if when else sympy.true):
            return None
        while op_name(index) == "aten._to_copy" and index.meta["val"].dtype in (torch.int32, torch.int64):
            index = index.args[0]
        topk = topk_of(index, 1)
        found = None if topk is None else self._index(topk)
        return None if found is None else Choice(None, found)

    def _index(self, topk: fx.Node) -> dict[str, Any] | None:
        chosen = at_most(argument(topk, "k"), self.state.length)
        masked = None if chosen is None else self.hidden_behind(argument(topk, "self"), self.square)
        summed = None if masked is None else self._summed(masked[0])
        if masked is None or summed is None:
            return None
        return {**summed, "index_mask": masked[1], "chosen": chosen}

    def _summed(self, node: fx.Node) -> dict[str, Any] | None:
        """weights [1, T, 1, H] @ relu(scale * q [1, T, H, D] @ k [1, 1, D, T])."""
        node = behind(node, "aten.squeeze")
        if op_name(node) != "aten.matmul" or shape_of(node) != (1, self.state.length, 1, self.state.length):
            return None
        weights, rectified = node.args[:2]
        if op_name(rectified) != "aten.relu" or not isinstance(weights, fx.Node):
            return None
        product, scale = scaled(rectified.args[0])
        if op_name(product) != "aten.matmul":
            return None
        q, transposed = product.args[:2]
        k = behind(transposed, "aten.unsqueeze", "aten._to_copy", "aten.transpose", "aten.squeeze", until=self._keys)
        if not self._keys(k) or len(shape_of(q)) != 4 or shape_of(q)[:2] != (1, self.state.length):
            return None
        if shape_of(weights) != (1, self.state.length, 1, shape_of(q)[2]) or not all(
            map(self.depends, (q, weights, k))
        ):
            return None
        if shape_of(transposed) != (1, 1, shape_of(k)[2], self.state.length):
            return None
        weights = self.emit(aten.squeeze.dim, weights, 2)
        return {"index_q": q, "index_k": k, "index_weights": weights, "index_scale": scale}

    def _keys(self, node: fx.Node) -> bool:
        """Whether [1, T, D]."""
        shape = shape_of(node)
        return len(shape) == 3 and shape[:2] == (1, self.state.length) and shape[2].is_Integer
