"""What a draft's call costs between the target's passes, beside what it costs in a burst of its own.

Latency tables are measured one program at a time, with its weights in the caches and its threads awake. In the loop the
target's weights push the draft's out, and the other way round. Measured, demo pair, two cores: for chains of 2, 4 and 7
and trees of 6 and 11 nodes alike, a step takes 1.7 to 2.0 times the draft's table more than the target's pass alone.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ...errors import CorruptTable
from ...ir.device import profile
from ...logs import logger
from ...tree import TokenTree
from ...user_cache import read_table, write_whole
from ..drafts.model import ModelDraft
from ..drafts.protocol import DraftRequest
from ..policies.protocol import Limits
from ..policies.static import StaticExpansion
from ..proposal import Proposal
from ..work import alone
from . import latency as cost

log = logger(__name__)

CALLS = 4
CONTEXT = 256
BUDGET = 0.15
LEAST_ROUNDS, MOST_ROUNDS = 2, 40
LARGEST = 4.0
"""A larger factor was a stall."""
_KEPT: weakref.WeakKeyDictionary[Any, dict[str, float]] = weakref.WeakKeyDictionary()


def draft_factor(target: Any, draft: Any) -> float:
    """Seconds that a call of `draft` adds to a step of `target`, over those of its latency table; at least 1.

    Kept with the draft's program, then in the user's cache, one file a pair; else measured now. 1 for drafts without
    a model of their own, and for programs that cannot be measured.
    """
    if type(draft) is not ModelDraft:
        return 1.0
    keys = cost.fingerprint(target), cost.fingerprint(draft.program)
    if None in keys:
        return 1.0
    key = hashlib.sha256(" ".join(map(str, keys)).encode()).hexdigest()[:24]
    kept = _KEPT.setdefault(draft.program, {})
    if key not in kept:
        kept[key] = _stored(cost.table_path(f"pair-{key}"), target, draft)
    return kept[key]


def _stored(path: Path, target: Any, draft: ModelDraft) -> float:
    if path.is_file():
        try:
            return read_factor(path)
        except CorruptTable as error:
            log.warning("%s It is ignored.", error)
    found = measure_factor(target, draft)
    data = {"schema": cost.SCHEMA, "meta": cost.meta(target), "draft_factor": found}
    try:
        write_whole(path, json.dumps(data, indent=1))
    except OSError as error:
        log.warning("the draft's factor %s cannot be written (%s)", path, error)
    return found


def read_factor(path: Path) -> float:
    """Raises `CorruptTable`."""
    data, expected = read_table(path, cost.SCHEMA), f"a draft_factor from 1 to {LARGEST:g}"
    found = data.get("draft_factor")
    if not isinstance(found, float) or not 1.0 <= found <= LARGEST:
        raise CorruptTable(path=str(path), problem=f"draft_factor {found!r}", expected=expected)
    return found


def measure_factor(target: Any, draft: ModelDraft, clock: Callable[[], float] = perf_counter) -> float:
    """Time whole steps, and the target's and the draft's passes in bursts, by turns; medians of at least two rounds."""
    room = CALLS + 2 * MOST_ROUNDS + 1
    limits = [p.max_context for p in (target, draft.program) if p.max_context is not None]
    context = max(1, min([CONTEXT, *(limit - room for limit in limits)]))
    own, target_cache = (p.new_cache(max_tokens=context + room) for p in (draft.program, target))
    own._lengths, target_cache._lengths = [context], [context]
    one, chain = TokenTree._trusted([0], [-1]), TokenTree._trusted([0] * (CALLS + 1), range(-1, CALLS))
    request = DraftRequest(target.vocab_size, context + room, CALLS + 1, target=target, cache=target_cache)
    session = draft.open(request)
    session.accept([0] * (context + 1))
    policy, most = StaticExpansion((1,) * CALLS), Limits(CALLS, CALLS + 1)

    def step() -> Any:
        found = session.propose(policy, most)
        proposal = found if isinstance(found, Proposal) else alone(found)
        out = target.verify(proposal.tree(), target_cache)
        session.accept([0])
        return out

    calls = (lambda: target.verify(chain, target_cache), lambda: draft.program.verify(one, own), step)
    seconds: list[list[float]] = [[], [], []]
    with torch.inference_mode():
        step()  # runs the draft's prompt
        began = clock()
        while len(seconds[0]) < LEAST_ROUNDS or (clock() - began < BUDGET and len(seconds[0]) < MOST_ROUNDS):
            for call, found in zip(calls, seconds, strict=True):
                call()  # the first of a burst follows another program
                found.append(_seconds(call, clock))
    session.close()
    passes, draft_call, steps = (median(found) for found in seconds)
    return min(LARGEST, max(1.0, (steps - passes) / (CALLS * draft_call))) if draft_call > 0 else 1.0


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    profile(call().device).synchronize()
    return clock() - began
