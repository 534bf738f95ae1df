"""One spelling of rows that a condition picks: they are computed for every token, and masked.

    rows, nth = where(choices == i)
    out[rows] += w[rows, nth] * f(x[rows])    ->    out + where(choices == i, w * f(x), 0).sum(choices)

Experts in a loop are written so. How many rows are picked is known at run time only, and a graph whose sizes depend on
the tokens cannot be proved token by token; computed for every row it can. What is not picked is thrown away, so that
its values, NaN among them, go nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState
from .picks import Coordinate, alike, as_mask, chosen_once, coordinate
from .whole_rows import Picked, Whole

aten = torch.ops.aten


@dataclass(frozen=True)
class _Write:
    """`values` go to the places of `picks` in dimensions `at`, `at + 1`, ... of `target`."""

    target: fx.Node
    at: int
    mask: fx.Node
    dims: tuple[int, ...]
    """Which dimensions of the mask the target's are."""
    values: Any
    added: bool
    alpha: Any = 1


def spell_picked_rows(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a write of picked rows to one of all rows under a mask; False where it is not that."""
    write = _written(node)
    if write is None or not _same_sizes(write):
        return False
    new = _Masked(state, node, write).result()
    if new is None or list(map(str, new.meta["val"].shape)) != list(map(str, node.meta["val"].shape)):
        return False
    if new.meta["val"].dtype != node.meta["val"].dtype:
        new = state.call(aten._to_copy.default, (new,), {"dtype": node.meta["val"].dtype}, like=node)
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    return True


def _written(node: fx.Node) -> _Write | None:
    name = op_name(node)
    if name == "aten.index_put":
        return _index_put(node)
    if name == "aten.index_add":
        target, dim, index, values = node.args[:4]
        return _along(target, dim, coordinate(index), values, argument(node, "alpha"))
    if name == "aten.scatter_add":
        target, dim, index, values = node.args[:4]
        return _along(target, dim, _spread(index, dim), values, 1)
    return None


def _index_put(node: fx.Node) -> _Write | None:
    target, indices, values, added = node.args[:4]
    used = [i for i, x in enumerate(indices) if x is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    if len(used) == 1:
        mask = as_mask(indices[used[0]])
        if mask is not None:
            dims = tuple(range(mask.meta["val"].dim()))
            return _Write(target, used[0], mask, dims, values, bool(added))
    places = [place for i in used if (place := coordinate(indices[i])) is not None]
    if len(places) != len(used) or not all(alike(place.mask, places[0].mask) for place in places):
        return None
    dims = tuple(place.dim for place in places)
    return _Write(target, used[0], places[0].mask, dims, values, bool(added))


def _along(target: Any, dim: Any, place: Coordinate | None, values: Any, alpha: Any) -> _Write | None:
    if place is None or not isinstance(dim, int):
        return None
    return _Write(target, dim % target.meta["val"].dim(), place.mask, (place.dim,), values, True, alpha)


def _spread(index: Any, dim: Any) -> Coordinate | None:
    """The places along `dim` of an index that is the same in every other dimension."""
    rank = index.meta["val"].dim()
    while isinstance(index, fx.Node) and op_name(index) in ("aten.expand", "aten.repeat"):
        index = index.args[0]
    if not isinstance(index, fx.Node) or index.meta["val"].dim() != rank or not isinstance(dim, int):
        return None
    ones = [i for i, s in enumerate(index.meta["val"].shape) if isinstance(s, int) and s == 1]
    if [i for i in range(rank) if i not in ones] != [dim % rank]:
        return None
    while op_name(index) in ("aten.unsqueeze", "aten.reshape"):
        index = index.args[0]
    return coordinate(index) if index.meta["val"].dim() == 1 else None


def _same_sizes(write: _Write) -> bool:
    """Whether the mask's dimensions are the target's, all of them, and in order."""
    target, mask = write.target.meta["val"].shape, write.mask.meta["val"].shape
    sizes = [str(mask[d]) for d in write.dims]
    written = [str(s) for s in target[write.at : write.at + len(write.dims)]]
    return sizes == written and list(write.dims) == sorted(set(write.dims))


class _Masked:
    """Emits one write of all rows under a mask."""

    def __init__(self, state: GraphState, at: fx.Node, write: _Write) -> None:
        self.state, self.at, self.write = state, at, write
        self.rank = write.mask.meta["val"].dim()
        self.missing = [d for d in range(self.rank) if d not in write.dims]

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(op, args, kwargs, like=self.at)

    def result(self) -> fx.Node | None:
        write = self.write
        inner = write.target.meta["val"].dim() - write.at - len(write.dims)  # dimensions behind the rows
        whole = self._values(write.at, write.at + 1 + inner)
        if whole is None:
            return None
        mask = write.mask
        if mask.meta["val"].dtype is not torch.bool:
            mask = self.emit(aten.ne.Scalar, mask, 0)
        for _ in range(inner):
            mask = self.emit(aten.unsqueeze.default, mask, -1)
        gone = [write.at + d for d in self.missing]
        if not write.added:
            return self._replaced(mask, whole, gone)
        total = self._sum(mask, whole, gone)
        if write.alpha != 1:
            total = self.emit(aten.mul.Tensor, total, write.alpha)
        return self.emit(aten.add.Tensor, write.target, total)

    def _values(self, at: int, rank: int) -> fx.Node | None:
        """The written values for every element of the mask, aligned with [target.., mask.., target..]."""
        values = self.write.values
        found = Whole(self.state, self.write.mask, self.at).operand(values, at, rank)
        if isinstance(found, Picked) and found.at + rank - values.meta["val"].dim() != at:
            return None
        return found.node if isinstance(found, Picked) else found

    def _sum(self, mask: fx.Node, whole: fx.Node, gone: list[int]) -> fx.Node:
        kept = self._kept(mask, whole)
        if not gone:
            return kept
        lead = kept.meta["val"].dim() - self.at.meta["val"].dim() - len(gone)
        dtype = kept.meta["val"].dtype
        return self.emit(aten.sum.dim_IntList, kept, [g + lead for g in gone], dtype=dtype)

    def _kept(self, mask: fx.Node, whole: fx.Node) -> fx.Node:
        value = whole.meta["val"]
        zero = self.emit(aten.full.default, [], 0, dtype=value.dtype, device=value.device)
        return self.emit(aten.where.self, mask, whole, zero)

    def _replaced(self, mask: fx.Node, whole: fx.Node, gone: list[int]) -> fx.Node | None:
        target = self.write.target
        if not gone:
            return self.emit(aten.where.self, mask, whole, target)
        if not chosen_once(self.write.mask, self.missing):
            return None  # which of several writes counts is not known
        value = self._sum(mask, whole, gone)
        hit = mask
        for d in sorted(self.missing, reverse=True):
            hit = self.emit(aten.any.dim, hit, d)
        return self.emit(aten.where.self, hit, value, target)
