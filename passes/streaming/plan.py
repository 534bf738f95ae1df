"""Which weights are read by one layer alone, and which layers are streamed under a budget of memory.

A layer is what lies between two cuts of the residual stream (`residual.stream`). Weights that several layers read, or
none does (the embedding, the head), stay, and so does what lies behind the last cut that was found.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import fx

from treespec_compiler.errors import InvalidOption, Unsupported
from treespec_compiler.ir.streaming import SlotPlace

from ..framework.state import GraphState
from ..residual.stream import after_layer, cuts
from .budget import Budget

ALIGNMENT = 64
"""Of a weight in a slot: a cache line, as kernels like it."""
RING = 8 << 20
"""Bytes that a ring should hold: what a disk of 1 GB/s gives while the head runs and threads wake up. Four slots of
2.2 MB instead of two and two more resident layers took 0.073 s a step instead of 0.084 (SmolLM2-135M, 1 GB/s, two cores
that others used, too)."""
LEAST, MOST = 2, 4
"""Slots of rings where nobody said how many: one layer that computes, and one on its way."""
LAYERS_A_SLOT = 7
"""Streamed for each slot at least: every further slot is a layer that does not stay, so that a step reads more."""


@dataclass(frozen=True)
class Layer:
    """A layer of the decoder. `first` and `last`: the cuts before and behind it; its weights lie as in `places`."""

    number: int
    first: fx.Node
    last: fx.Node
    weights: tuple[fx.Node, ...]

    def places(self) -> list[SlotPlace]:
        """Where its weights lie in a slot, side by side; without the inputs' names."""
        found, offset = [], 0
        for node in self.weights:
            value = node.meta["val"]
            place = SlotPlace("", offset, tuple(value.shape), tuple(value.stride()), value.dtype)
            found.append(place)
            offset += -(-place.bytes // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def bytes(self) -> int:
        places = self.places()
        return places[-1].offset + places[-1].bytes


@dataclass(frozen=True)
class Residency:
    """`streamed` layers in order, of which `slots` are in memory; `resident`: bytes of all other weights."""

    streamed: list[Layer]
    resident: int
    slots: int


def layers(state: GraphState) -> list[Layer]:
    """The decoder's layers that have weights of their own, in order."""
    ends = _ends(state)
    order = {node: i for i, node in enumerate(state.graph.nodes)}
    found = []
    for number, (first, last) in enumerate(itertools.pairwise(ends)):
        if first is None or last is None:
            continue
        weights = [n for n in order if n.name in state.weights and _movable(n)]
        inside = [n for n in weights if all(order[first] < order[u] <= order[last] for u in n.users)]
        if inside:
            found.append(Layer(number, first, last, tuple(inside)))
    return found


def make_plan(state: GraphState, budget: Budget) -> Residency:
    """As many layers stay as the budget has room for, the first ones: while they compute, the next ones come.

    Raises InvalidOption where the budget has no room for what must stay and for the ring.
    """
    found = layers(state)
    sizes = [layer.bytes for layer in found]
    fixed = sum(_bytes(state, n.name) for n in state.graph.nodes if n.name in state.weights and n.users) - sum(sizes)
    if not found or fixed + sum(sizes) <= budget.bytes:
        return Residency([], fixed + sum(sizes), 0)
    slots = budget.slots or ring_slots(max(sizes), len(sizes), budget.bytes - fixed)
    stay = 0
    while stay < len(found) and fixed + sum(sizes[: stay + 1]) + _ring(sizes[stay + 1 :], slots) <= budget.bytes:
        stay += 1
    least = fixed + _ring(sizes, slots)
    if least > budget.bytes:
        raise InvalidOption(
            name="offload",
            got=f"room for {budget.bytes:,} bytes of weights",
            expected=f"at least {least:,}: {fixed:,} that cannot be streamed and {slots} layers of the ring",
            fix="Raise `resident_gb`, or take fewer `slots`.",
        )
    return Residency(found[stay:], fixed + sum(sizes[:stay]), min(slots, len(found) - stay))


def ring_slots(layer: int, count: int, room: int) -> int:
    """For so many layers of so many bytes, where a budget has so much room: many small ones get more than two slots."""
    streamed = count - max(0, room // layer - LEAST)
    return max(LEAST, min(MOST, -(-RING // layer), streamed // LAYERS_A_SLOT, room // layer))


def _ring(sizes: list[int], slots: int) -> int:
    return slots * max(sizes, default=0)


def _bytes(state: GraphState, name: str) -> int:
    made = state.weights[name]
    return torch.Size(made.shape).numel() * made.dtype.itemsize


def _ends(state: GraphState) -> list[fx.Node | None]:
    """The cuts before the first layer, between layers, and behind the last; None where none was found."""
    groups = cuts(state)
    ends = [group[-1] if group else None for group in groups[:-1]]
    try:
        return [*ends, after_layer(state, len(state.sites), groups)]
    except Unsupported:
        return [*ends, None]


def _movable(node: fx.Node) -> bool:
    """Whether its elements lie side by side, in some order of its dimensions."""
    value = node.meta["val"]
    pairs = sorted(zip(value.stride(), value.shape, strict=True))
    expected = 1
    for stride, size in pairs:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return bool(node.users) and value.numel() > 0
