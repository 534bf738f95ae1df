"""States of whole beginnings, kept at the ends of pages: who begins with the same tokens starts from one of them.

A page's K/V are of its own tokens, a state is of all tokens so far, and takes as much as thousands of tokens' K/V. So
there are few: of each slot the one at the last page border of its prompt and of what it generated, and one where the
tokens of two slots were seen to part. Beyond `limit`, the one that was used longest ago is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

KeptStates: TypeAlias = Sequence[Tensor]
"""Of a slot: its states [sites, ..], by their shapes."""

PER_SLOT = 2
"""Checkpoints there may be, by the slots of a cache: at the end of a prompt, and behind what was generated."""


class Checkpoints:
    """By the serial number (`pages.Pages.serial`) of the page at whose end a state was as it is kept here."""

    def __init__(self, slots: int) -> None:
        self.limit = PER_SLOT * slots
        self._kept: OrderedDict[int, KeptStates] = OrderedDict()
        self._latest: dict[
            tuple[int, bool], int
        ] = {}  # (slot, whether of its prompt) -> one that the next one replaces

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for snapshot in self._kept.values() for t in snapshot)

    def has(self, serial: int) -> bool:
        return serial in self._kept

    def find(self, serial: int) -> KeptStates:
        """The one of this page, which there is; it stays where the slot that made it goes on."""
        self._stay(serial)
        self._kept.move_to_end(serial)
        return self._kept[serial]

    def keep(self, serial: int, snapshot: KeptStates, slot: int, prompt: bool, parted: bool) -> None:
        """`prompt`: whether the tokens before are one's, or generated. `parted`: others go on from here, too."""
        if parted:
            self._stay(serial)
        elif serial not in self._kept:
            former = self._latest.get((slot, prompt))
            if former is not None:
                self.drop(former)
            self._latest[slot, prompt] = serial
        self._kept.setdefault(serial, snapshot)
        self._kept.move_to_end(serial)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)

    def _stay(self, serial: int) -> None:
        """The slot that made it may replace it no more."""
        self._latest = {owner: kept for owner, kept in self._latest.items() if kept != serial}

    def drop(self, serial: int) -> None:
        """Its page is not known any more."""
        self._kept.pop(serial, None)

    def leave(self, slot: int) -> None:
        """Whoever takes the slot next replaces none of its checkpoints."""
        for prompt in (True, False):
            self._latest.pop((slot, prompt), None)
