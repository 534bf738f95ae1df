"""One spelling of attention weights that are cleaned or normalised again after their softmax.

    where(isnan(p), 0, p)                       p
    p * m / sum(p * m), exp(s) * m / sum(exp(s) * m)      softmax(s + log m)
    p * m / (sum(p * m) + eps), p * m / max(sum(p * m), eps)    p * m / (1 + eps), p * m

for weights p = softmax(s) of tokens by tokens. Each query of a decoder sees itself, so no weight is NaN; in the last
line p * m sums to 1 where m hides what is hidden already, which the reader of attention asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState
from .softmax import is_sum

aten = torch.ops.aten

_SOFTMAXES = ("aten.softmax", "aten._softmax", "aten._safe_softmax")
_CHANGES = ("aten.mul", "aten.masked_fill", "aten.where", "aten.tril", "aten.nan_to_num", "aten._to_copy")


def spell_weights(state: GraphState, node: fx.Node) -> bool:
    """Rewrite cleaned or renormalised weights; False for anything else."""
    name = op_name(node)
    if name in ("aten.where", "aten.masked_fill"):
        new = _without_nan(state, node)
    elif name == "aten.div" and argument(node, "rounding_mode") is None:
        new = _normalised(state, node)
    else:
        return False
    if new is None:
        return False
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    return True


def _over_tokens(state: GraphState, node: Any) -> bool:
    shape = shape_of(node)
    return len(shape) >= 2 and shape[-1] == shape[-2] == state.length


def root_softmax(node: Any) -> fx.Node | None:
    """The softmax whose weights these are, some of them set to 0."""
    while isinstance(node, fx.Node) and op_name(node) not in _SOFTMAXES:
        if op_name(node) not in _CHANGES:
            return None
        if op_name(node) == "aten.mul" and any(map(is_factor, node.args)):
            return None
        inner = [a for a in node.all_input_nodes if root_softmax(a) is not None]
        if len(inner) != 1:
            return None
        node = inner[0]
    return node if isinstance(node, fx.Node) else None


def is_factor(value: Any) -> bool:
    """Whether an operand is the same for all keys."""
    if isinstance(value, (int, float)):
        return True
    return isinstance(value, fx.Node) and (not shape_of(value) or shape_of(value)[-1] == 1)


def _without_nan(state: GraphState, node: fx.Node) -> fx.Node | None:
    if op_name(node) == "aten.where":
        condition, other, weights = (argument(node, n) for n in ("condition", "self", "other"))
        if isinstance(condition, fx.Node) and op_name(condition) in ("aten.logical_not", "aten.bitwise_not"):
            condition, other, weights = condition.args[0], weights, other
    else:
        weights, condition, other = node.args[:3]
    if not isinstance(condition, fx.Node) or op_name(condition) != "aten.isnan" or condition.args[0] is not weights:
        return None
    if not isinstance(weights, fx.Node) or not _over_tokens(state, weights) or root_softmax(weights) is None:
        return None
    return weights if shape_of(weights) == shape_of(node) else None


def _normalised(state: GraphState, node: fx.Node) -> fx.Node | None:
    top, below = node.args[:2]
    if not isinstance(top, fx.Node) or not isinstance(below, fx.Node) or not _over_tokens(state, top):
        return None
    if is_sum(below, top):
        return _with_logarithm(state, top, node) or (top if op_name(top) in _SOFTMAXES else None)
    if root_softmax(top) is None:
        return None
    if op_name(below) in ("aten.clamp", "aten.clamp_min") and is_sum(below.args[0], top):
        least = argument(below, "min")
        bounded = isinstance(least, (int, float)) and least <= 1 and argument(below, "max") is None
        return top if bounded else None
    if op_name(below) == "aten.add" and is_sum(below.args[0], top) and argument(below, "alpha") == 1:
        extra = below.args[1]
        if isinstance(extra, (int, float)):
            return top if 1 + extra == 1 or extra < 5e-8 else state.call(aten.div.Tensor, (top, 1 + extra), like=node)
    return None


def _with_logarithm(state: GraphState, top: fx.Node, at: fx.Node) -> fx.Node | None:
    """softmax(s + log m) of p * m or exp(s) * m, whose sum it is divided by."""
    if op_name(top) != "aten.mul":
        return None
    for weights, mask in (top.args[:2], top.args[1::-1]):
        if not isinstance(weights, fx.Node) or not isinstance(mask, fx.Node):
            continue
        if op_name(weights) in _SOFTMAXES and argument(weights, "dim") in (-1, len(shape_of(weights)) - 1):
            scores: Any = weights.args[0]
        elif op_name(weights) == "aten.exp":
            scores = weights.args[0]
        else:
            continue
        dtype = scores.meta["val"].dtype
        if mask.meta["val"].dtype != dtype:
            mask = state.call(aten._to_copy.default, (mask,), {"dtype": dtype}, like=at)
        hidden = state.call(aten.log.default, (mask,), like=at)
        seen = state.call(aten.add.Tensor, (scores, hidden), like=at)
        return state.call(aten.softmax.int, (seen, -1), like=at)
    return None
