"""early exit: a copy of a tree program's graph that leaves after the first k attention sites, through the same head.

The residual stream after k layers (`stream.after_layer`) is put where the final norm and head read that after the last
one, and what is then dead is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.inputs import ROWS, state_names

from ..forms.closed_form import shape_of
from ..framework.state import GraphState, refuse
from ..streaming.resident import make_resident
from .stream import after_layer, cuts

aten = torch.ops.aten

HEAD_NORM, HEAD_PROJECTION = "exit_norm", "exit_projection"


def early_exit(state: GraphState, layers: int, head: Mapping[str, Any] | None = None) -> int:
    """Cut the graph after `layers` attention sites, in place; returns the number of sites dropped. Nothing of it is
    streamed: the ring reads ahead for whole passes.

    `head`: {"norm": weight, "projection": weight, "eps": number} of a trained exit that replaces the final norm by
    projection @ (norm * rmsnorm(h)). Raises Unsupported where the graph has no such place.
    """
    total = len(state.sites)
    if not 0 < layers < total:
        raise refuse(
            Refusal.EARLY_EXIT,
            f"an early exit after {layers} of {total} attention layers",
            way_out=f"choose 1 to {total - 1}",
        )
    make_resident(state, layers)
    groups = cuts(state)
    exit_value, final = after_layer(state, layers, groups), after_layer(state, total, groups)
    rows = state.node(ROWS)
    if shape_of(final)[1] != shape_of(exit_value)[1]:
        exit_value = state.call(aten.index_select.default, (exit_value, 1, rows), like=final)
    if head is None:
        final.replace_all_uses_with(exit_value)
    else:
        head_input = groups[total][-1]
        head_input.replace_all_uses_with(_trained_head(state, exit_value, head, like=head_input))
    state.output.args, state.outputs = ((state.logits,),), state.outputs[:1]
    # NOTE attention writes its pools, so it never counts as dead; here the later sites are to go all the same.
    state.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    state.streaming = None  # what is left reads no slot
    for node in list(state.graph.nodes):
        if node.op == "placeholder" and not node.users:
            state.graph.erase_node(node)
            if node.name in state.weights:
                state.weights.drop(node.name)
    state.sites = state.sites[:layers]
    left = {node.name for node in state.graph.nodes}
    state.states = [spec for spec in state.states if left.issuperset(state_names(spec.index))]
    state.gm.recompile()
    return total - layers


def _trained_head(state: GraphState, x: fx.Node, head: Mapping[str, Any], *, like: fx.Node) -> fx.Node:
    """projection @ (norm * rmsnorm(x)), with the two weights as new inputs."""
    width = shape_of(x)[2]
    if head["norm"].numel() != width:
        raise refuse(
            Refusal.EARLY_EXIT, f"the trained head is for a width of {head['norm'].numel()}, this model has {width}", x
        )
    norm, projection = (
        _weight(state, name, head[key]) for name, key in ((HEAD_NORM, "norm"), (HEAD_PROJECTION, "projection"))
    )

    def call(target: Any, *args: Any) -> fx.Node:
        return state.call(target, args, like=like)

    square = call(aten.pow.Tensor_Scalar, x, 2)
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, call(aten.mean.dim, square, [-1], True), float(head["eps"])))
    return call(aten.linear.default, call(aten.mul.Tensor, call(aten.mul.Tensor, x, scale), norm), projection)


def _weight(state: GraphState, name: str, tensor: Tensor) -> fx.Node:
    logits: Any = state.logits.meta["val"]
    return state.add_input(name, tensor.to(logits.device, logits.dtype))
