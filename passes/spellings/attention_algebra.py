"""One spelling of attention's linear algebra: factors of scores move to the queries.

(q k^T) * s          ->  (q * s) k^T            for a factor s of each head or query
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten


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
    """A product of tokens by tokens, and by what stands beside them."""
    if not isinstance(node, fx.Node) or op_name(node) not in ("aten.matmul", "aten.bmm"):
        return False
    shape = shape_of(node)
    return len(shape) >= 3 and all((s - state.length).is_Integer for s in shape[-2:])


def _same_for_all_keys(node: fx.Node) -> bool:
    if not isinstance(node.meta.get("val"), Tensor):
        return False  # a number that is computed from the number of tokens
    shape = shape_of(node)
    return bool(shape) and shape[-1] == 1 and sympy.Mul(*shape) != 1
