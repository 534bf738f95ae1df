"""What an engine's steps take: the latency tables, corrected by the steps that were made.

A machine that does other things too is slower at everything, at one time more than at another. So what steps with trees
take is kept in proportion to plain steps of the same time, of which some are made between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..cost.latency import CostModel
from .auto import OUTLIER

SLOWER = 1.25
"""So much slower than is known a prompt may make prompts seem; a faster one counts at once. The first ones are slow."""
LIKE_PROMPTS = (1, 8, 16)
SMOOTHING = 0.1
"""Weight of a measurement beside many."""


@dataclass(frozen=True, slots=True)
class Took:
    """A step in which the target ran no prompts."""

    requests: int
    nodes: int
    """Verified, of all requests together."""
    rows: Sequence[int]
    """Nodes that each call of the draft ran."""
    prompts: int
    """Tokens of prompts that it ran."""
    tokens: int
    """Given to requests."""
    verify: float
    draft: float
    rest: float
    """Seconds of the target's call, of everything before it, and of everything after it."""

    @property
    def plain(self) -> bool:
        return self.nodes == self.requests and not self.rows

    @property
    def seconds(self) -> float:
        return self.verify + self.draft + self.rest


@dataclass
class Factors:
    """Of measured seconds on predicted ones, by the number of nodes to a power of two."""

    known: dict[int, tuple[float, int]] = field(default_factory=dict)
    """And how many measurements say so."""

    def at(self, nodes: int) -> float:
        """Of the nearest size that was seen; 1 where none was."""
        if not self.known:
            return 1.0
        key = nodes.bit_length()
        return self.known[min(self.known, key=lambda seen: (abs(seen - key), seen))][0]

    def note(self, nodes: int, found: float) -> None:
        before, (_, seen) = self.at(nodes), self.known.get(nodes.bit_length(), (1.0, 1))
        weight = max(SMOOTHING, 1 / (seen + 1))
        self.known[nodes.bit_length()] = before + weight * (min(found, OUTLIER * before) - before), seen + 1

    def doubt(self) -> None:
        """All that was seen was long ago: half of it is taken back, and the rest counts little."""
        self.known = {key: ((1.0 + value) / 2, 1) for key, (value, _) in self.known.items()}


@dataclass
class StepCosts:
    """The tables, with factors on them, and seconds beside the calls."""

    tables: CostModel
    plain: Factors = field(default_factory=Factors)
    """Of steps without trees, by requests. A step with trees may have as many nodes, but says nothing of these."""
    verify: Factors = field(default_factory=Factors)
    """Of the target's calls on trees: times the plain one."""
    draft: Factors = field(default_factory=Factors)
    """Of the draft's calls: times the plain one."""
    target_prompt: float | None = None
    draft_prompt: dict[int, float] = field(default_factory=dict)
    """Seconds of a token of a prompt, for the target and by draft."""
    plain_rest: float | None = None
    """Seconds of a request and step beside the calls."""
    tree_rest: float | None = None
    """In steps with trees."""

    def note(self, took: Took, draft: int, context: int, plain: bool) -> None:
        """A step was made; `plain`: no request was to have a tree."""
        tables, base, rest = self.tables, self.plain.at(took.requests), took.rest
        if plain:
            if took.plain:
                self.plain.note(took.requests, took.verify / tables.verify(took.requests, context))
                self.plain_rest = smoothed(self.plain_rest, (rest + took.draft) / took.requests)
            return
        self.verify.note(took.nodes, took.verify / tables.verify(took.nodes, context) / base)
        expected = tables.draft(draft, took.rows, context) * base
        if took.prompts:
            nodes = expected * self.draft.at(max(took.rows))
            found = max(0.0, took.draft - nodes) / took.prompts
            self.draft_prompt[draft] = min(found, SLOWER * self._prompt_token(draft))
        elif expected > 0:
            self.draft.note(max(took.rows), took.draft / expected)
        else:
            rest += took.draft  # of drafts that run no program
        self.tree_rest = smoothed(self.tree_rest, rest / took.requests)

    def doubt(self) -> None:
        """What was seen of trees was long ago."""
        self.verify.doubt()
        self.draft.doubt()

    def plain_seconds(self, requests: int, context: int) -> float:
        """Of a step without trees."""
        rest = self.plain_rest or 0.0
        return self.tables.verify(requests, context) * self.plain.at(requests) + rest * requests

    def tree_seconds(self, requests: int, draft: int, nodes: int, rows: Sequence[int], context: int) -> float:
        """Of a step that verifies so many nodes, the roots included, with calls of the draft on `rows` nodes each."""
        tables, base = self.tables, self.plain.at(requests)
        found = tables.verify(nodes, context) * base * self.verify.at(nodes)
        if rows:
            found += tables.draft(draft, rows, context) * base * self.draft.at(max(rows))
        if self.tree_rest is None:
            drawn = tables.sampled_row * (sum(rows) + nodes - requests)
            return found + (self.plain_rest or 0.0) * requests + tables.overhead + drawn
        return found + self.tree_rest * requests

    def prompted(self, tokens: int, seconds: float) -> None:
        """The target ran prompts, and nothing else."""
        known = self.target_prompt
        self.target_prompt = seconds / tokens if known is None else min(seconds / tokens, SLOWER * known)

    def prompt_seconds(self, draft: int, tokens: int) -> float:
        """Of a draft's prompt."""
        return self._prompt_token(draft) * tokens

    def _prompt_token(self, draft: int) -> float:
        """Before the draft ran any: as much less than the target's as its calls take less. NOTE tables end long before
        prompts do, and what follows from their last slope may be off by far."""
        if draft in self.draft_prompt:
            return self.draft_prompt[draft]
        target, table = self.tables.target, self.tables.drafts[draft]
        if table is None:
            return 0.0
        most = LIKE_PROMPTS[-1]
        known = target.seconds(most) / most if self.target_prompt is None else self.target_prompt
        return known * min(1.0, *(table.seconds(n) / target.seconds(n) for n in LIKE_PROMPTS))


def smoothed(known: float | None, found: float) -> float:
    return found if known is None else known + SMOOTHING * (min(found, OUTLIER * known) - known)
