"""Regions of lengths: which numbers of tokens satisfy the conditions that a trace was made under.

Linear guards hold or fail on whole intervals, so one look on each side of every threshold decides all lengths. With a
guard that is not linear in T every length is looked at by itself, up to DECIDED.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.specs import Limit

from ..forms.turning_point import turning_point
from ..framework.state import refuse
from .numeric import of_whole_numbers

# Lengths are looked at up to here, and each one by itself up to DECIDED when a guard is not linear in T.
LONGEST = 1 << 20
DECIDED = 4096
# One length is compared by running the model on that many tokens; above this the context just ends before it.
LONGEST_RUN = 2048
MOST_LONE = 2

Guards = Sequence[sympy.Basic]


def about_length(guards: Guards, length: sympy.Symbol, name: sympy.Symbol | None = None) -> list[sympy.Basic]:
    """The guards, which must be on the number of tokens alone, under one name for it."""
    for guard in guards:
        if guard.free_symbols - {length}:
            raise refuse(Refusal.BRANCH, f"a condition on sizes cannot be decided: {guard}")
    return [g.xreplace({length: name}) if name is not None else g for g in guards]


def holds(guard: Any, length: sympy.Symbol, n: int) -> bool:
    as_function = of_whole_numbers(guard, length)
    return bool(guard.xreplace({length: sympy.Integer(n)})) if as_function is None else bool(as_function(n))


def uncovered(regions: Sequence[Guards], length: sympy.Symbol, ceiling: int) -> int | None:
    """The smallest number of tokens (2 or more) that no analysed region contains."""
    points = {2, ceiling}
    for guard in (g for region in regions for g in region):
        at = turning_point(guard, length)
        if at is None:
            points |= set(range(2, min(ceiling, DECIDED) + 1))
        else:
            points |= {int(sympy.floor(at)) + e for e in (-1, 0, 1, 2)}
    for n in sorted(p for p in points if 2 <= p <= ceiling):
        if not any(all(holds(g, length, n) for g in region) for region in regions):
            return int(n)
    return None


def decided(regions: Sequence[Guards], length: sympy.Symbol) -> Limit | None:
    """Up to where lengths are looked at one by one, where a guard is not linear in T."""
    guard = next((g for region in regions for g in region if turning_point(g, length) is None), None)
    if guard is None:
        return None
    return Limit(DECIDED, f"a condition on the number of tokens is decided up to here: {guard}")


def reach(guards: Guards, length: sympy.Symbol) -> int | None:
    """The largest number of tokens that the guards allow; None where they do not end."""
    at = [turning_point(g, length) for g in about_length(guards, length)]
    if any(t is None for t in at):
        return None
    points = {2, LONGEST} | {int(sympy.floor(t)) + e for t in at for e in (-1, 0, 1)}
    inside = [p for p in points if p >= 2 and all(holds(g, length, p) for g in guards)]
    return None if LONGEST in inside or not inside else max(inside)


def is_lone(regions: Sequence[Guards], length: sympy.Symbol, other: int) -> bool:
    """Whether no more than MOST_LONE lengths side by side, this one among them, lie in none of the regions (`T != n`).

    A single token is compared with the model anyway.
    """
    # Of one region, the guards that the length itself breaks: another guard may end the region elsewhere.
    asked = [[g for g in region if not holds(g, length, other)] if len(regions) == 1 else region for region in regions]

    def excluded(n: int) -> bool:
        return n > 1 and not any(all(holds(g, length, n) for g in region) for region in asked)

    first, last = other, other
    while excluded(first - 1) and other - first < MOST_LONE:
        first -= 1
    while excluded(last + 1) and last - other < MOST_LONE:
        last += 1
    return other <= LONGEST_RUN and last - first < MOST_LONE
