"""select rows: the rows whose logits are wanted are picked as early as possible, before the final norm and head.

Allowed because every op between the pick and the logits acts on each token alone (token locality): the pick climbs from
the logits along ops with a single operand per token, and stops below the last op that joins two.
"""

from __future__ import annotations

import torch
from torch import fx

from treespec_compiler.ir.inputs import POSITIONS, ROWS
from treespec_compiler.ir.provenance import op_name

from .forms.closed_form import shape_of
from .framework.manager import Pass
from .framework.state import GraphState

aten = torch.ops.aten

# Ops that commute with picking tokens, whatever their other operands: all act on each token alone.
_COMMUTES = {
    "aten.linear", "aten.matmul", "aten.layer_norm", "aten.rms_norm", "aten.mul", "aten.add", "aten.sub", "aten.div",
    "aten.pow", "aten.mean", "aten.rsqrt", "aten.tanh", "aten._to_copy", "aten.neg", "aten.sqrt", "aten.clamp",
    "aten.square", "aten.gelu", "aten.silu", "aten.relu", "aten.reciprocal", "aten.rsub", "aten.abs",
    "aten.sigmoid", "aten.var", "aten.reshape", "aten.permute", "aten.transpose", "aten.slice",
}  # fmt: skip


def select_rows(state: GraphState) -> int:
    positions = state.node(POSITIONS)
    rows = state.add_input(ROWS, torch.zeros(2, dtype=torch.int64, device=positions.meta["val"].device))
    with state.fake_mode:
        rows.meta["val"] = positions.meta["val"].new_empty(2)
    at = _climb(state, state.logits)
    region = _region(state, at, state.logits)
    for node in region:
        _any_number(state, node)
    users = [u for u in at.users if u in region] or [state.output]
    first = min(users, key=list(state.graph.nodes).index)
    picked = state.call(aten.index_select.default, (at, _token_dim(state, at), rows), like=first)
    for user in users:
        user.replace_input_with(at, picked)
    return 1


def _any_number(state: GraphState, node: fx.Node) -> None:
    """A reshape of rows takes as many as there are."""
    if op_name(node) == "aten.reshape":
        sizes = [-1 if i == _token_dim(state, node) else int(s) for i, s in enumerate(shape_of(node))]
        node.args = (node.args[0], sizes)


def _per_token(state: GraphState, node: fx.Node) -> list[fx.Node]:
    return [a for a in dict.fromkeys(node.all_input_nodes) if _carries_tokens(state, a)]


def _carries_tokens(state: GraphState, node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(state.length in s.free_symbols for s in shape_of(node))


def _climb(state: GraphState, bottom: fx.Node) -> fx.Node:
    """The highest node through which every path to `bottom` goes, with only commuting ops in between."""
    order = {n: i for i, n in enumerate(state.graph.nodes)}
    best, pending = bottom, {bottom}
    while pending:
        current = max(pending, key=order.__getitem__)
        if len(pending) == 1 and _token_dim(state, current) is not None:
            best = current
        if op_name(current) not in _COMMUTES or _token_dim(state, current) is None:
            break
        pending.remove(current)
        pending.update(_per_token(state, current))
    return best


def _token_dim(state: GraphState, node: fx.Node) -> int | None:
    """The dimension of the tokens, where it is the only one that counts them."""
    sized = [i for i, s in enumerate(shape_of(node)) if state.length in s.free_symbols]
    return sized[0] if len(sized) == 1 and shape_of(node)[sized[0]] == state.length else None


def _region(state: GraphState, top: fx.Node, bottom: fx.Node) -> set[fx.Node]:
    """Nodes on the way from `top` (excluded) to `bottom`."""
    region: set[fx.Node] = set()
    stack = [bottom]
    while stack:
        node = stack.pop()
        if node is top or node in region:
            continue
        region.add(node)
        stack.extend(_per_token(state, node))
    return region


PASS = Pass(
    "select rows",
    select_rows,
    before="stateful graph",
    after="logits are computed for the rows in input `rows` only",
    level="rows",
    needs=("insert state",),
)
