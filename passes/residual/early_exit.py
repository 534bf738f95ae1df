"""early exit: a copy of a tree program's graph that leaves after the first k attention sites, through the same head.

The residual stream is found by structure: a *cut* is a value through which everything that depends on the tokens must
pass. The last cut between site k - 1 and site k is the residual stream after k layers. In the last layer the cut at the
same place is what the final norm and head read: the earlier value is put there, and what is then dead is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir import ops
from treespec_compiler.ir.inputs import ROWS
from treespec_compiler.ir.library import definition
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState, refuse

aten = torch.ops.aten

HEAD_NORM, HEAD_PROJECTION = "exit_norm", "exit_projection"


def copy_state(state: GraphState) -> GraphState:
    """A state whose graph can be changed; fake values, constants and proofs are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(state.graph, {})
    graph.output(output)
    gm = fx.GraphModule(state.gm, graph)
    return replace(state, gm=gm, weights=state.weights.copy(), sites=list(state.sites), inputs=list(state.inputs))


def early_exit(state: GraphState, layers: int, head: Mapping[str, Any] | None = None) -> int:
    """Cut the graph after `layers` attention sites, in place; returns the number of sites dropped.

    `head`: {"norm": weight, "projection": weight, "eps": number} of a trained exit that replaces the final norm by
    projection @ (norm * rmsnorm(h)). Raises Unsupported where the graph has no such place.
    """
    total = len(state.sites)
    groups = cuts(state)
    if not 0 < layers < total:
        raise refuse(
            Refusal.EARLY_EXIT,
            f"an early exit after {layers} of {total} attention layers",
            way_out=f"choose 1 to {total - 1}",
        )
    exit_value, final = _stream(state, groups, layers), _final(state, groups)
    rows = state.node(ROWS)
    if shape_of(final)[1] != shape_of(exit_value)[1]:
        exit_value = state.call(aten.index_select.default, (exit_value, 1, rows), like=final)
    if head is None:
        final.replace_all_uses_with(exit_value)
    else:
        head_input = groups[total][-1]
        head_input.replace_all_uses_with(_trained_head(state, exit_value, head, like=head_input))
    # NOTE attention writes its pools, so it never counts as dead; here the later sites are to go all the same.
    state.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for node in list(state.graph.nodes):
        if node.op == "placeholder" and not node.users:
            state.graph.erase_node(node)
            if node.name in state.weights:
                state.weights.drop(node.name)
    state.sites = state.sites[:layers]
    state.gm.recompile()
    return total - layers


def cuts(state: GraphState) -> list[list[fx.Node]]:
    """By number of sites passed: the values [1, T or rows, D] that all token-dependent values go through, in order."""
    groups: list[list[fx.Node]] = [[] for _ in range(len(state.sites) + 1)]
    waiting: dict[fx.Node, int] = {}  # token-dependent values that something later reads: how often
    depends: set[fx.Node] = set()
    passed: set[int] = set()
    for node in state.graph.nodes:
        sources = [a for a in node.all_input_nodes if a in depends]
        if node.op == "output":
            break
        if not _is_tensor(node) or (not sources and node.name != state.tokens):
            continue
        depends.add(node)
        for source in sources:
            waiting[source] -= 1
            if not waiting[source]:
                del waiting[source]
        waiting[node] = sum(_is_tensor(user) for user in node.users)
        if definition(node.target) is ops.tree_attention:
            passed.add(node.meta["site"])
        picks = node.target is aten.index_select.default
        if list(waiting) == [node] and not picks and len(shape_of(node)) == 3 and passed == set(range(len(passed))):
            groups[len(passed)].append(node)
    width = shape_of(groups[0][-1])[2] if groups[0] else None
    return [[n for n in group if shape_of(n)[0] == 1 and shape_of(n)[2] == width] for group in groups]


def _is_tensor(node: fx.Node) -> bool:
    """Sizes that are read off a tensor say nothing about tokens."""
    return isinstance(node.meta.get("val"), Tensor)


def _stream(state: GraphState, groups: list[list[fx.Node]], layers: int) -> fx.Node:
    if not groups[layers]:
        reason = f"no single value carries everything from attention {layers - 1} to attention {layers}"
        raise refuse(
            Refusal.EARLY_EXIT,
            reason,
            way_out="layers that share values other than the residual stream have no early exit",
        )
    return groups[layers][-1]


def _final(state: GraphState, groups: list[list[fx.Node]]) -> fx.Node:
    """What the final norm reads: in the last layer, the cut at the place where the layer before it ends."""
    before, last = groups[-2], groups[-1]
    if not before or len(last) < len(before) or op_name(last[len(before) - 1]) != op_name(before[-1]):
        raise refuse(
            Refusal.EARLY_EXIT, "the last layer is built unlike the one before it: its end was not found", state.logits
        )
    return last[len(before) - 1]


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
