"""insert state: K/V pools, states and tree metadata become inputs, and attention and ops with a state read them.

Each site gets its pools, or a stash and a state, in site order; the op writes what it keeps of the new nodes and then
reads it, so the write is consumed by the op that makes it.
"""

from __future__ import annotations

import torch

from treespec_compiler.ir import ops
from treespec_compiler.ir.inputs import ATTENTION, BY_NAME, POSITIONS, STATE, pool_names, state_names
from treespec_compiler.ir.library import arguments, given
from treespec_compiler.ir.specs import AttentionSpec
from treespec_compiler.ir.states import KINDS, kind_over_sequence

from .framework.manager import Pass
from .framework.state import GraphState

# The trace's sizes; any do.
SIZES = {"requests": 2, "requests + 1": 3, "slot_pages": 1, "words": 2, "state_requests": 2, "state_nodes": 5}


def insert_state(state: GraphState) -> int:
    return _attention(state) + _states(state)


def _attention(state: GraphState) -> int:
    sites = [n for n in state.graph.nodes if n.target is ops.causal_attention]
    metadata = [_input(state, name) for name in ATTENTION] if sites else []
    pools = [_pools(state, spec, state.node(POSITIONS).meta["val"].device) for spec in state.sites]
    for node in sites:
        call, own = arguments(node), pools[node.meta["site"]]
        operands = (call["q"], call["k"], call["v"])
        if call["chosen"]:
            index = tuple(call[name] for name in ("index_q", "index_k", "index_weights"))
            rest = tuple(call[name] for name in ("scale", "index_scale", "chosen", "block", "local"))
            new = state.call(ops.tree_chosen_attention, (*operands, *index, *own, *metadata, *rest), like=node)
        else:
            changes = {name: call[name] for name in call if name in given(ops.causal_attention, call) - {"window"}}
            args = (*operands, *own, *metadata, call["scale"], call["window"])
            new = state.call(ops.tree_attention, args, changes, like=node)
        new.meta["site"] = node.meta["site"]
        node.replace_all_uses_with(new)
        state.graph.erase_node(node)
    return len(sites)


def _states(state: GraphState) -> int:
    sites = [n for n in state.graph.nodes if kind_over_sequence(n) is not None]
    metadata = [_input(state, name) for name in STATE] if sites else []
    for node, spec in zip(sites, state.states, strict=True):
        kind, values = KINDS[spec.kind], [*arguments(node).values()]
        own = [
            state.add_input(name, torch.zeros(1, *shape, dtype=spec.dtype, device=state.device))
            for name, shape in zip(state_names(spec.index), ((spec.width,), spec.shape), strict=True)
        ]
        args = (*values[: kind.operands], *own, *metadata, *values[kind.operands :])
        node.replace_all_uses_with(state.call(kind.over_trees, args, like=node))
        state.graph.erase_node(node)
    return len(sites)


def _input(state: GraphState, name: str) -> torch.fx.Node:
    """The input of this name, which is there or made."""
    if name == POSITIONS or name in state.inputs:
        return state.node(name)
    like = state.node(POSITIONS).meta["val"]
    node = state.add_input(name, torch.zeros(0, dtype=torch.int64, device=like.device))
    with state.fake_mode:
        node.meta["val"] = like.new_empty(BY_NAME[name].sizes({**SIZES, "T": like.shape[0]}))
    return node


def _pools(state: GraphState, spec: AttentionSpec, device: torch.device) -> list[torch.fx.Node]:
    return [
        state.add_input(name, torch.zeros(1, heads, 4, dim, dtype=spec.dtype, device=device))
        for name, (heads, dim) in zip(pool_names(spec.index, bool(spec.index_dim)), spec.pools, strict=True)
    ]


PASS = Pass(
    "insert state",
    insert_state,
    before="treeified graph",
    after="attention and ops with a state are over trees, on their own pools, which are inputs in site order",
    level="stateful",
    needs=("treeify",),
)
