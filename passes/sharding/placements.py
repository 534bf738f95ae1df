"""Where the numbers of a value lie: the lattice that pass "shard" computes in.

    Replicated                    every rank holds the whole value
    Sharded(dim, segments)        every rank holds a part along `dim`
    Partial                       the ranks' values add up to the value

A dimension may be laid out in segments, as a fused weight of q, k and v is: each segment is cut for itself, and a
rank's part is its pieces of all segments side by side. A segment is cut into equal blocks in rank order;
with `repeat` > 1 so many ranks in a row hold the same block (K/V heads that are fewer than ranks).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "replicated"


@dataclass(frozen=True)
class Partial:
    """The sum over the ranks is the value."""

    def __str__(self) -> str:
        return "partial sum"


@dataclass(frozen=True)
class Segment:
    """`size` numbers of the whole dimension, in ranks / `repeat` blocks."""

    size: int
    repeat: int = 1

    def fits(self, ranks: int) -> bool:
        """Whether there are so many equal blocks."""
        return ranks % self.repeat == 0 and self.size % (ranks // self.repeat) == 0 and self.size > 0

    def local(self, ranks: int) -> int:
        """Numbers of it on one rank."""
        return self.size * self.repeat // ranks

    def scaled(self, by: int) -> Segment:
        """Each of its numbers becomes `by` of them."""
        return Segment(self.size * by, self.repeat)


@dataclass(frozen=True)
class Sharded:
    """Cut along `dim`, counted from the front. `unit` names what is never cut, for people alone."""

    dim: int
    segments: tuple[Segment, ...]
    unit: str = field(default="feature", compare=False)

    @property
    def size(self) -> int:
        """Of the whole dimension."""
        return sum(s.size for s in self.segments)

    def local(self, ranks: int) -> int:
        """Of the dimension on one rank."""
        return sum(s.local(ranks) for s in self.segments)

    def moved(self, dim: int) -> Sharded:
        """The same cut along another dimension."""
        return Sharded(dim, self.segments, self.unit)

    def fits(self, ranks: int) -> bool:
        """Whether every segment has as many equal blocks as it needs."""
        return all(s.fits(ranks) for s in self.segments)

    def __str__(self) -> str:
        parts = "+".join(
            f"{s.size}" + (f" (each part on {s.repeat} ranks)" if s.repeat > 1 else "") for s in self.segments
        )
        return f"sharded by {self.unit} along dimension {self.dim} ({parts})"


Placement: TypeAlias = Replicated | Sharded | Partial

REPLICATED, PARTIAL = Replicated(), Partial()


def sharded(dim: int, segments: Iterable[Segment], ranks: int, unit: str = "feature") -> Placement:
    """A cut, or `REPLICATED` where no segment is cut."""
    found = tuple(segments)
    return REPLICATED if all(s.repeat == ranks for s in found) else Sharded(dim, found, unit)


def offsets(segments: Sequence[Segment], ranks: int, local: bool) -> list[int]:
    """Where each segment begins and the last one ends, in the whole dimension or in a rank's part."""
    return [0, *itertools.accumulate(s.local(ranks) if local else s.size for s in segments)]


def between(cut: Sharded, start: int, stop: int, ranks: int, local: bool) -> tuple[Segment, ...] | None:
    """The segments from `start` to `stop`; None where one of them is cut in two."""
    bounds = offsets(cut.segments, ranks, local)
    if start not in bounds or stop not in bounds or stop <= start:
        return None
    return cut.segments[bounds.index(start) : bounds.index(stop)]


def blocks(cut: Sharded, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of a rank's pieces in the whole dimension, in order."""
    for segment, start in zip(cut.segments, offsets(cut.segments, ranks, False), strict=False):
        size = segment.local(ranks)
        begin = start + rank // segment.repeat * size
        yield begin, begin + size
