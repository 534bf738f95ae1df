"""Pipeline strings: `default,mine,-fuse` becomes an ordered list of passes that can follow each other.

Words are read from left to right: `default` stands for every pass of the default pipeline, a name adds a pass, `-name`
takes one out. A string that starts with `-name` starts from `default`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from treespec_compiler.errors import InvalidPipeline
from treespec_compiler.ir.verify import LEVELS

from .manager import Pass, slug

DEFAULT = "default"


def standard(step: Pass) -> bool:
    """What `default` stands for where no model is at hand."""
    return step.standard


def plan(
    text: str | None,
    ordered: Sequence[Pass],
    others: Mapping[str, Pass] = MappingProxyType({}),
    wanted: Callable[[Pass], bool] = standard,
) -> list[Pass]:
    """The passes that `text` asks for, in order.

    `ordered` are treespec's own, of which `default` stands for those that are `wanted`; `others` are those of users.
    """
    words = [w for w in (slug(w) for w in (text or DEFAULT).split(",")) if w]
    if not words or words[0].startswith("-"):
        words.insert(0, DEFAULT)
    known = {p.slug: p for p in ordered} | dict(others)
    chosen: list[Pass] = []
    for word in words:
        if word == DEFAULT:
            chosen += [p for p in ordered if wanted(p) and p not in chosen]
        elif word.startswith("-"):
            gone = _find(word[1:], known)
            chosen = [p for p in chosen if p.name != gone.name]
        else:
            step = _find(word, known)
            if any(p.name == step.name for p in chosen):
                raise InvalidPipeline(got=f"pass {word!r} twice", expected="every pass at most once")
            chosen.append(step)
    placed = _place(chosen, [p.slug for p in ordered])
    _check_levels(placed, ordered)
    return placed


def _find(name: str, known: Mapping[str, Pass]) -> Pass:
    found = known.get(slug(name))
    if found is None:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else "`treespec passes` lists them."
        raise InvalidPipeline(got=f"no pass {name!r}", expected=f"one of {', '.join(known)}", fix=fix)
    return found


def _place(chosen: list[Pass], order: list[str]) -> list[Pass]:
    """Move passes with `place_after`/`place_before` to where those say; the others keep their places."""
    placed = [p for p in chosen if not p.place_after and not p.place_before]
    waiting = [p for p in chosen if p not in placed]
    names = {p.slug for p in waiting}
    while waiting:
        # A pass that refers to another waiting one goes after it.
        ready = [p for p in waiting if not names & {slug(n) for n in p.place_after + p.place_before} - {p.slug}]
        if not ready:
            raise InvalidPipeline(
                got=f"passes that wait for each other: {', '.join(p.name for p in waiting)}",
                expected="an order without cycles",
            )
        # Reversed, so that passes placed behind the same one stand as they were written, as those in front of it do.
        behind, in_front = [p for p in ready if p.place_after], [p for p in ready if not p.place_after]
        for step in (*reversed(behind), *in_front):
            placed.insert(_spot(step, [p.slug for p in placed], order), step)
            waiting.remove(step)
            names.discard(step.slug)
    return placed


def _spot(step: Pass, placed: list[str], order: list[str]) -> int:
    low = max((_end(slug(n), placed, order) for n in step.place_after), default=0)
    high = min((_start(slug(n), placed, order) for n in step.place_before), default=len(placed))
    if low > high:
        raise InvalidPipeline(
            got=f"pass {step.name!r} after {', '.join(step.place_after)} and before {', '.join(step.place_before)}",
            expected="a place that satisfies both",
            fix="Those passes run in the other order; `treespec passes` shows it.",
        )
    return low if step.place_after else high


def _end(name: str, placed: list[str], order: list[str]) -> int:
    """The first place behind `name`; if it is not run, behind the passes that precede it in order."""
    if name in placed:
        return placed.index(name) + 1
    if name not in order:
        raise InvalidPipeline(got=f"a place after {name!r}", expected="a pass of the pipeline")
    earlier = order[: order.index(name)]
    return max((i + 1 for i, p in enumerate(placed) if p in earlier), default=0)


def _start(name: str, placed: list[str], order: list[str]) -> int:
    if name in placed:
        return placed.index(name)
    if name not in order:
        raise InvalidPipeline(got=f"a place before {name!r}", expected="a pass of the pipeline")
    later = order[order.index(name) + 1 :]
    return min((i for i, p in enumerate(placed) if p in later), default=len(placed))


def needed_level(step: Pass, ordered: Sequence[Pass]) -> str | None:
    """The level that one of treespec's own passes finds the graph at; None for others."""
    level = LEVELS[0]
    for other in ordered:
        if other.name == step.name:
            return level
        level = other.level or level
    return None


def _check_levels(passes: Sequence[Pass], ordered: Sequence[Pass]) -> None:
    """Every pass must find a graph at the level it was written for."""
    level = LEVELS[0]
    for step in passes:
        needed = needed_level(step, ordered)
        late = needed is not None and LEVELS.index(level) < LEVELS.index(needed)
        early = step.level is not None and LEVELS.index(level) >= LEVELS.index(step.level)
        if late or early:
            maker = next((p.name for p in ordered if p.level == needed), "capture")
            raise InvalidPipeline(
                got=f"pass {step.name!r} on a graph at level {level!r}",
                expected=f"a graph at level {needed!r}",
                fix=f"Run {maker!r} before it." if late else "Keep the order that `treespec passes` shows.",
            )
        level = step.level or level
