"""What the ops over trees that keep a state read of each request: its new nodes, its rows of the stash, its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RequestRows:
    """One request of a call. Its new nodes are `begin` to `end`, the last of `nodes` uncommitted ones."""

    begin: int
    end: int
    nodes: int
    rows: Tensor
    """[nodes]: where the stash keeps each of them."""
    committed: Tensor
    """The slot's state; zeros where nothing is committed."""

    @property
    def old(self) -> int:
        """How many of the nodes an earlier call kept."""
        return self.nodes - (self.end - self.begin)


def request_rows(
    state: Tensor, node_offsets: Tensor, prefix_lens: Tensor, tree_lens: Tensor, state_slots: Tensor, state_rows: Tensor
) -> Iterator[RequestRows]:
    """The requests that have new nodes, in order."""
    bounds, first = node_offsets.tolist(), 0
    requests = zip(state_slots.tolist(), prefix_lens.tolist(), tree_lens.tolist(), strict=True)
    for r, (slot, prefix, nodes) in enumerate(requests):
        rows = state_rows[first : first + nodes]
        first += nodes
        if bounds[r] < bounds[r + 1]:
            committed = state[slot] if prefix else torch.zeros_like(state[slot])
            yield RequestRows(bounds[r], bounds[r + 1], nodes, rows, committed)
