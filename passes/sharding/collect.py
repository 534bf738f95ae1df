"""The collectives that the pass inserts: functional ops, so that Inductor and every backend of torch know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.collectives import ALL_GATHER, ALL_REDUCE, WAIT

from ..framework.state import GraphState
from .mesh import RankShare
from .placements import Sharded, offsets

aten = torch.ops.aten


def all_reduce(state: GraphState, value: fx.Node, cut: RankShare, at: fx.Node) -> fx.Node:
    """The sum over all ranks."""
    return _waited(state, state.call(ALL_REDUCE, (value, "sum", cut.group), like=at), at)


def all_gather(state: GraphState, value: fx.Node, placement: Sharded, cut: RankShare, at: fx.Node) -> fx.Node:
    """The whole value, in its own order, from the parts of all ranks."""
    ranks, dim = cut.ranks, placement.dim
    sizes = _sizes(state, value, dim, at)
    flat = state.call(aten.clone.default, (value,), {"memory_format": torch.contiguous_format}, like=at)
    found = state.call(ALL_GATHER, (flat, ranks, cut.group), like=at)
    found = state.call(aten.reshape.default, (_waited(state, found, at), [ranks, *sizes]), like=at)
    order = [*range(1, dim + 1), 0, *range(dim + 1, len(sizes) + 1)]
    found = state.call(aten.permute.default, (found, order), like=at)  # [.., ranks, part, ..]
    bounds = offsets(placement.segments, ranks, True)
    pieces = []
    for segment, start, stop in zip(placement.segments, bounds, bounds[1:], strict=False):
        piece = found
        if len(placement.segments) > 1:
            piece = state.call(aten.slice.Tensor, (piece, dim + 1, start, stop, 1), like=at)
        if segment.repeat > 1:
            piece = state.call(aten.slice.Tensor, (piece, dim, 0, ranks, segment.repeat), like=at)
        whole = [*sizes[:dim], segment.size, *sizes[dim + 1 :]]
        pieces.append(state.call(aten.reshape.default, (piece, whole), like=at))
    return state.call(aten.cat.default, (pieces, dim), like=at) if len(pieces) > 1 else pieces[0]


def _waited(state: GraphState, value: fx.Node, at: fx.Node) -> fx.Node:
    return state.call(WAIT, (value,), like=at)


def _sizes(state: GraphState, value: fx.Node, cut: int, at: fx.Node) -> list[Any]:
    """Of the value: the cut dimension's as it is; others are asked for, since any of them may count tokens or rows."""
    found: list[Any] = []
    for dim, size in enumerate(value.meta["val"].shape):
        if dim == cut or (isinstance(size, int) and size == 1):
            found.append(size)
            continue
        with state.graph.inserting_before(at):
            node = state.graph.call_function(aten.sym_size.int, (value, dim))
        node.meta["val"] = size
        found.append(node)
    return found
