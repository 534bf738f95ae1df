"""One spelling of `meshgrid`: each index tensor, broadcast along its own dimension."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState

aten = torch.ops.aten


def spell_meshgrid(state: GraphState, node: fx.Node) -> bool:
    """Rewrite the results of a meshgrid to reshapes and expansions, and leave it unread; False for anything else."""
    if op_name(node) != "aten.meshgrid" or any(u.target is not operator.getitem for u in node.users):
        return False
    sources: Any = node.args[0]
    if any(x.meta["val"].dim() != 1 for x in sources):
        return False
    order = list(range(len(sources)))
    if argument(node, "indexing", "ij") == "xy" and len(sources) > 1:
        order[:2] = [1, 0]
    sizes: list[Any] = [0] * len(sources)
    for source, at in zip(sources, order, strict=True):
        size = source.meta["val"].shape[0]
        sizes[at] = size if isinstance(size, int) else state.call(aten.sym_size.int, (source, 0), like=node)
    for user in list(node.users):
        i: Any = user.args[1]
        shape = [-1 if at == order[i] else 1 for at in range(len(sources))]
        column = state.call(aten.reshape.default, (sources[i], shape), like=node)
        user.replace_all_uses_with(state.call(aten.expand.default, (column, sizes), like=node))
    return True
