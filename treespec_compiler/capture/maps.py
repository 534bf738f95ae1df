"""`torch.vmap` as a trace finds it: marked where it begins and ends, so that the function's own ops are what is traced.

torch's own way of mapping, a tensor of another kind that each op looks through, takes the number of tokens for a
constant in such a trace.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ir.mapping import mapped, unmapped

_AROUND = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions")


def mark_maps(gm: fx.GraphModule) -> int:
    """Replace the calls that begin and end a map in Dynamo's graph by `treespec::mapped` and `unmapped`; returns how
    many there were."""
    found = 0
    for node in list(gm.graph.nodes):
        name = str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
        if name == "_add_batch_dim":
            x, dim, level = node.args
            node.target, node.args = mapped, (x, dim if dim >= 0 else dim + _rank(x), level)
        elif name == "_remove_batch_dim":
            x, level, size, dim = node.args
            node.target, node.args = unmapped, (x, level, size, dim if dim >= 0 else dim + _rank(node))
        elif name in _AROUND:
            gm.graph.erase_node(node)
            continue
        else:
            continue
        found += 1
    if found:
        gm.recompile()
    return found


def _rank(node: Any) -> int:
    rank: int = node.meta["example_value"].dim()
    return rank
