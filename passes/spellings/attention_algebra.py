"""One spelling of attention's linear algebra: factors of scores move to the queries, factors of weights to the output.

(q k^T) * s          ->  (q * s) k^T            for a factor s of each head or query
(w1 - c * w2) v      ->  w1 v - c * (w2 v)      (differential attention, arXiv 2410.05258)
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten

_SOFTMAXES = ("aten.softmax", "aten._softmax", "aten._safe_softmax")


def spell_score_factor(state: GraphState, node: fx.Node) -> bool:
    """Rewrite scores times (or over) a tensor that is the same for all keys; numbers stay where they are."""
    name = op_name(node)
    if name not in ("aten.mul", "aten.div") or argument(node, "rounding_mode") is not None:
        return False
    scores, factor = node.args
    if name == "aten.mul" and not _is_scores(state, scores):
        scores, factor = factor, scores
    if not _is_scores(state, scores) or not isinstance(factor, fx.Node) or not _same_for_all_keys(factor):
        return False
    a, b = scores.args[:2]
    if len(shape_of(factor)) > len(shape_of(scores)):
        return False
    product = state.call(node.target, (a, factor), like=node)
    if product.meta["val"].dtype != scores.meta["val"].dtype:
        return False
    result = state.call(aten.matmul.default, (product, b), like=node)
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)
    return True


def spell_weight_sum(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a product of combined attention weights with values to the combination of the products."""
    if op_name(node) != "aten.matmul" or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    weights: Any = node.args[0]
    if op_name(weights) in _SOFTMAXES or not _combines(weights):
        return False
    result = _distributed(state, weights, node.args[1], node)
    if shape_of(result) != shape_of(node):
        return False
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)
    return True


def spell_constant_keys(state: GraphState, node: fx.Node) -> bool:
    """Rewrite attention to keys whose number is known, and is not the tokens', to the products that it is."""
    if op_name(node) != "aten.scaled_dot_product_attention":
        return False
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    sized = [s for x in (k, v) for s in shape_of(x)]
    if any(not s.is_Integer for s in sized) or argument(node, "attn_mask") is not None or argument(node, "is_causal"):
        return False
    if argument(node, "dropout_p") or argument(node, "enable_gqa") or any(_reads(state.tokens, x) for x in (k, v)):
        return False
    scale = argument(node, "scale")
    scale = 1.0 / math.sqrt(int(shape_of(q)[-1])) if scale is None else scale
    keys = state.call(aten.transpose.int, (k, -2, -1), like=node)
    scores = state.call(aten.matmul.default, (state.call(aten.mul.Tensor, (q, scale), like=node), keys), like=node)
    weights = state.call(aten.softmax.int, (scores, -1), like=node)
    result = state.call(aten.matmul.default, (weights, v), like=node)
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)
    return True


def _reads(name: str, node: fx.Node) -> bool:
    """Whether a node is computed from the input called `name`; a cache of the model's own is, from the tokens."""
    stack, seen = [node], {node}
    while stack:
        here = stack.pop()
        if here.name == name:
            return True
        stack += [a for a in here.all_input_nodes if a not in seen]
        seen.update(here.all_input_nodes)
    return False


def _is_scores(state: GraphState, node: Any) -> bool:
    """A product of tokens by tokens."""
    if not isinstance(node, fx.Node) or op_name(node) not in ("aten.matmul", "aten.bmm"):
        return False
    shape = shape_of(node)
    return len(shape) >= 3 and shape[-1] == shape[-2] == state.length


def _same_for_all_keys(node: fx.Node) -> bool:
    shape = shape_of(node)
    return bool(shape) and shape[-1] == 1 and sympy.Mul(*shape) != 1


def _combines(node: Any) -> bool:
    """Whether this is a sum, difference or multiple of softmaxes' results, by factors that all keys share."""
    if not isinstance(node, fx.Node):
        return False
    name = op_name(node)
    if name in _SOFTMAXES:
        return True
    if name not in ("aten.add", "aten.sub", "aten.mul", "aten.div"):
        return False
    if argument(node, "alpha", 1) != 1 or argument(node, "rounding_mode") is not None:
        return False
    a, b = node.args[:2]
    if name in ("aten.add", "aten.sub"):
        return _combines(a) and _combines(b)
    if name == "aten.mul":
        return (_combines(a) and _is_factor(b)) or (_combines(b) and _is_factor(a))
    return _combines(a) and _is_factor(b)


def _is_factor(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return True
    return isinstance(value, fx.Node) and (not shape_of(value) or shape_of(value)[-1] == 1)


def _distributed(state: GraphState, weights: Any, values: Any, at: fx.Node) -> fx.Node:
    name = op_name(weights)
    if name in _SOFTMAXES:
        return state.call(aten.matmul.default, (weights, values), like=at)
    a, b = weights.args[:2]
    if name in ("aten.add", "aten.sub"):
        pair = (_distributed(state, a, values, at), _distributed(state, b, values, at))
        return state.call(weights.target, pair, like=at)
    if name == "aten.mul" and not _combines(a):
        a, b = b, a
    return state.call(weights.target, (_distributed(state, a, values, at), b), like=at)
