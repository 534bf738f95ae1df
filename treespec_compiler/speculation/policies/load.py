"""Trees as a function of load: one budget of nodes a step for all requests of an engine.

A step's seconds grow with all nodes that are verified and all that drafts run, whosever they are, so a node is worth
its place if it adds more expected tokens a second than the step has without it. Every request's best trees are known
from its acceptance by rank (`sequoia.greedy_nodes`); their nodes are taken in the order of their value, whosever they
are, up to where all tokens a second are most (the goodput of SmartSpec, arXiv 2406.14066, which chooses the length of
chains by it). With more requests a node costs more, and trees narrow to chains, to nothing.

The seconds are those of the latency tables, corrected by what steps of about as many nodes took in this engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cost.acceptance import GREEDY, RANKS, Acceptance, split
from ..cost.latency import CostModel
from ..proposal import Proposal
from .auto import HYSTERESIS, KNOWN, LONGEST_WAIT, OUTLIER, REGRET, Auto, cost_model
from .fixed import FixedTree
from .protocol import Control, TreePolicy
from .sequoia import greedy_nodes

POOL = 6.0
"""Tries that the acceptance of all requests counts for, beside a request's own."""
INTERVALS = (2, 16)
"""Steps between plans: doubles from the first to the last, and begins again when requests come or go."""
SMOOTHING, FIRST = 0.1, 0.5
"""Weights of a measurement beside what is known: where as many nodes were seen before, and where not."""
MARGIN = 1.03
"""What speculation must promise over plain decoding, with what was measured here; at first `HYSTERESIS`."""
TRIAL_LEVELS = 2
MOST = 96
"""Nodes of all requests that are looked at: planning must stay short beside a step."""
PLAIN_EVERY, PLAIN_STEPS = 512, 2
"""So many plain steps are made for each power of two of requests, and again after so many steps: what they take cannot
be told from steps with trees, which a busy machine makes slower as well."""


@dataclass(frozen=True)
class Loaded(Auto):
    """`policy="auto"` in an engine. Output of a given seed must not depend on who else is there: its trees are chosen
    by its own tokens alone."""

    load: Load = field(default_factory=lambda: Load(), compare=False)

    def control(self, target: Any, drafts: Sequence[Any]) -> Control:
        if not self.remember:
            return super().control(target, drafts)
        self.load.prepare(lambda: cost_model(target, drafts, self.kind != GREEDY))
        return Share(self, [self._memory(target, draft, drafts) for draft in drafts])


class Share:
    """One request's part of the budget. `plan` and `observe` as in `Controller`."""

    def __init__(self, policy: Auto, pools: Sequence[Acceptance]) -> None:
        self.policy, self.pools = policy, pools
        self.own = [Acceptance() for _ in pools]
        self.trees: list[FixedTree | None] = [None] * len(pools)
        self.context = self.remaining = 0
        self.asked = False
        """Whether it has a tree in the step under way."""

    def plan(self, context: int, remaining: int) -> Sequence[TreePolicy | None]:
        self.asked = any(tree is not None for tree in self.trees)
        return self.trees

    def observe(
        self, proposal: Proposal, path: Sequence[int], tokens: int, verify: float, draft: float, rest: float
    ) -> None:
        active = [i for i, tree in enumerate(self.trees) if tree is not None]
        parts = split(proposal, path)
        if len(parts) == len(active):
            for i, (part, nodes) in zip(active, parts, strict=True):
                self.own[i].observe(part, nodes)
                self.pools[i].observe(part, nodes)

    def rates(self, draft: int, fresh: bool) -> list[float]:
        """The chance that the child of each rank is accepted, given that its parent was; falling with the rank.

        `fresh`: as if next to nothing had been seen.
        """
        pool, own = self.pools[draft], self.own[draft]
        prior = Acceptance().rates() if fresh else pool.rates()
        weight = POOL if pool.tried[0] >= KNOWN and not fresh else 1.0
        seen = 1.0 / max(1.0, own.tried[0]) if fresh else 1.0
        found: list[float] = []
        for rank in range(RANKS):
            rate = (own.accepted[rank] * seen + prior[rank] * weight) / (own.tried[rank] * seen + weight)
            found.append(min([rate, 1.0 - sum(found), *found[-1:]]))
        return found


@dataclass(frozen=True)
class Spent:
    """A plan: which draft, a tree a request (None: plain), and what the step is expected to give and to take."""

    draft: int
    trees: tuple[FixedTree | None, ...]
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Timings:
    """What steps took in this engine over what the tables say, by the number of nodes, to a power of two."""

    plain: dict[int, float] = field(default_factory=dict)
    """Of steps without trees. A step with trees may have as many nodes, but says nothing of these."""
    verify: dict[int, float] = field(default_factory=dict)
    draft: dict[int, float] = field(default_factory=dict)
    rest: float = 0.0
    """Seconds of a request and step beside the calls."""

    @staticmethod
    def note(factors: dict[int, float], nodes: int, factor: float) -> None:
        known = Timings.factor(factors, nodes)
        weight = SMOOTHING if nodes.bit_length() in factors else FIRST
        factors[nodes.bit_length()] = known + weight * (min(factor, OUTLIER * known) - known)

    @staticmethod
    def factor(factors: dict[int, float], nodes: int) -> float:
        """Of the nearest size that was seen; 1 where none was."""
        if not factors:
            return 1.0
        key = nodes.bit_length()
        return factors[min(factors, key=lambda seen: (abs(seen - key), seen))]


class Load:
    """An engine's budget. `plan` before a step and `took` after it."""

    def __init__(self) -> None:
        self.cost: CostModel | None = None
        self.timings = Timings()
        self.spent: Spent | None = None
        self._planned: list[Share] = []
        self._due, self._interval = 0, INTERVALS[0]
        self._waited = self._patience = 0  # plain steps since there were trees, and how many make a trial due
        self._steps = 0
        self._plain: dict[int, int] = {}  # when so many requests (to a power of two) last made a plain step

    def prepare(self, cost: Callable[[], CostModel]) -> None:
        """Measure what steps take, where that was not done yet."""
        if self.cost is None:
            self.cost = cost()

    def plan(self, shares: Sequence[Share]) -> None:
        """Give each of the requests that are about to draft its tree."""
        if not shares or self.cost is None:
            return
        changed = len(shares) != len(self._planned) or any(a is not b for a, b in zip(shares, self._planned))
        if changed:
            self._interval, self._due = INTERVALS[0], min(self._due, 1)
        self._due -= 1
        if self._due > 0 and not (changed and len(shares) > len(self._planned)):
            return
        self._planned = list(shares)
        self._due, self._interval = self._interval, min(2 * self._interval, INTERVALS[1])
        if self._steps - self._plain.get(len(shares).bit_length(), -PLAIN_EVERY) >= PLAIN_EVERY:
            self._use(shares, self._none(shares))
            self._due = PLAIN_STEPS
            return
        spent = self._best(shares, fresh=False)
        if not any(spent.trees) and self._waited >= max(self._patience, self._trial(shares)):
            spent = self._best(shares, fresh=True)
            self._patience = min(LONGEST_WAIT, max(16, 2 * self._patience))
            self._due, self._interval = INTERVALS
        elif any(spent.trees):
            self._patience = 0
        self._use(shares, spent)

    def _use(self, shares: Sequence[Share], spent: Spent) -> None:
        self.spent = spent
        for share, tree in zip(shares, spent.trees, strict=True):
            share.trees = [tree if i == spent.draft else None for i in range(len(share.pools))]

    def took(self, nodes: int, rows: Sequence[int], verify: float, draft: float, rest: float) -> None:
        """A step without prompts: nodes verified, nodes that each call of the draft ran, and the seconds of each."""
        cost, index = self.cost, self.spent.draft if self.spent is not None else 0
        if cost is None or not nodes:
            return
        context = self._context()
        plain = self.spent is None or not any(self.spent.trees)
        factors = self.timings.plain if plain else self.timings.verify
        Timings.note(factors, nodes, verify / cost.verify(nodes, context))
        if rows:
            expected = cost.draft(index, rows, context)
            if expected > 0:
                Timings.note(self.timings.draft, max(rows), draft / expected)
        else:
            rest += draft  # of drafts that run no program, if any
        self._steps += 1
        self._waited = self._waited + 1 if plain else 0
        if plain:
            self._plain[len(self._planned).bit_length()] = self._steps
        self.timings.rest += SMOOTHING * (rest / max(1, len(self._planned)) - self.timings.rest)

    def _context(self) -> int:
        return sum(share.context for share in self._planned) // max(1, len(self._planned))

    def seconds(self, requests: int, draft: int, nodes: int, rows: Sequence[int], context: int) -> float:
        """Of a step that verifies so many nodes, by the tables and what was measured here."""
        cost, timings = self.cost, self.timings
        assert cost is not None
        factors = timings.plain if nodes == requests or not timings.verify else timings.verify
        found = cost.verify(nodes, context) * Timings.factor(factors, nodes) + timings.rest * requests
        if rows:
            found += cost.draft(draft, rows, context) * Timings.factor(timings.draft, max(rows))
            found += cost.sampled_row * (sum(rows) + nodes - requests) + (0.0 if timings.draft else cost.overhead)
        return found

    def _trial(self, shares: Sequence[Share]) -> int:
        """Plain steps that pay for a trial: it may cost `REGRET` of the time until then."""
        context, count = self._context(), len(shares)
        plain = self.seconds(count, 0, count, (), context)
        trial = self.seconds(count, 0, (1 + TRIAL_LEVELS) * count, [count] * TRIAL_LEVELS, context)
        return int(INTERVALS[0] * max(0.0, trial - plain) / (REGRET * plain))

    def _best(self, shares: Sequence[Share], fresh: bool) -> Spent:
        """The plan of most tokens a second; without trees where none promises enough more."""
        context, plain = self._context(), self._none(shares)
        plans = [self._spend(i, shares, context, fresh) for i in range(len(shares[0].pools))]
        best = max(plans, key=lambda plan: plan.rate, default=plain)
        needed = MARGIN if self.timings.verify else 1 + HYSTERESIS
        return best if best.rate > needed * plain.rate else plain

    def _none(self, shares: Sequence[Share]) -> Spent:
        """Plain decoding."""
        count = len(shares)
        return Spent(0, (None,) * count, float(count), self.seconds(count, 0, count, (), self._context()))

    def _spend(self, draft: int, shares: Sequence[Share], context: int, fresh: bool) -> Spent:
        """With one draft: nodes of all requests in the order of their value, as many as make the step fastest."""
        count = len(shares)
        best: tuple[float, int, list[tuple[float, int, int]], float, float] | None = None
        orders: list[list[tuple[int, int, int, float]]] = []
        for levels in range(1, (TRIAL_LEVELS if fresh else max(s.policy.max_depth for s in shares)) + 1):
            orders = [self._order(share, draft, levels, fresh) for share in shares]
            merged = heapq.merge(
                *([(-node[3], i, k) for k, node in enumerate(order)] for i, order in enumerate(orders))
            )
            rows, tokens, nodes, taken = [0] * (levels + 1), float(count), count, list[tuple[float, int, int]]()
            before = best[0] if best is not None else 0.0
            for value, i, k in merged:
                level = orders[i][k][2]
                rows[0] += k == 0
                rows[level] += 1
                tokens -= value
                nodes += 1
                taken.append((value, i, k))
                if not rows[levels] or (nodes - count) % max(1, count // 4):
                    continue
                seconds = self.seconds(count, draft, nodes, rows[:levels], context)
                if best is None or tokens / seconds > best[0]:
                    best = tokens / seconds, levels, list(taken), tokens, seconds
            if best is not None and best[0] == before and levels > 2:
                break
        if best is None:
            return Spent(draft, (None,) * count, float(count), self.seconds(count, draft, count, (), context))
        _, levels, taken, tokens, seconds = best
        orders = [self._order(share, draft, levels, fresh) for share in shares]
        sizes = [0] * count
        for _, i, _ in taken:
            sizes[i] += 1
        trees = [
            FixedTree.of([(parent, rank) for parent, rank, _, _ in order[:size]]) if size else None
            for order, size in zip(orders, sizes, strict=True)
        ]
        return Spent(draft, tuple(trees), tokens, seconds)

    def _order(self, share: Share, draft: int, levels: int, fresh: bool) -> list[tuple[int, int, int, float]]:
        """A request's nodes, best first."""
        rates = share.rates(draft, fresh)
        if share.policy.chain or fresh or share.pools[draft].tried[0] + share.own[draft].tried[0] < KNOWN:
            rates = rates[:1]
        nodes = min(share.policy.max_nodes, 1 + max(2, MOST // len(self._planned)))
        return greedy_nodes(rates, nodes, min(levels, max(0, share.remaining - 1)))
