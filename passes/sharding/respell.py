"""Ops that have no partial sum themselves, and the ops that do and say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.form import shape_of
from ..framework.state import GraphState
from .placements import PARTIAL, Placement, Sharded

aten = torch.ops.aten


@dataclass(frozen=True)
class MeanAsSum:
    """A mean over a cut dimension is the sum of the parts' sums, divided by the whole size."""

    count: int
    gives: Placement = PARTIAL

    def emit(self, state: GraphState, node: fx.Node, now: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """The nodes in front of `node`, on what its operands are `now`."""
        x, dims, keep = node.args[0], argument(node, "dim"), argument(node, "keepdim")
        assert isinstance(x, fx.Node)
        dtype = {"dtype": argument(node, "dtype")}
        total = state.call(aten.sum.dim_IntList, (now[x], dims, keep), dtype, like=node)
        return state.call(aten.mul.Tensor, (total, 1.0 / self.count), like=node)


def respelled(node: fx.Node, given: Sequence[Placement]) -> MeanAsSum | None:
    """Another spelling of a call on operands that lie so; None: the call stays."""
    if op_name(node) != "aten.mean" or not isinstance(given[0], Sharded) or argument(node, "dim") is None:
        return None
    shape = shape_of(node.args[0])
    dims = {int(d) % len(shape) for d in argument(node, "dim")}
    once = all(s.repeat == 1 for s in given[0].segments)
    if given[0].dim not in dims or not once or not all(shape[d].is_Integer for d in dims):
        return None
    return MeanAsSum(prod(int(shape[d]) for d in dims))
