"""What requests and drafts want run.

They are generators: they yield work and are sent its answer. So whoever drives them decides when it runs, and packs
what several of them want of one program into one forest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from ..ir.verify import LOGITS
from ..tree import Forest, TokenTree
from .slots import Slot


class Nodes(NamedTuple):
    """New nodes `start ..` of the slot's uncommitted tree; the answer: logits [new nodes, V] after the path to each."""

    slot: Slot
    tree: TokenTree
    start: int = 0
    outputs: tuple[str, ...] | None = None
    """As in `TreeProgram.verify`: the answer is a dictionary of the tensors of these names."""


class Prompt(NamedTuple):
    """Tokens to commit to the slot; the answer: next-token logits [V] after them."""

    slot: Slot
    tokens: Sequence[int]
    outputs: tuple[str, ...] | None = None
    """As in `TreeProgram.prefill`: the answer is a dictionary of the tensors of these names."""


Work: TypeAlias = Nodes | Prompt
WorkResult: TypeAlias = Tensor | Mapping[str, Tensor]
"""Logits, or the outputs that the work names, by name."""
T = TypeVar("T")
Working: TypeAlias = Generator[Work, Any, T]
"""Yields work, is sent its `WorkResult`, which is valid until it yields again, and returns a T."""


def perform(wanted: Sequence[Work], mixed: bool = False) -> Iterator[tuple[int, WorkResult | Exception]]:
    """Run everything, a call for all nodes of one program and cache; with `mixed`, for their prompts too.

    Gives places in `wanted` and their answers, or why they failed: where a call of several fails, each is run alone, so
    that those go on whose fault it is not. Nodes that want different outputs of a program are one call all the same,
    for all of these; prompts that want any are calls of their own. NOTE answers are valid until the program's next
    call, so they are to be used before the next item is asked for.
    """
    if len(wanted) == 1:  # the commonest case, without the bookkeeping
        yield 0, _answer(wanted[0])
        return
    groups: dict[tuple[int, int], list[int]] = {}
    for place, work in enumerate(wanted):
        if isinstance(work, Nodes) or (mixed and work.outputs is None):
            groups.setdefault((id(work.slot.program), id(work.slot.cache)), []).append(place)
        else:
            yield place, _answer(work)
    for places in groups.values():
        try:
            answers = _together([wanted[place] for place in places])
        except Exception as error:
            yield from ((place, error if len(places) == 1 else _answer(wanted[place])) for place in places)
        else:
            yield from zip(places, answers, strict=True)


def run(work: Work) -> WorkResult:
    """The answer to one piece of work, by a call of its own."""
    slot = work.slot
    program, cache, index = slot.program, slot.cache, slot.index
    if isinstance(work, Prompt):
        return program.prefill(work.tokens, cache, slot=index, **_named(work.outputs))
    _, tree, start, outputs = work
    if index == 0 and outputs is None:  # the commonest case, without a forest and keywords
        return program.extend(tree, cache, start) if start else program.verify(tree, cache)
    forest = Forest._trusted(((index, tree),))
    if start:
        return program.extend(forest, cache, {index: start}, **_named(outputs))
    return program.verify(forest, cache, **_named(outputs))


def _answer(work: Work) -> WorkResult | Exception:
    try:
        return run(work)
    except Exception as error:
        return error


def _together(works: Sequence[Work]) -> Sequence[WorkResult]:
    """Of works on one cache. Prompts among them want no named outputs."""
    parts = [work for work in works if isinstance(work, Nodes)]
    prompts = [work for work in works if isinstance(work, Prompt)]
    if not prompts:
        return _forest(parts)
    if any(part.outputs is not None for part in parts):
        return _merged(works, _forest(parts), _mixed([], prompts))
    answers = _mixed(parts, prompts)
    return _merged(works, answers[: len(parts)], answers[len(parts) :])


def _mixed(parts: Sequence[Nodes], prompts: Sequence[Prompt]) -> Sequence[Tensor]:
    slot = prompts[0].slot
    trees = [(part.slot.index, part.tree, part.start) for part in parts]
    return slot.program.mixed(trees, [(prompt.slot.index, prompt.tokens) for prompt in prompts], slot.cache)


def _merged(works: Sequence[Work], nodes: Sequence[WorkResult], prompts: Sequence[WorkResult]) -> list[WorkResult]:
    """The answers in the order of `works`."""
    of_nodes, of_prompts = iter(nodes), iter(prompts)
    return [next(of_nodes) if isinstance(work, Nodes) else next(of_prompts) for work in works]


def _forest(parts: Sequence[Nodes]) -> Sequence[WorkResult]:
    slot = parts[0].slot
    forest = Forest._trusted([(part.slot.index, part.tree) for part in parts])
    starts = {part.slot.index: part.start for part in parts}
    outputs = _union([part.outputs for part in parts])
    found: Any = slot.program.extend(forest, slot.cache, starts, **_named(outputs))
    sizes = [len(part.tree.tokens) - part.start for part in parts]
    if outputs is None:
        return found.split(sizes)
    split = {name: found[name].split(sizes) for name in outputs}
    return [
        split[LOGITS][at] if part.outputs is None else {name: split[name][at] for name in part.outputs}
        for at, part in enumerate(parts)
    ]


def _named(outputs: tuple[str, ...] | None) -> dict[str, Any]:
    """Keywords of a program's call; not every program has named outputs."""
    return {} if outputs is None else {"outputs": outputs}


def _union(wanted: Sequence[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    """What one call has to return for all of these; None: logits alone."""
    if all(outputs is None for outputs in wanted):
        return None
    return tuple(dict.fromkeys(name for outputs in wanted for name in outputs or (LOGITS,)))


def alone(works: Working[T]) -> T:
    """Drive one generator to its end, each of its parts in a call of its own."""
    send = works.send
    try:
        wanted = next(works)
        while True:
            try:
                answer = run(wanted)
            except Exception as error:
                wanted = works.throw(error)
            else:
                wanted = send(answer)
    except StopIteration as end:
        return end.value
