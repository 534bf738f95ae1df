"""Rotations: how a rotated query or key comes from the unrotated one, whatever the spelling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from treespec_compiler.ir.provenance import op_name
from treespec_compiler.ir.rotation import STYLES, columns, partners

from ..forms.form import shape_of
from ..framework.state import GraphState
from .linear import RULES, Combination, Head, Walk, same_value


@dataclass(frozen=True)
class Rotation:
    """`x` [1, H, T, D], or [1, T, H, D] if `swapped`, turned as `ir.rotation.rotate` says."""

    x: fx.Node
    swapped: bool
    style: str
    rotary: int
    cos: fx.Node
    sin: fx.Node
    width: int  # columns of cos and sin

    def same_turn(self, other: Rotation) -> bool:
        mine, theirs = (self.style, self.rotary, self.width), (other.style, other.rotary, other.width)
        return mine == theirs and same_value(self.cos, other.cos) and same_value(self.sin, other.sin)


def rotation(state: GraphState, turned: fx.Node) -> Rotation | None:
    """What is proved of an operand [1, H, T, D] of attention; None: nothing."""
    way = _way(turned)
    order = {node: i for i, node in enumerate(state.graph.nodes)}
    for root in sorted(way - {turned}, key=lambda node: -order[node]):
        if not _may_be_root(root, turned):
            continue
        walk = Walk(state, root)
        head = walk.to(turned, [node for node in order if node in way])
        found = _read(head, root, walk) if head is not None else None
        if found is not None:
            return found
    return None


def _way(turned: fx.Node) -> set[fx.Node]:
    """`turned` and what it comes from by ops that have a rule, their operands included."""
    seen: set[fx.Node] = set()
    stack = [turned]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if op_name(node) in RULES:
                stack += node.all_input_nodes
    return seen


def _may_be_root(node: fx.Node, turned: fx.Node) -> bool:
    value, wanted = node.meta.get("val"), turned.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.dtype != wanted.dtype:
        return False
    one, a, b, dim = shape_of(node)
    _, heads, tokens, wanted_dim = shape_of(turned)
    return one == 1 and dim == wanted_dim and {a, b} == {heads, tokens}


def _read(head: Head, root: fx.Node, walk: Walk) -> Rotation | None:
    """The style, if every number is turned as one of them says."""
    if head.entries.ndim != 1:
        return None
    entries: list[Combination] = list(head.entries)
    unturned = [entry == {(d, None, 0): 1.0} for d, entry in enumerate(entries)]
    rotary = unturned.index(True) if True in unturned else len(entries)
    if rotary < 2 or rotary % 2 or not all(unturned[rotary:]):
        return None
    for style in STYLES:
        found = _read_style(entries[:rotary], partners(style, rotary))
        if found is None:
            continue
        cos, sin, places = found
        width = walk.widths[cos]
        every = places == list(range(rotary)) and width == rotary
        angles = places == columns(style, rotary) and width == rotary // 2
        if walk.widths[sin] == width and (every or angles):
            return Rotation(root, head.swapped, style, rotary, cos, sin, width)
    return None


def _read_style(entries: list[Combination], other: list[int]) -> tuple[fx.Node, fx.Node, list[int]] | None:
    """cos, sin and the column of both for each number: own * cos - partner * sin, or + for the second of a pair."""
    turns: set[tuple[fx.Node, fx.Node]] = set()
    places = []
    for d, entry in enumerate(entries):
        terms = {place: (factor, column, c) for (place, factor, column), c in entry.items()}
        if len(entry) != 2 or set(terms) != {d, other[d]}:
            return None
        (cos, place, one), (sin, its_place, sign) = terms[d], terms[other[d]]
        if cos is None or sin is None or place != its_place or one != 1.0 or sign != (-1.0 if d < other[d] else 1.0):
            return None
        turns.add((cos, sin))
        places.append(place)
    return (*turns.pop(), places) if len(turns) == 1 else None
