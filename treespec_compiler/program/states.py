"""What a tree cache holds besides K/V: a state of every slot, and a stash of the uncommitted nodes of all of them.

A slot's state is of its committed tokens, however many; where none are committed, whatever lies there means zeros. The
rows of the stash are shared: a slot takes as many as its tree has nodes, and gives them back when it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.specs import StateSpec
from ..ir.states import advanced

# Rows of the stash to begin with; where they do not suffice, there are twice as many.
FIRST_ROWS = 64


class StatePools:
    """States and stashes of the sites, those of one shape side by side."""

    def __init__(self, specs: Sequence[StateSpec], slots: int, device: torch.device) -> None:
        self._device = device
        self._groups: dict[object, list[StateSpec]] = {}
        for spec in specs:
            key = (spec.kind, spec.shape, spec.width, spec.dtype, spec.sizes)
            self._groups.setdefault(key, []).append(spec)
        self._rows: list[list[int]] = [[] for _ in range(slots)]
        self._free = [*range(FIRST_ROWS)][::-1]
        self._states = [_zeros(group, [slots, *group[0].shape], device) for group in self._groups.values()]
        self._stashes: list[Tensor] = []
        self.tensors: list[Tensor] = []
        """The stash and the state of site 0, then of site 1, and so on."""
        self._allocate(FIRST_ROWS)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._states, *self._stashes))

    def rows(self, slot: int, nodes: int) -> tuple[list[int], bool]:
        """Where the slot's uncommitted nodes lie in stashes, so many of them; and whether stashes were made anew."""
        rows, grown = self._rows[slot], False
        while len(rows) < nodes:
            if not self._free:
                count = self._stashes[0].shape[1]
                self._allocate(2 * count)
                self._free = [*range(count, 2 * count)][::-1]
                grown = True
            rows.append(self._free.pop())
        return rows[:nodes], grown

    def drop(self, slot: int) -> None:
        """The slot has no uncommitted nodes any more."""
        self._free += self._rows[slot][::-1]
        self._rows[slot] = []

    def commit(self, slot: int, nodes: Sequence[int], first: bool) -> None:
        """`move`, and the slot has no uncommitted nodes any more."""
        self.move(slot, nodes, first)
        self.drop(slot)

    def move(self, slot: int, nodes: Sequence[int], first: bool) -> None:
        """Move the slot's state by these uncommitted nodes, a path; `first`: nothing was committed before."""
        if nodes:
            rows = torch.tensor([self._rows[slot][node] for node in nodes], device=self._device)
            for group, states, stashes in zip(self._groups.values(), self._states, self._stashes, strict=True):
                before = torch.zeros_like(states[:, slot]) if first else states[:, slot]
                states[:, slot] = advanced(group[0], before, stashes.index_select(1, rows))

    def snapshot(self, slot: int) -> list[Tensor]:
        """The slot's states as they are now, [sites, ..] each, by their shapes."""
        return [states[:, slot].clone() for states in self._states]

    def restore(self, slot: int, snapshot: Sequence[Tensor]) -> None:
        """The slot's states are what they were when this was taken, of any slot."""
        with torch.no_grad():
            for states, kept in zip(self._states, snapshot, strict=True):
                states[:, slot] = kept

    def _allocate(self, rows: int) -> None:
        """Stashes of so many rows, which begin with what there is."""
        old = self._stashes
        # NOTE tensors made in inference mode could be written in no other.
        with torch.inference_mode(False), torch.no_grad():
            self._stashes = [_zeros(g, [rows, g[0].width], self._device) for g in self._groups.values()]
            for new, before in zip(self._stashes, old):
                new[:, : before.shape[1]] = before
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for group, states, stashes in zip(self._groups.values(), self._states, self._stashes, strict=True):
            found.update((spec.index, (stashes[i], states[i])) for i, spec in enumerate(group))
        self.tensors = [tensor for index in sorted(found) for tensor in found[index]]


def _zeros(group: Sequence[StateSpec], shape: Sequence[int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(len(group), *shape, dtype=group[0].dtype, device=device)
