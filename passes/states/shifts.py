"""Tokens that are moved back by a few places, zeros in front: a convolution with one tap (RWKV's token shift).

y[t] = x[t - n] is what `F.pad` by n in front and -n behind gives, or zeros joined with all tokens but the last n.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir import ops
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..framework.state import GraphState

aten = torch.ops.aten

_PADS = ("aten.pad", "aten.constant_pad_nd")
_JOINS = ("aten.cat", "aten.concat")


def recognize_shifts(state: GraphState) -> int:
    matches, forms = 0, state.closed_forms()
    for node in list(state.graph.nodes):
        if node in forms.tainted and op_name(node) in (*_PADS, *_JOINS) and len(shape_of(node)) == 3:
            found = _padded(state, node) if op_name(node) in _PADS else _joined(state, forms, node)
            if found is not None:
                matches += _rewrite(state, node, *found)
    return matches


def _padded(state: GraphState, node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, n) of x [1, T, C] padded by n zeros in front of the tokens, from which the last n are cut."""
    pad, x = argument(node, "pad"), argument(node, "self")
    if argument(node, "mode", "constant") != "constant" or argument(node, "value"):
        return None
    if not all(isinstance(n, int) for n in pad) or len(pad) < 4 or any(pad[:2]) or any(pad[4:]):
        return None
    back, cut = pad[2:4]
    return (x, back) if back > 0 and cut == -back and _tokens(state, x) else None


def _joined(state: GraphState, forms: ClosedForms, node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, n) of n zeros and x [1, T, C] without its last n tokens."""
    parts: Any = node.args[0]
    if len(parts) != 2 or int(argument(node, "dim", 0)) % 3 != 1 or parts[0] in forms.tainted:
        return None
    front, kept = parts
    form, back = forms.of(front), shape_of(front)[1]
    if form is None or form.expr != 0 or not back.is_Integer or op_name(kept) != "aten.slice":
        return None
    x = argument(kept, "self")
    whole = argument(kept, "start") in (None, 0) and argument(kept, "step") == 1 and int(argument(kept, "dim")) % 3 == 1
    if not whole or not _tokens(state, x) or sympy.expand(shape_of(kept)[1] - state.length + back) != 0:
        return None
    return x, int(back)


def _tokens(state: GraphState, x: fx.Node) -> bool:
    """Whether [1, T, C]."""
    shape = shape_of(x)
    return len(shape) == 3 and shape[:2] == (1, state.length) and shape[2].is_Integer


def _rewrite(state: GraphState, node: fx.Node, x: fx.Node, back: int) -> int:
    if shape_of(node) != shape_of(x):
        return 0
    channels, value = int(shape_of(x)[2]), x.meta["val"]

    def emit(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return state.call(op, args, kwargs, like=node)

    tap = emit(aten.ones.default, [channels, 1, 1], dtype=value.dtype, device=value.device)
    moved = emit(ops.causal_convolution, emit(aten.transpose.int, x, 1, 2), tap, None, back, 1, channels)
    node.replace_all_uses_with(emit(aten.transpose.int, moved, 1, 2))
    state.graph.erase_node(node)
    return 1
