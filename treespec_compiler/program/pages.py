"""Which pages of a pool are free, how many slots hold each of the others, and what is known to lie in them.

A page is held once for every slot whose table names it. A full page of committed tokens is known by its block: the
block before it and its own tokens. Slots that begin with the same tokens find the same blocks, and hold their pages
together. A known page that nobody holds any more stays known until it is needed for something else, the one that was
let go longest ago first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import OutOfPages

Block: TypeAlias = tuple[int, tuple[int, ...]]
"""(the serial number of the block before, or `FIRST`; the tokens). Not a hash: equal blocks are equal."""
FIRST = 0


@dataclass(frozen=True, slots=True)
class PageCounts:
    """What the pages of a pool are used for."""

    total: int
    held: int
    """By one slot or more."""
    shared: int
    """By two slots or more."""
    idle: int
    """Held by nobody, but known: they are found again, or taken for something else."""

    @property
    def free(self) -> int:
        """That can be taken, the idle ones included."""
        return self.total - self.held


class Pages:
    """`count` pages of `size` tokens. All operations take constant time."""

    def __init__(self, count: int, size: int, forgotten: Callable[[int], None] = lambda serial: None) -> None:
        self.count, self.size = count, size
        self._forgotten = forgotten  # called with the serial number of a page of which nothing is known any more
        self._holders = [0] * count
        self._blank = [*reversed(range(count))]  # held by nobody and not known; the last one is taken first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[Block, int] = {}
        self._block_of: list[Block | None] = [None] * count
        self._serial_of = [FIRST] * count
        self._serials = FIRST
        self._shared = 0

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def counts(self) -> PageCounts:
        return PageCounts(self.count, self.count - self.free, self._shared, len(self._idle))

    def holders(self, page: int) -> int:
        """How many hold it."""
        return self._holders[page]

    def take(self) -> int:
        """A page that nobody holds, held once from now on; raises `OutOfPages`."""
        if self._blank:
            page = self._blank.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self.forget(page)
        else:
            raise OutOfPages(wanted=1, free=0, total=self.count, page_size=self.size)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Once more; a known page may be held by nobody before."""
        if not self._holders[page]:
            del self._idle[page]
        self._holders[page] += 1
        self._shared += self._holders[page] == 2

    def drop(self, page: int) -> None:
        """Once less."""
        self._holders[page] -= 1
        self._shared -= self._holders[page] == 1
        if not self._holders[page]:
            if self._block_of[page] is None:
                self._blank.append(page)
            else:
                self._idle[page] = None

    def find(self, before: int, tokens: Sequence[int]) -> int | None:
        """The page of this block; `before` is the serial number of the one before it."""
        return self._page_of.get((before, tuple(tokens)))

    def beginning(self, tokens: Sequence[int], most: int) -> list[int]:
        """The pages of these tokens from the first on, as far as they are known, of `most` tokens at most."""
        before, found = FIRST, list[int]()
        for start in range(0, most // self.size * self.size, self.size):
            page = self.find(before, tokens[start : start + self.size])
            if page is None:
                break
            found.append(page)
            before = self.serial(page)
        return found

    def serial(self, page: int) -> int:
        """The number by which the next block names this page's, which must be known."""
        return self._serial_of[page]

    def know(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """The page, held once, has become this block. If another page is, that one is held instead, and returned."""
        block = (before, tuple(tokens))
        other = self._page_of.get(block)
        if other is not None and other != page:
            self.hold(other)
            self.drop(page)
            return other
        self._serials += 1
        self._page_of[block], self._block_of[page], self._serial_of[page] = page, block, self._serials
        return page

    def forget_all(self) -> None:
        """Nothing is known of any page: what lies there is not what the model would compute now."""
        self.forget_idle()
        for page in range(self.count):
            self.forget(page)

    def forget_idle(self) -> None:
        """Nothing is known of the pages that nobody holds."""
        for page in self._idle:
            self.forget(page)
        self._blank += self._idle
        self._idle.clear()

    def forget(self, page: int) -> None:
        """Nothing is known of this page, which somebody holds, any more: it is about to be written to."""
        block = self._block_of[page]
        if block is not None:
            del self._page_of[block]
            self._forgotten(self._serial_of[page])
            self._block_of[page], self._serial_of[page] = None, FIRST
