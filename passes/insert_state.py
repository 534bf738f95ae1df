"""insert state: K/V pools and tree metadata become inputs, and attention reads them.

Each site gets two pools, in site order; the attention op writes the new nodes' K/V and then reads the pool, so the
write is consumed by the op that makes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treespec_compiler.ir import ops  # noqa: F401  (defines treespec::tree_attention)
from treespec_compiler.ir.specs import AttentionSpec

from .framework.manager import Pass
from .framework.state import GraphState

# Metadata inputs of tree attention in schema order; `positions` exists already.
META_INPUTS = ("write_index", "node_offsets", "page_table", "prefix_lens", "tree_lens", "ancestors")


def pool_names(index: int) -> tuple[str, str]:
    return f"pool_k_{index}", f"pool_v_{index}"


def insert_state(state: GraphState) -> int:
    positions = state.node("positions")
    device = positions.meta["val"].device
    meta = {name: _meta_input(state, name, positions.meta["val"], device) for name in META_INPUTS}
    arguments = [positions, *(meta[name] for name in META_INPUTS)]
    sites = [n for n in state.graph.nodes if n.target is torch.ops.treespec.causal_attention.default]
    pools = [_pools(state, spec, device) for spec in state.sites]
    for node in sites:
        q, k, v, scale, window, *changes = node.args
        pool_k, pool_v = pools[node.meta["site"]]
        op = torch.ops.treespec.scored_tree_attention if changes else torch.ops.treespec.tree_attention
        args = (q, k, v, pool_k, pool_v, *arguments, scale, window, *changes)
        new = state.call(op.default, args, like=node)
        new.meta["site"] = node.meta["site"]
        node.replace_all_uses_with(new)
        state.graph.erase_node(node)
    return len(sites)


def _meta_input(state: GraphState, name: str, positions: Tensor, device: torch.device) -> torch.fx.Node:
    requests = {"node_offsets": (3,), "page_table": (2, 1), "prefix_lens": (2,), "tree_lens": (2,)}
    node = state.add_input(name, torch.zeros(requests.get(name, (2,)), dtype=torch.int64, device=device))
    with state.fake_mode:
        if name == "write_index":
            node.meta["val"] = torch.empty_like(positions)
        elif name == "ancestors":
            node.meta["val"] = positions.new_empty((positions.shape[0], 2))
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
