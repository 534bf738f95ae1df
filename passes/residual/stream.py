"""The residual stream, found by proof: a *cut* is a value through which all that depends on the tokens must pass.

A layer is counted by its attention. The last cut between two attention sites is the stream between their layers: with
residual connections, that is what the next layer's norm and its sum both read. A site's pools are its own (the
verifier's rule), so nothing passes from one site to the next but by values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.chosen_attention import is_tree_attention
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState, refuse

aten = torch.ops.aten


def cuts(state: GraphState) -> list[list[fx.Node]]:
    """By number of sites passed: the values [1, T or rows, D] that all token-dependent values go through, in order."""
    groups: list[list[fx.Node]] = [[] for _ in range(len(state.sites) + 1)]
    waiting: dict[fx.Node, int] = {}  # token-dependent values that something later reads: how many read them
    depends: set[fx.Node] = set()
    passed: set[int] = set()
    for node in state.graph.nodes:
        sources = [a for a in node.all_input_nodes if a in depends]
        if node.op == "output" or not _has_tensors(node) or (not sources and node.name != state.tokens):
            continue
        depends.add(node)
        for source in sources:
            waiting[source] -= 1
            if not waiting[source]:
                del waiting[source]
        readers = sum(user.op != "output" and _has_tensors(user) for user in node.users)
        if readers:
            waiting[node] = readers
        if is_tree_attention(node):
            passed.add(node.meta["site"])
        if [*waiting] == [node] and passed == {*range(len(passed))} and _is_stream(node):
            groups[len(passed)].append(node)
    width = shape_of(groups[0][-1])[2] if groups[0] else None
    return [[n for n in group if shape_of(n)[2] == width] for group in groups]


def after_layer(state: GraphState, layers: int, groups: list[list[fx.Node]] | None = None) -> fx.Node:
    """The residual stream [1, T or rows, D] after this many attention layers; 0: what the first of them reads.

    Behind the last layer it is the cut at the place where the layer before it ends. Raises `Unsupported` where the
    graph has no such value.
    """
    groups = cuts(state) if groups is None else groups
    total = len(state.sites)
    if layers == total:
        return _behind_last(state, groups)
    if not groups[layers]:
        where = f"from attention {layers - 1} to attention {layers}" if layers else "to the first attention"
        raise refuse(
            Refusal.RESIDUAL,
            f"no single value carries everything {where}",
            way_out="layers that share values other than the residual stream have no place between them",
        )
    return groups[layers][-1]


def head_input(state: GraphState, groups: list[list[fx.Node]] | None = None) -> fx.Node:
    """What the head reads [1, T or rows, D], behind the final norm: the last cut as wide as the stream.

    Raises `Unsupported` where logits are as wide, so that nothing tells the two apart.
    """
    groups = cuts(state) if groups is None else groups
    node = groups[-1][-1] if groups[-1] else None
    if node is None or node is state.logits or shape_of(node)[-1] == shape_of(state.logits)[-1]:
        reason = "what the head reads was not told apart from the logits, which are as wide"
        raise refuse(Refusal.RESIDUAL, reason, state.logits)
    return node


def _behind_last(state: GraphState, groups: list[list[fx.Node]]) -> fx.Node:
    before, last = groups[-2], groups[-1]
    if len(groups) == 2:
        reason = "there is one attention layer, and none before it to say where it ends"
        raise refuse(Refusal.RESIDUAL, reason, state.logits)
    if not before or [op_name(n) for n in last[: len(before)]] != [op_name(n) for n in before]:
        reason = "the last layer is built unlike the one before it: its end was not found"
        raise refuse(Refusal.RESIDUAL, reason, state.logits)
    return last[len(before) - 1]


def _is_stream(node: fx.Node) -> bool:
    value: Any = node.meta["val"]
    picks = node.target is aten.index_select.default
    return isinstance(value, Tensor) and not picks and value.dim() == 3 and shape_of(node)[0] == 1


def _has_tensors(node: fx.Node) -> bool:
    """Whether it is a tensor or several; sizes that are read off a tensor say nothing about tokens."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))
