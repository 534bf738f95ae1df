"""scaled_dot_product_attention over operands that are not [1, heads, T, D], written out as products and a softmax.

The dimensions in front are then followed by `layout`, as those of scores that a model writes out itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten


def write_out(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a call with operands of other ranks, or with another batch than 1; False where it is left as it is."""
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    shapes = [shape_of(x) for x in (q, k, v)]
    if all(len(s) == 4 and s[0] == 1 for s in shapes) or argument(node, "dropout_p") or argument(node, "enable_gqa"):
        return False
    if any(len(s) < 2 or s[-2] != state.length for s in shapes):
        return False
    scale = argument(node, "scale")
    scale = 1.0 / math.sqrt(int(shapes[0][-1])) if scale is None else scale
    if not isinstance(scale, (int, float)):
        return False

    def emit(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return state.call(op, args, kwargs, like=node)

    scores = emit(aten.mul.Tensor, emit(aten.matmul.default, q, emit(aten.transpose.int, k, -2, -1)), scale)
    mask = argument(node, "attn_mask")
    if argument(node, "is_causal"):
        length = emit(aten.sym_size.int, state.node(state.tokens), 1)
        kind = {"dtype": torch.bool, "device": q.meta["val"].device}
        mask = emit(aten.tril.default, emit(aten.ones.default, [length, length], **kind))
    if mask is not None and mask.meta["val"].dtype is torch.bool:
        scores = emit(aten.masked_fill.Scalar, scores, emit(aten.logical_not.default, mask), -math.inf)
    elif mask is not None:
        scores = emit(aten.add.Tensor, scores, mask)
    new = emit(aten.matmul.default, emit(aten.softmax.int, scores, -1), v)
    if shape_of(new) != shape_of(node):
        return False
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    return True
