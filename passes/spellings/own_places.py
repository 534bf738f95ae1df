"""Rows that are picked by 0, 1, .. T - 1 out of T: `cos[position_ids]` of a table that was computed for T places."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten

_MOVES = ("aten.view", "aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.alias", "aten.contiguous")


def spell_own_places(state: GraphState, node: fx.Node) -> bool:
    """Rewrite such a pick to the rows, with the dimensions of one that the index has beside them."""
    if op_name(node) != "aten.index":
        return False
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    used = [i for i, index in enumerate(indices) if index is not None]
    if len(used) != 1 or shape_of(source)[used[0]] != state.length or not _counts(state, indices[used[0]]):
        return False
    index: Any = indices[used[0]]
    at = shape_of(index).index(state.length)
    for i in range(len(shape_of(index))):
        if i != at:
            source = state.call(aten.unsqueeze.default, (source, used[0] + i), like=node)
    if shape_of(source) != shape_of(node):
        return False
    node.replace_all_uses_with(source)
    state.graph.erase_node(node)
    return True


def _counts(state: GraphState, index: Any) -> bool:
    """Whether an index is 0, 1, .. T - 1, in whatever dimension."""
    if not isinstance(index, fx.Node) or index.meta["val"].dtype is not torch.int64:
        return False
    if [s for s in shape_of(index) if s != 1] != [state.length]:
        return False
    while op_name(index) in _MOVES and index.meta["val"].dtype is torch.int64:
        index = index.args[0]
    if index.op == "placeholder":
        return index.name in state.position_inputs
    whole = op_name(index) == "aten.arange" and index.meta["val"].dtype is torch.int64
    return whole and argument(index, "start", 0) == 0 and argument(index, "step", 1) == 1
