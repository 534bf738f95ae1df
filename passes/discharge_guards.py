"""discharge guards: conditions on the number of tokens that the trace took one side of.

In the tree program T counts nodes, not context, so no branch on T may be left undecided. Lengths are cut into regions
by the guards; for every region but the trace's own the model is analysed once more. If that raises an error (an
assertion, a table that ends) or cannot be converted, the region's start bounds the context; if it proves to be the same
program, the branch means nothing; otherwise the model is refused, since the trace was too short, or too long, to show
what it does. Programs are compared where both are asked: with at most n tokens no distance reaches n, so a window of n
or more is no window. A trace that is shown to be right where the first one was made takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy

from treespec_compiler.errors import PassError, Refusal, TreespecError, Unsupported
from treespec_compiler.ir.specs import Limit
from treespec_compiler.logs import logger

from .framework.manager import Pass
from .framework.state import GraphState
from .guards.meaning import same_program
from .guards.regions import DECIDED, LONGEST, Guards, about_length, decided, holds, is_lone, reach, uncovered

log = logger(__name__)

# Analyses of other regions; each takes as long as the first.
MOST_REGIONS = 8
# A context of fewer tokens is no use.
SHORTEST = 64

_SAME = "make the forward pass the same for every number of tokens"

# The model has no graph of its own there: it raises, shapes do not fit, or T is a constant. The context then ends
# before that length, which is sound whatever the model would do beyond.
_ENDS = frozenset({Refusal.NO_GRAPH, Refusal.CONTROL, Refusal.RAISES, Refusal.SPECIALISED})


def discharge_guards(state: GraphState) -> int:
    if state.other_length is None:
        log.info("the model is not at hand: %d guards on the number of tokens stay as they are", len(state.guards))
        return 0
    guards = len(state.guards)
    state.limits += decide_guards(state, functools.partial(state.other_length, before=PASS.slug), state.max_context)
    return guards


def decide_guards(state: GraphState, analyse: Callable[[int], GraphState], max_context: int | None) -> list[Limit]:
    """Decide every guard on the number of tokens; returns the capacity limits found. Raises `Unsupported`."""
    found = _Found(state, about_length(state.guards, state.length), max_context or LONGEST)
    for _ in range(MOST_REGIONS):
        other = found.next_length()
        if other is None:
            return found.limits
        _decide(found, analyse, other)
    other = found.next_length()
    if other is not None and other <= SHORTEST:
        raise Unsupported(
            Refusal.BRANCH,
            f"the model branches on the number of tokens in more than {MOST_REGIONS} ways: "
            f"{', '.join(map(str, found.regions[0]))}",
            way_out=f"{_SAME}; in a loop over pieces of the text, take pieces as long as the longest text",
        )
    if other is not None:
        found.ends_before(other, f"the model branches on the number of tokens in more than {MOST_REGIONS} ways")
    return found.limits


class _Found:
    """The regions of lengths that are known to be the same program, and where the context ends."""

    def __init__(self, state: GraphState, region: Guards, ceiling: int) -> None:
        self.state, self.regions, self.ceiling = state, [region], ceiling
        self.limits: list[Limit] = []
        self.failed: set[int] = set()
        """Lengths that the trace takes for constants."""

    def next_length(self) -> int | None:
        limit = decided(self.regions, self.state.length)
        if limit is not None and limit not in self.limits:
            self.limits.append(limit)
            self.ceiling = min(self.ceiling, DECIDED)
        return uncovered(self.regions, self.state.length, self.ceiling)

    def ends_before(self, other: int, why: str) -> None:
        self.limits.append(Limit(other - 1, f"from {other} tokens on {why}"))
        self.ceiling = other - 1

    def is_alone(self, other: int) -> bool:
        """Whether a length that the trace takes for a constant stands alone: it is then compared with the model itself
        once there is something to run."""
        if not is_lone(self.regions[:1], self.state.length, other) and not is_lone(
            self.regions, self.state.length, other
        ):
            return False
        self.state.lone_lengths.append(other)
        self.failed.discard(other)
        self.regions.append([sympy.Eq(self.state.length, other)])
        return True


def _decide(found: _Found, analyse: Callable[[int], GraphState], other: int) -> None:
    """Analyse the model with `other` tokens, which no region holds."""
    state = found.state
    if other in found.failed and found.is_alone(other):
        return
    while other in found.failed:
        other += 1
    guard = next(g for g in found.regions[0] if not holds(g, state.length, other))
    try:
        there = analyse(other)
    except PassError:  # a bug of ours says nothing about the model
        raise
    except (TreespecError, AssertionError, RuntimeError, IndexError, ValueError) as error:
        if _specialised(error) and found.is_alone(other):
            return
        if _specialised(error) and not found.failed:
            found.failed.add(other)  # as where the last of several pieces is one token: the next length shows more
            return
        if other < _example(state):
            raise Unsupported(
                Refusal.BRANCH,
                f"the model takes another branch unless {guard} (T = {state.length} tokens), and with {other} "
                f"tokens it cannot be analysed: {str(error).splitlines()[0]}",
                way_out=_SAME,
            ) from error
        what = "there is no graph (a table ends, or the code raises)"
        if isinstance(error, Unsupported) and error.kind not in _ENDS:
            what = f"the model cannot be converted ({error.reason})"
        found.ends_before(min({other, *found.failed}), f"{what}: {guard}")
        return
    if same_program(there, state, reach(there.guards, there.length)):
        found.regions.append(about_length(there.guards, there.length, state.length))
    elif same_program(there, state, reach(state.guards, state.length)):
        found.regions = [
            about_length(there.guards, there.length),
            about_length(state.guards, state.length, there.length),
        ]
        state.become(there)
    else:
        raise _too_short(guard, state, other, "does something else there")


def _example(state: GraphState) -> int:
    """The number of tokens that the trace was made with."""
    return int(state.node(state.tokens).meta["val"].shape[1].node.hint)


def _too_short(guard: Any, state: GraphState, other: int, what: str) -> Unsupported:
    return Unsupported(
        Refusal.BRANCH,
        f"the model branches on the number of tokens: the trace was made under {guard} (T = {state.length}), and with "
        f"{other} tokens it {what}, so the trace does not show what the model means",
        way_out=f"options={{'max_context': {other - 1}}} stays on this side of the branch" if other > 2 else _SAME,
    )


def _specialised(error: Exception) -> bool:
    return isinstance(error, Unsupported) and error.kind is Refusal.SPECIALISED


PASS = Pass(
    "discharge guards",
    discharge_guards,
    before="classified graph with guards on the number of tokens",
    after="every guard is a capacity of the context or proved to mean nothing; where the first trace was too short to "
    "show what a longer one does, the longer one's graph",
    needs=("token locality",),
)
