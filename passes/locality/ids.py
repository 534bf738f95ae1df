"""Integers that number one of a few things: how large they get, and which tensors hold the same ones."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

# Ops whose values are values of their first argument.
_PICKS = {
    "aten.reshape", "aten.flatten", "aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.transpose",
    "aten.permute", "aten.slice", "aten.select", "aten.index", "aten.index_select", "aten.gather", "aten.repeat",
    "aten.repeat_interleave", "aten.split", "aten.t",
}  # fmt: skip

# How far a type counts without a gap.
_EXACT = {
    torch.float32: 1 << 24, torch.float64: 1 << 53, torch.float16: 1 << 11, torch.bfloat16: 1 << 8,
    torch.int16: 1 << 15, torch.int8: 1 << 7, torch.uint8: 1 << 8, torch.bool: 1,
}  # fmt: skip


def id_bound(node: Any) -> int | None:
    """n where every value is an integer in 0..n-1; None when that is not known."""
    name = op_name(node)
    if name in ("aten.argmax", "aten.argmin", "aten.argsort"):
        return _choices(node, argument(node, "dim"))
    if node.target is operator.getitem:
        return _chosen(node)
    if name in _PICKS:
        return id_bound(node.args[0])
    if name == "aten._to_copy":
        bound, dtype = id_bound(node.args[0]), node.meta["val"].dtype
        fits = _EXACT.get(dtype, 1 << 31)
        return bound if bound is not None and bound <= fits else None
    if name in ("aten.cat", "aten.stack"):
        bounds = [id_bound(part) for part in node.args[0]]
        return None if None in bounds else max(b for b in bounds if b is not None)
    return None


def _chosen(node: fx.Node) -> int | None:
    source: Any = node.args[0]
    name = op_name(source)
    if name == "aten.topk" and node.args[1] == 1:
        return _choices(source, argument(source, "dim"))
    if name in ("aten.max", "aten.min") and node.args[1] == 1:
        return _choices(source, argument(source, "dim"))
    if (name == "aten.sort" and node.args[1] == 0) or name in ("aten.split", "aten.unbind", "aten.chunk"):
        return id_bound(source.args[0])
    return None


def _choices(node: fx.Node, dim: Any) -> int | None:
    """Size of the dimension that was chosen from, where it is fixed."""
    if not isinstance(dim, int):
        return None
    shape = shape_of(node.args[0])
    size = shape[dim % max(len(shape), 1)]
    return int(size) if size.is_Integer else None


def same_ids(node: fx.Node) -> fx.Node:
    """The node that holds the same ids once, through casts, reshapes and sorts of all of them."""
    while True:
        name = op_name(node)
        source: Any = node.args[0] if node.args else None
        if name in ("aten.reshape", "aten.flatten", "aten._to_copy", "aten.unsqueeze", "aten.squeeze"):
            node = source
        elif node.target is operator.getitem and op_name(source) == "aten.sort" and node.args[1] == 0:
            node = source.args[0]
        else:
            return node


def input_vocab(state: GraphState) -> int | None:
    """Rows of the table that the token ids are looked up in."""
    sizes = [
        int(node.args[0].meta["val"].shape[0])
        for node in state.graph.nodes
        if node.target is torch.ops.aten.embedding.default and _reads_tokens(state, node.args[1])
    ]
    return min(sizes) if sizes else None


def _reads_tokens(state: GraphState, node: Any) -> bool:
    while node.op == "call_function" and node.target in _SAME_IDS:
        node = node.args[0]
    return node.name == state.tokens


_SAME_IDS = {
    torch.ops.aten.reshape.default,
    torch.ops.aten.select.int,
    torch.ops.aten.transpose.int,
    torch.ops.aten.t.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dims,
}
