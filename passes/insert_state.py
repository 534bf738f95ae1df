"""insert state: K/V pools and tree metadata become inputs, and attention reads them.

Each site gets two pools, in site order; the attention op writes the new nodes' K/V and then reads the pool, so the
write is consumed by the op that makes it.
"""

from __future__ import annotations

import torch

from treespec_compiler.ir import ops
from treespec_compiler.ir.inputs import ATTENTION, BY_NAME, POSITIONS, pool_names
from treespec_compiler.ir.library import arguments, given
from treespec_compiler.ir.specs import AttentionSpec

from .framework.manager import Pass
from .framework.state import GraphState

# The trace's sizes; any do.
SIZES = {"requests": 2, "requests + 1": 3, "slot_pages": 1, "words": 2}


def insert_state(state: GraphState) -> int:
    positions = state.node(POSITIONS)
    device = positions.meta["val"].device
    metadata = [positions if name == POSITIONS else _input(state, name, positions) for name in ATTENTION]
    sites = [n for n in state.graph.nodes if n.target is ops.causal_attention]
    pools = [_pools(state, spec, device) for spec in state.sites]
    for node in sites:
        call = arguments(node)
        args = (call["q"], call["k"], call["v"], *pools[node.meta["site"]], *metadata, call["scale"], call["window"])
        changes = {name: call[name] for name in call if name in given(ops.causal_attention, call) - {"window"}}
        new = state.call(ops.tree_attention, args, changes, like=node)
        new.meta["site"] = node.meta["site"]
        node.replace_all_uses_with(new)
        state.graph.erase_node(node)
    return len(sites)


def _input(state: GraphState, name: str, positions: torch.fx.Node) -> torch.fx.Node:
    like = positions.meta["val"]
    node = state.add_input(name, torch.zeros(0, dtype=torch.int64, device=like.device))
    with state.fake_mode:
        node.meta["val"] = like.new_empty(BY_NAME[name].sizes({**SIZES, "T": like.shape[0]}))
    return node


def _pools(state: GraphState, spec: AttentionSpec, device: torch.device) -> tuple[torch.fx.Node, torch.fx.Node]:
    names = pool_names(spec.index)
    dims = (spec.key_dim, spec.value_dim)
    made = [
        state.add_input(name, torch.zeros(1, spec.kv_heads, 4, dim, dtype=spec.dtype, device=device))
        for name, dim in zip(names, dims, strict=True)
    ]
    return made[0], made[1]


PASS = Pass(
    "insert state",
    insert_state,
    before="treeified graph",
    after="every attention is a treespec::tree_attention on its own pools, which are inputs in site order",
    level="stateful",
    needs=("treeify",),
)
