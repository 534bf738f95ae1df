"""Ops that are another one under their own name: hstack and the like are `cat`, tile is `repeat`, norms are norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState

aten = torch.ops.aten


def spell_other_name(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a call of such an op to what it is; False for anything else."""
    rule = _NAMES.get(op_name(node))
    new = None if rule is None else rule(state, node)
    if new is None:
        return False
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    return True


_Rule = Callable[[GraphState, fx.Node], fx.Node | None]


def _stack(dim: int) -> _Rule:
    def rule(state: GraphState, node: fx.Node) -> fx.Node | None:
        parts: Any = node.args[0]
        if any(_rank(part) < max(dim + 1, 2) for part in parts):
            return None  # they get another dimension first
        return state.call(aten.cat.default, (parts, dim), like=node)

    return rule


def _flip(dim: int) -> _Rule:
    return lambda state, node: state.call(aten.flip.default, (node.args[0], [dim]), like=node)


def _tile(state: GraphState, node: fx.Node) -> fx.Node:
    """Fewer numbers than dimensions are those of the last ones."""
    times: Any = argument(node, "dims")
    times = [1] * (_rank(node) - len(times)) + list(times)
    return state.call(aten.repeat.default, (node.args[0], times), like=node)


def _norm(state: GraphState, node: fx.Node) -> fx.Node | None:
    """Along one dimension it is a vector's, whatever its order."""
    dim, order = argument(node, "dim"), argument(node, "ord")
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    if len(dims) != 1 or dims[0] is None or isinstance(order, str) or argument(node, "dtype") is not None:
        return None
    args = (node.args[0], 2 if order is None else order, dims, bool(argument(node, "keepdim")))
    return state.call(aten.linalg_vector_norm.default, args, like=node)


def _distance(state: GraphState, node: fx.Node) -> fx.Node:
    """|a - b + eps| along the last dimension."""
    gap = state.call(aten.sub.Tensor, (node.args[0], node.args[1]), like=node)
    moved = state.call(aten.add.Scalar, (gap, argument(node, "eps")), like=node)
    args = (moved, argument(node, "p"), [-1], bool(argument(node, "keepdim")))
    return state.call(aten.linalg_vector_norm.default, args, like=node)


def _leaky(state: GraphState, node: fx.Node) -> fx.Node | None:
    """The slope that is drawn in training is the mean of its bounds otherwise."""
    if argument(node, "training"):
        return None
    slope = (argument(node, "lower") + argument(node, "upper")) / 2
    return state.call(aten.leaky_relu.default, (node.args[0], slope), like=node)


def _rank(node: Any) -> int:
    rank: int = node.meta["val"].dim()
    return rank


_NAMES: dict[str, _Rule] = {
    "aten.hstack": _stack(1),
    "aten.column_stack": _stack(1),
    "aten.vstack": _stack(0),
    "aten.row_stack": _stack(0),
    "aten.dstack": _stack(2),
    "aten.fliplr": _flip(1),
    "aten.flipud": _flip(0),
    "aten.tile": _tile,
    "aten.linalg_norm": _norm,
    "aten.pairwise_distance": _distance,
    "aten.rrelu": _leaky,
}
