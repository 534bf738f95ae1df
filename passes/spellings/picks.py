"""Places that a condition picks: the coordinates of a mask's true elements, as `nonzero` and `where` give them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

_LISTS = ("aten.nonzero_numpy", "aten.where", "aten.unbind", "aten.split", "aten.chunk")
_CASTS = ("aten._to_copy", "aten.alias", "aten.clone")


@dataclass(frozen=True)
class Coordinate:
    """Where the elements of `mask` that are not 0 are along its dimension `dim`, in the order of elements."""

    mask: fx.Node
    dim: int


def as_mask(node: Any) -> fx.Node | None:
    """The node, where it is a boolean tensor."""
    held = isinstance(node, fx.Node) and node.meta["val"].dtype is torch.bool
    return node if held else None


def coordinate(node: Any) -> Coordinate | None:
    """What a tensor of whole numbers [picked] picks by; None where it is no coordinate of a mask's true elements."""
    while isinstance(node, fx.Node) and op_name(node) in _CASTS:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function" or not hasattr(node.meta["val"], "dim"):
        return None
    name, rank = op_name(node), node.meta["val"].dim()
    if node.target is operator.getitem:
        return _of_list(node.args[0], int(node.args[1])) if rank == 1 else None
    if name == "aten.select" and rank == 1 and node.args[1] in (1, -1):
        return _of_matrix(node.args[0], int(node.args[2]))
    if name in ("aten.reshape", "aten.squeeze", "aten.flatten") and rank == 1:
        return _of_matrix(node.args[0], 0) if _columns(node.args[0]) == 1 else None
    return None


def _of_list(source: Any, i: int) -> Coordinate | None:
    name = op_name(source)
    if name not in _LISTS:
        return None
    if name == "aten.unbind":
        return _of_matrix(source.args[0], i) if argument(source, "dim") in (1, -1) else None
    if name in ("aten.split", "aten.chunk"):
        return None
    alone = len(source.args) == 1 or source.args[1] is None
    return Coordinate(source.args[0], i) if alone else None


def _of_matrix(source: Any, i: int) -> Coordinate | None:
    """Column i of `nonzero(mask)` [picked, rank]."""
    if not isinstance(source, fx.Node) or op_name(source) != "aten.nonzero":
        return None
    mask: Any = source.args[0]
    return Coordinate(mask, i % mask.meta["val"].dim())


def _columns(source: Any) -> int:
    if not isinstance(source, fx.Node) or op_name(source) != "aten.nonzero":
        return 0
    return int(source.args[0].meta["val"].dim())


def alike(a: Any, b: Any) -> bool:
    """Whether two nodes compute the same: one op on the same operands, as where code writes a condition twice."""
    if a is b:
        return True
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or "call_function" not in (a.op, b.op):
        return not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and type(a) is type(b) and bool(a == b)
    if a.target is not b.target or len(a.args) != len(b.args) or a.kwargs != b.kwargs:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    return all(alike(x, y) for x, y in zip(a.args, b.args, strict=True))


def chosen_once(mask: fx.Node, dims: list[int]) -> bool:
    """Whether at most one element along these dimensions of the mask is true: it marks one of topk's choices.

    topk chooses nothing twice, so `choices == i` is true once at most along the dimension that was chosen in.
    """
    found = _choice(mask)
    if found is None:
        return False
    topk, axes = found
    rank = topk.args[0].meta["val"].dim()
    chosen = int(argument(topk, "dim")) % rank
    return [axes[d] for d in dims] == [chosen]


def _choice(node: Any) -> tuple[Any, list[int | None]] | None:
    """(topk, which of its dimensions each dimension is) of a tensor that says where its choice is one number."""
    if not isinstance(node, fx.Node):
        return None
    name = op_name(node)
    found = _equality(node) if name == "aten.eq" else None
    if found is not None:
        return found
    if name in _CASTS or (name in ("aten.ne", "aten.eq", "aten.gt") and _is_number(node.args[1], _same(name))):
        return _choice(node.args[0])
    inner = _choice(node.args[0]) if name in ("aten.permute", "aten.transpose", "aten.select") else None
    if inner is None:
        return None
    topk, axes = inner
    rank = len(axes)
    if name == "aten.permute":
        return topk, [axes[int(d) % rank] for d in node.args[1]]
    if name == "aten.transpose":
        i, j = int(node.args[1]) % rank, int(node.args[2]) % rank
        axes[i], axes[j] = axes[j], axes[i]
        return topk, axes
    at = int(node.args[1]) % rank
    return (topk, axes[:at] + axes[at + 1 :]) if axes[at] is None else None


def _same(name: str) -> float:
    """The number that a 0/1 tensor is compared with so that what is true stays true."""
    return 1 if name == "aten.eq" else 0


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


def _equality(node: fx.Node) -> tuple[Any, list[int | None]] | None:
    """`choices == i`, or `choices[..., None] == arange(n)` (one_hot)."""
    ids, other = node.args[:2]
    axes: list[int | None]
    if isinstance(other, (int, float)):
        topk = _topk(ids)
        return None if topk is None else (topk, list(range(ids.meta["val"].dim())))
    while op_name(ids) == "aten._to_copy":
        ids = ids.args[0]
    if op_name(ids) != "aten.unsqueeze" or op_name(other) != "aten.arange":
        return None
    rank = ids.meta["val"].dim()
    topk = _topk(ids.args[0])
    if topk is None or int(ids.args[1]) % rank != rank - 1:
        return None
    axes = [*range(rank - 1), None]
    return topk, axes


def _topk(ids: Any) -> Any:
    """The topk whose indices these are."""
    while isinstance(ids, fx.Node) and op_name(ids) in _CASTS:
        ids = ids.args[0]
    if not isinstance(ids, fx.Node) or ids.target is not operator.getitem or ids.args[1] != 1:
        return None
    return ids.args[0] if op_name(ids.args[0]) == "aten.topk" else None
