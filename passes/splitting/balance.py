"""Layers are dealt out to stages: the largest stage is to be as small as it can be, by bytes of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def bounds(pieces: Sequence[Mapping[str, int]], stages: int) -> list[int]:
    """Where stages begin and end, as `stages + 1` numbers from 0 to the number of pieces, none of them empty.

    A piece is what lies between two places where the graph can be cut: bytes by names of its weights. A weight that
    several pieces of a stage read is there once.
    """
    count = len(pieces)
    size = _sizes(pieces)
    best: list[list[tuple[int, list[int]] | None]] = [[None] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = (0, [0])
    for stage in range(1, stages + 1):
        for end in range(stage, count + 1):
            ways = [
                (max(before[0], size(start, end)), [*before[1], end])
                for start in range(stage - 1, end)
                if (before := best[stage - 1][start]) is not None
            ]
            best[stage][end] = min(ways, default=None)
    found = best[stages][count]
    assert found is not None, "fewer pieces than stages"
    return found[1]


def _sizes(pieces: Sequence[Mapping[str, int]]) -> Callable[[int, int], int]:
    """Bytes of pieces `start .. end - 1` together."""
    table: dict[tuple[int, int], int] = {}
    for start in range(len(pieces)):
        held: dict[str, int] = {}
        total = 0
        for end in range(start, len(pieces)):
            total += sum(size for name, size in pieces[end].items() if name not in held)
            held |= pieces[end]
            table[start, end + 1] = total
    return lambda start, end: table[start, end]
