"""Pieces of a value where there is one, and ranges whose steps are whole numbers in floating point."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState
from .sizes import refresh

aten = torch.ops.aten

_CUTS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")


def spell_only_piece(state: GraphState, node: fx.Node) -> bool:
    """Rewrite the only piece of a value, `x.split(512)[0]` of no more than 512 rows, to the value, and
    a `cat` of one."""
    whole: Any = None
    if op_name(node) == "aten.cat" and len(node.args[0]) == 1:
        whole = node.args[0][0]
    elif node.target is operator.getitem and node.args[1] == 0:
        cut: Any = node.args[0]
        whole = cut.args[0] if op_name(cut) in _CUTS and len(cut.meta["val"]) == 1 else None
    if whole is None or whole.meta["val"].dtype != node.meta["val"].dtype:
        return False
    node.replace_all_uses_with(whole)
    state.graph.erase_node(node)
    return True


def spell_whole_steps(state: GraphState, node: fx.Node) -> bool:
    """Rewrite `arange(T - 1, -1, -1.0)`, whose length is T in a roundabout way, to steps of -1."""
    if node.target is not aten.arange.start_step:
        return False
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    if not isinstance(step, float) or not step.is_integer() or isinstance(start, float) or isinstance(end, float):
        return False
    kind = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
    new = state.call(aten.arange.start_step, (start, end, int(step)), kind, like=node)
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    refresh(state, new)
    return True
