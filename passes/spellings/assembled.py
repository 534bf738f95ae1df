"""One spelling of a tensor that is put together: slices of a new tensor, written one by one, become a `cat`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState

aten = torch.ops.aten

_END = 2**62  # slices to the end are written with the largest int64


def spell_assembled(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a copy to what it copies, and the last of the writes that fill a tensor to a `cat`; False if neither.

    What the tensor held before does not matter, since every part of it is written once.
    """
    name = op_name(node)
    if name == "aten.copy":
        new = _copied(state, node)
    elif name == "aten.slice_scatter":
        new = _joined(state, node)
    else:
        return False
    if new is None:
        return False
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    return True


def _copied(state: GraphState, node: fx.Node) -> fx.Node | None:
    """`copy(into, source)` has the values of source in the shape and dtype of `into`."""
    source: Any = node.args[1]
    value, given = node.meta["val"], source.meta["val"]
    if _alike(node, source):
        return source
    if list(map(str, value.shape)) != list(map(str, given.shape)) or value.device != given.device:
        return None
    return state.call(aten._to_copy.default, (source,), {"dtype": value.dtype}, like=node)


def _joined(state: GraphState, node: fx.Node) -> fx.Node | None:
    dim, first, last, _ = _write(node)
    source: Any = node.args[1]
    if first == 0 and isinstance(last, int) and last >= _END and _alike(node, source):
        return source
    size = node.meta["val"].shape[dim]
    parts: dict[int, tuple[int, Any]] = {}
    current: Any = node
    while op_name(current) == "aten.slice_scatter":
        at, start, end, step = _write(current)
        whole = current.meta["val"].shape[dim]
        if at != dim or step != 1 or not all(isinstance(i, int) for i in (start, end, whole)) or start < 0 or end < 0:
            return None
        if start in parts:  # written again: the later write counts
            return None
        parts[start] = (min(end, whole), current.args[1])
        if _fills(parts, size):
            pieces = [parts[start][1] for start in sorted(parts)]
            return pieces[0] if len(pieces) == 1 else state.call(aten.cat.default, (pieces, dim), like=node)
        current = current.args[0]
    return None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have the same shape, dtype and device."""
    one, other = a.meta["val"], b.meta["val"]
    same = one.dtype == other.dtype and one.device == other.device
    return same and list(map(str, one.shape)) == list(map(str, other.shape))


def _write(node: fx.Node) -> tuple[int, Any, Any, Any]:
    """(dimension, start, end, step) of a slice_scatter."""
    dim, start, end, step = node.args[2:]
    at = int(dim) % node.meta["val"].dim()
    return at, 0 if start is None else start, _END if end is None else end, step


def _fills(parts: dict[int, tuple[int, Any]], size: Any) -> bool:
    """Whether the parts lie side by side from 0 to `size`."""
    at = 0
    for start in sorted(parts):
        if start != at:
            return False
        at = parts[start][0]
    return isinstance(size, int) and at == size
