"""treeify: positions come from the tree. Every position, table slice and rope reads prefix + depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.inputs import POSITIONS
from treespec_compiler.ir.provenance import op_name, source_line
from treespec_compiler.ir.specs import Limit, PositionSpec

from .forms.closed_form import shape_of
from .forms.positions import Cut, position_cut, table_limits
from .framework.manager import Pass
from .framework.state import GraphState

aten = torch.ops.aten


def treeify(state: GraphState) -> int:
    """Replace the cut by reads of a new input `positions` [T] int64. Returns how many nodes were replaced."""
    cut = position_cut(state)
    for node, offset, limit in table_limits(state):
        reader = source_line(node) or op_name(node)
        state.limits.append(Limit(limit, f"position table read at {reader}"))
        if offset is not None:
            state.positions.append(PositionSpec(offset, limit, reader))
    example = state.node(state.tokens).meta["val"]
    positions = state.add_input(POSITIONS, torch.zeros(2, dtype=torch.int64, device=example.device))
    with state.fake_mode:
        positions.meta["val"] = torch.empty(example.shape[1], dtype=torch.int64, device=example.device)
    matches = 0
    for node, what in cut.items():
        if what.kind == "constant":
            if what.number is None:
                continue
            new = _constant(state, node, what, positions)
        elif what.kind == "position":
            new = _position(state, node, what, positions)
        else:
            new = _table(state, node, what, positions)
        node.replace_all_uses_with(new)
        matches += 1
    return matches


def _shifted(state: GraphState, node: fx.Node, what: Cut, positions: fx.Node) -> fx.Node:
    return state.call(aten.add.Tensor, (positions, what.offset), like=node) if what.offset else positions


def _position(state: GraphState, node: fx.Node, what: Cut, positions: fx.Node) -> fx.Node:
    """positions [T] -> the node's shape and dtype."""
    value = node.meta["val"]
    # NOTE nothing may stand in front of the inputs; a positions argument is an input itself.
    like = node if node.op == "call_function" else next(n for n in state.graph.nodes if n.op == "call_function")
    new = _shifted(state, like, what, positions)
    rank, at = value.dim(), what.at or 0
    if rank != 1:
        length: Any = state.call(aten.sym_size.int, (positions, 0), like=like)
        new = state.call(aten.reshape.default, (new, [length if i == at else 1 for i in range(rank)]), like=like)
        if any(i != at and s != 1 for i, s in enumerate(shape_of(node))):
            sizes = [length if i == at else int(s) for i, s in enumerate(shape_of(node))]
            new = state.call(aten.expand.default, (new, sizes), like=like)
    if value.dtype != torch.int64:
        new = state.call(aten._to_copy.default, (new,), {"dtype": value.dtype}, like=like)
    if not state.positions:
        state.positions.append(PositionSpec(what.offset, None, source_line(node) or op_name(node)))
    return new


def _constant(state: GraphState, node: fx.Node, what: Cut, positions: fx.Node) -> fx.Node:
    """The same number for every token, in the node's shape and dtype."""
    length: Any = state.call(aten.sym_size.int, (positions, 0), like=node)
    sizes = [length if i == what.at else int(s) for i, s in enumerate(shape_of(node))]
    kind = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
    return state.call(aten.full.default, (sizes, what.number), kind, like=node)


def _table(state: GraphState, node: fx.Node, what: Cut, positions: fx.Node) -> fx.Node:
    """table[..., c : c + T, ...] -> table read at positions + c."""
    table: Any = node.args[0]
    size, reader = int(shape_of(table)[what.at or 0]), source_line(node) or op_name(node)
    state.limits.append(Limit(size - what.offset, f"position table read at {reader}"))
    state.positions.append(PositionSpec(what.offset, size - what.offset, reader))
    return state.call(aten.index_select.default, (table, what.at, _shifted(state, node, what, positions)), like=node)


PASS = Pass(
    "treeify",
    treeify,
    before="classified, token-local graph",
    after="positions are an input; no value counts the tokens of the sequence",
    level="treeified",
    needs=("discharge guards",),
)
