"""One spelling of scores that are a sum of products: q k^T + r s^T becomes [q, r] [k, s]^T.

DeepSeek's latent attention adds the scores of rotated parts to those of latent parts (arXiv 2405.04434, section 2.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten


def spell_score_sum(state: GraphState, node: fx.Node) -> bool:
    """Rewrite the sum of two products of tokens by tokens, each perhaps permuted alike, to one product."""
    if op_name(node) != "aten.add" or argument(node, "alpha") != 1:
        return False
    one, other = node.args[:2]
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return False
    order: Any = None
    if op_name(one) == op_name(other) == "aten.permute" and list(one.args[1]) == list(other.args[1]):
        order = one.args[1]
        one, other = one.args[0], other.args[0]
    if not _is_score(state, one) or not _is_score(state, other) or shape_of(one) != shape_of(other):
        return False
    (a, b), (c, d) = one.args[:2], other.args[:2]
    batch = [int(s) for s in shape_of(one)[:-2]]
    left = state.call(aten.cat.default, ([_wide(state, x, batch, node) for x in (a, c)], -1), like=node)
    right = state.call(aten.cat.default, ([_wide(state, x, batch, node) for x in (b, d)], -2), like=node)
    result = state.call(aten.matmul.default, (left, right), like=node)
    if order is not None:
        result = state.call(aten.permute.default, (result, order), like=node)
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)
    return True


def _is_score(state: GraphState, node: Any) -> bool:
    if not isinstance(node, fx.Node) or op_name(node) != "aten.matmul" or len(shape_of(node)) < 3:
        return False
    shape = shape_of(node)
    inner = shape_of(node.args[0])[-1]
    return shape[-1] == shape[-2] == state.length and inner.is_Integer and all(s.is_Integer for s in shape[:-2])


def _wide(state: GraphState, node: Any, batch: list[int], at: fx.Node) -> fx.Node:
    """The operand with all batch dimensions."""
    if [int(s) for s in shape_of(node)[:-2]] == batch:
        return node
    return state.call(aten.expand.default, (node, [*batch, -1, -1]), like=at)
