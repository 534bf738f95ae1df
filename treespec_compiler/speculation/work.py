"""What requests and drafts want run.

They are generators: they yield work and are sent its logits. So whoever drives them decides when it runs, and packs
what several of them want of one program into one forest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar, cast

from torch import Tensor

from ..tree import Forest, TokenTree
from .slots import Slot


class Nodes(NamedTuple):
    """New nodes `start ..` of the slot's uncommitted tree; the answer: logits [new nodes, V] after the path to each."""

    slot: Slot
    tree: TokenTree
    start: int = 0


class Prompt(NamedTuple):
    """Tokens to commit to the slot; the answer: next-token logits [V] after them."""

    slot: Slot
    tokens: Sequence[int]


Work: TypeAlias = Nodes | Prompt
T = TypeVar("T")
Working: TypeAlias = Generator[Work, Tensor, T]
"""Yields work, is sent its logits, which are valid until it yields again, and returns a T."""


def perform(wanted: Sequence[Work]) -> Iterator[tuple[int, Tensor | Exception]]:
    """Run everything, a call for all nodes of one program and cache.

    Gives places in `wanted` and their logits, or why the call failed. NOTE logits are valid until the program's next
    call, so they are to be used before the next item is asked for.
    """
    if len(wanted) == 1:  # the commonest case, without the bookkeeping
        yield 0, _answer(wanted[0])
        return
    groups: dict[tuple[int, int], list[int]] = {}
    for place, work in enumerate(wanted):
        if isinstance(work, Nodes):
            groups.setdefault((id(work.slot.program), id(work.slot.cache)), []).append(place)
        else:
            yield place, _answer(work)
    for places in groups.values():
        try:
            logits = _together([cast("Nodes", wanted[place]) for place in places])
        except Exception as error:
            yield from ((place, error) for place in places)
        else:
            yield from zip(places, logits, strict=True)


def _answer(work: Work) -> Tensor | Exception:
    """Of one piece of work."""
    slot = work.slot
    try:
        if isinstance(work, Prompt):
            return slot.program.prefill(work.tokens, slot.cache, slot=slot.index)
        forest = Forest._trusted(((slot.index, work.tree),))
        if work.start:
            return slot.program.extend(forest, slot.cache, {slot.index: work.start})
        return slot.program.verify(forest, slot.cache)
    except Exception as error:
        return error


def _together(parts: Sequence[Nodes]) -> Sequence[Tensor]:
    slot = parts[0].slot
    forest = Forest._trusted([(part.slot.index, part.tree) for part in parts])
    logits = slot.program.extend(forest, slot.cache, {part.slot.index: part.start for part in parts})
    return logits.split([len(part.tree.tokens) - part.start for part in parts])


def alone(works: Working[T]) -> T:
    """Drive one generator to its end, each of its parts in a call of its own."""
    try:
        wanted = next(works)
        while True:
            ((_, answer),) = perform([wanted])
            wanted = works.throw(answer) if isinstance(answer, Exception) else works.send(answer)
    except StopIteration as end:
        return end.value
