"""Trees as a function of load: one budget of nodes a step for all requests of an engine.

A step's seconds grow with all nodes that are verified and all that drafts run, whosever they are, so a node is worth
its place if it adds more expected tokens a second than the step has without it. Every request's best trees are known
from its acceptance by rank (`sequoia.greedy_nodes`); their nodes are taken in the order of their value, whosever they
are, up to where all tokens a second are most (the goodput of SmartSpec, arXiv 2406.14066, which chooses the length of
chains by it). With more requests a node costs more, and trees narrow to chains, to nothing.

A draft must run a request's prompt before its first tree. So it begins where the rest of the request promises to save
more than that, a few requests at a time; and as long as it does not pay at a load, it is not called, but for trials of
which the plain steps before them have paid for (`REGRET`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ..cost.acceptance import GREEDY
from ..cost.latency import CostModel
from ..drafts.session import MAX_CHAIN
from .auto import HYSTERESIS, KNOWN, LONGEST_WAIT, OUTLIER, REGRET, Auto, cost_model
from .fixed import FixedTree
from .protocol import Control
from .sequoia import greedy_nodes
from .share import Share
from .step_costs import StepCosts, Took

INTERVALS = (2, 16)
"""Steps between plans: doubles from the first to the last, and begins again when requests come."""
IDLE = 64
"""Steps between plans at most, where the last one was to have no trees; begins at the last of `INTERVALS`."""
MARGIN = 1.03
"""What speculation must promise over plain decoding, with what was measured here; at first `HYSTERESIS`."""
TRIAL_LEVELS, TRIAL_REQUESTS = 2, 4
FIRST_PATIENCE = 16
MOST = 96
"""Nodes of all requests that are looked at: planning must stay short beside a step. Those of the policy's largest tree
where that is larger, as over streamed weights, whose steps are long."""
PLAIN_EVERY, PLAIN_STEPS = 64, 2
"""So many plain steps are made at first for each power of two of requests, and one again after so many steps: what they
take cannot be told from steps with trees, and a machine is not always as busy."""
HORIZON = 128
"""Tokens that a request is taken to go on for at most, or as many as it has given, where these are more: its limit may
be far beyond its end."""
ENTRY = 0.5
"""Of what the draft promises to save on the rest of a request, what running its prompt may cost."""
CHECK_STEPS, CHECK_DECAY = 16, 0.95
GRAIN = 0.02
"""Rates are rounded, so that most trees were made before."""
FAR = 0.8
"""No more nodes are looked at where the speed has fallen this far below the best."""


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

    def only(self, wanted: Sequence[int]) -> Spent:
        """With the trees of these requests alone."""
        return replace(self, trees=tuple(tree if i in wanted else None for i, tree in enumerate(self.trees)))


@dataclass
class Wait:
    """Of one load."""

    steps: int = 0
    """Since there were trees."""
    patience: int = 0
    """After so many a trial is due; doubles with every failure."""
    lost: bool = False
    """Whether trees were slower than what they replaced: then a trial is the only way back."""
    plain_at: int | None = None
    """The last step without trees."""


class Load:
    """An engine's budget. `plan` before a step and `took` after it."""

    def __init__(self) -> None:
        self.costs: StepCosts | None = None
        self.spent: Spent | None = None
        self.prompt_tokens = 256
        """Of drafts' prompts that may be run in a step."""
        self._planned: list[Share] = []
        self._due, self._interval = 0, INTERVALS[0]
        self._steps = 0
        self._waits: dict[int, Wait] = {}  # by requests, to a power of two
        self._checked, self._seconds, self._tokens = 0, 0.0, 0.0  # late steps with trees, older ones counting less

    def prepare(self, cost: Callable[[], CostModel]) -> None:
        """Measure what steps take, where that was not done yet."""
        if self.costs is None:
            self.costs = StepCosts(cost())

    def plan(self, shares: Sequence[Share]) -> None:
        """Give each of the requests that are about to draft its tree."""
        if not shares or self.costs is None:
            return
        self._follow(shares)
        self._due -= 1
        if self._due > 0:
            return
        wait, plain, before = self._wait, self._none(), self._speculates
        if wait.plain_at is None or self._steps - wait.plain_at >= PLAIN_EVERY:
            self._due, wait.plain_at = PLAIN_STEPS if wait.plain_at is None else 1, self._steps
            self._use(plain)
            return
        if self._checked >= CHECK_STEPS:
            if self._tokens < self._seconds * plain.rate:  # slower than plain steps, whatever was promised
                wait.lost, wait.patience = True, min(LONGEST_WAIT, 4 * max(FIRST_PATIENCE, wait.patience))
                self._restart()
            else:
                wait.patience = 0
        spent, self._due = (plain, 0) if wait.lost else self._best(plain)
        if not any(spent.trees) and wait.steps >= wait.patience > 0:
            spent, self._due = self._trial(plain)
        self._use(spent)
        if not self._speculates:
            wait.patience = max(FIRST_PATIENCE, wait.patience)
        if self._speculates != before:
            self._interval = INTERVALS[not self._speculates]
        if not self._due:
            most = INTERVALS[1] if self._speculates else IDLE
            self._due, self._interval = self._interval, min(2 * self._interval, most)

    def took(self, took: Took) -> None:
        """A step without prompts of the target."""
        if self.costs is None or not took.nodes:
            return
        plain, wait = not self._speculates, self._wait
        # A draft that looks things up and found nothing cost nothing, and says nothing of the trees it may yet give.
        silent = not plain and took.plain and not took.prompts
        self._steps += 1
        self.costs.note(took, self.spent.draft if self.spent is not None else 0, self._context, plain or silent)
        if silent:
            wait.steps, wait.plain_at = 0, self._steps
        elif plain:
            wait.steps, wait.plain_at = wait.steps + 1, self._steps
        elif not took.prompts:  # those are paid once
            wait.steps = 0
            expected = self.spent.seconds if self.spent is not None else took.seconds
            self._checked += 1
            self._seconds = self._seconds * CHECK_DECAY + min(took.seconds, OUTLIER * expected)
            self._tokens = self._tokens * CHECK_DECAY + took.tokens

    def prompted(self, tokens: int, seconds: float) -> None:
        """A step in which the target ran prompts and nothing else."""
        if self.costs is not None:
            self.costs.prompted(tokens, seconds)

    # -- between plans -----------------------------------------------------------------------------------------------

    def _follow(self, shares: Sequence[Share]) -> None:
        """Who comes does not wait long for a tree; who goes leaves room for larger ones."""
        before, now = {id(share) for share in self._planned}, {id(share) for share in shares}
        if before == now:
            return
        other_load = len(before).bit_length() != len(now).bit_length()
        self._planned = [*shares]
        if self._speculates:
            self._due, self._interval = min(self._due, 4 if now < before else 1), INTERVALS[0]
        elif other_load:
            self._due, self._interval = min(self._due, 1), INTERVALS[1]
        if other_load:
            self._restart()

    @property
    def _wait(self) -> Wait:
        return self._waits.setdefault(len(self._planned).bit_length(), Wait())

    @property
    def _speculates(self) -> bool:
        return self.spent is not None and any(self.spent.trees)

    @property
    def _context(self) -> int:
        return sum(share.context for share in self._planned) // max(1, len(self._planned))

    def _use(self, spent: Spent) -> None:
        self.spent = spent
        for share, tree in zip(self._planned, spent.trees, strict=True):
            share.trees = [tree if self._beside(spent.draft, i) else None for i in range(len(share.pools))]

    def _beside(self, draft: int, other: int) -> bool:
        """Drafts that run no program are asked together: one has something to say where another has not, and what both
        say is one node."""
        return other == draft or (self._free(other) and self._free(draft))

    def _free(self, draft: int) -> bool:
        return self.costs is not None and self.costs.tables.drafts[draft] is None

    def _restart(self) -> None:
        self._checked, self._seconds, self._tokens = 0, 0.0, 0.0

    # -- plans -------------------------------------------------------------------------------------------------------

    def _none(self) -> Spent:
        """Plain decoding."""
        assert self.costs is not None
        count = len(self._planned)
        return Spent(0, (None,) * count, float(count), self.costs.plain_seconds(count, self._context))

    def _best(self, plain: Spent) -> tuple[Spent, int]:
        """The plan of most tokens a second, without trees where none promises enough more; and for how many steps it is
        made (0: the usual)."""
        shares, wait = self._planned, self._wait
        best = self._promising(plain, range(len(shares)), fresh=False)
        if best is None:
            return plain, 0
        if not any(share.known(best.draft) for share in shares):
            return self._few(best) if wait.steps >= wait.patience else (plain, 0)
        saved = ENTRY * (1 / plain.rate - 1 / best.rate)  # seconds a token
        worth = [
            i
            for i, share in enumerate(shares)
            if self._entry(share, best.draft) <= saved * min(share.remaining, max(HORIZON, share.given))
        ]
        if len(worth) < len(shares):
            best = self._promising(plain, worth, fresh=False)
            if best is None:
                return plain, 0
        now, left, later = list[int](), self.prompt_tokens, 0
        for i in sorted(worth, key=lambda i: shares[i].behind[best.draft]):
            behind = shares[i].behind[best.draft]
            if behind <= MAX_CHAIN or behind <= left or left == self.prompt_tokens:
                now.append(i)
                left -= behind if behind > MAX_CHAIN else 0
            else:
                later += best.trees[i] is not None
        return best.only(now), 1 if later else 0

    def _trial(self, plain: Spent) -> tuple[Spent, int]:
        """With a few requests, as if little was known, where the time since the last trial pays for it."""
        assert self.costs is not None
        shares, wait, count = self._planned, self._wait, len(self._planned)
        calls, few = [count] * TRIAL_LEVELS, min(count, TRIAL_REQUESTS)
        for draft in range(len(shares[0].pools)):
            step = self.costs.tree_seconds(count, draft, count + few * TRIAL_LEVELS, calls, self._context)
            entry = min(self._entry(share, draft) for share in shares)
            if REGRET * wait.steps * plain.seconds < entry + INTERVALS[0] * max(0.0, step - plain.seconds):
                return plain, 0
        self.costs.doubt()
        best = self._promising(plain, range(count), fresh=True)
        wait.patience, wait.lost = min(LONGEST_WAIT, max(FIRST_PATIENCE, 2 * wait.patience)), False
        if best is None:
            wait.steps = 0
            return plain, 0
        return self._few(best)

    def _few(self, best: Spent) -> tuple[Spent, int]:
        """Trees for as few requests as are enough to learn from, those that are ready first."""
        self._interval = INTERVALS[0]
        if self._free(best.draft):
            return best, INTERVALS[0]  # the first ones may have nothing to say for long
        order = sorted(
            (i for i, tree in enumerate(best.trees) if tree is not None),
            key=lambda i: self._planned[i].behind[best.draft],
        )
        few = [
            i
            for n, i in enumerate(order[:TRIAL_REQUESTS])
            if n == 0 or self._planned[i].behind[best.draft] <= MAX_CHAIN
        ]
        return best.only(few), max(INTERVALS[0], -(-int(KNOWN) // max(1, len(few))))

    def _entry(self, share: Share, draft: int) -> float:
        """Seconds until the draft has run what it lacks of a request."""
        assert self.costs is not None
        behind = share.behind[draft]
        if behind <= MAX_CHAIN:
            return 0.0
        return self.costs.prompt_seconds(draft, behind)

    def _promising(self, plain: Spent, who: Sequence[int], fresh: bool) -> Spent | None:
        """The fastest plan in which these requests may have trees; None where it is not faster by enough."""
        assert self.costs is not None
        plans = [self._spend(i, who, fresh) for i in range(len(self._planned[0].pools))]
        best = max((plan for plan in plans if plan is not None), key=lambda plan: plan.rate, default=plain)
        needed = MARGIN if self.costs.tree_rest is not None else 1 + HYSTERESIS
        return best if best.rate > needed * plain.rate else None

    def _spend(self, draft: int, who: Sequence[int], fresh: bool) -> Spent | None:
        """With one draft: nodes of these requests in the order of their value, as many as make the step fastest."""
        assert self.costs is not None
        shares, count, context = self._planned, len(self._planned), self._context
        grain = max(1, count // 2)
        # A deep tree of few nodes is slow, and may get fast with more: worth a look where there may be so many.
        wide = any(share.policy.max_nodes > MOST for share in shares)
        rates = {i: self._rates(shares[i], draft, fresh) for i in who}
        best: tuple[float, int, list[tuple[float, int, int, int]], int, float, float] | None = None
        for levels in range(1, (TRIAL_LEVELS if fresh else max(s.policy.max_depth for s in shares)) + 1):
            before = best
            merged = sorted(
                (-value, i, k, level)
                for i in who
                for k, (_, _, level, value) in enumerate(_order(rates[i], *self._size(shares[i], levels)))
            )
            rows, tokens, top = [0] * (levels + 1), float(count), 0.0
            for n, (negative, _, k, level) in enumerate(merged, 1):
                rows[0] += k == 0
                rows[level] += 1
                tokens -= negative
                if not rows[levels] or n % grain:
                    continue
                seconds = self.costs.tree_seconds(count, draft, count + n, rows[:levels], context)
                if best is None or tokens / seconds > best[0]:
                    best = tokens / seconds, levels, merged, n, tokens, seconds
                elif tokens / seconds < (min(FAR * best[0], top) if wide else FAR * best[0]):
                    break
                top = max(top, tokens / seconds)
            if best is before and levels > 2:
                break
        if best is None:
            return None
        _, levels, merged, taken, tokens, seconds = best
        sizes = [0] * count
        for _, i, _, _ in merged[:taken]:
            sizes[i] += 1
        trees = [
            _tree(rates[i], *self._size(shares[i], levels), size) if size else None for i, size in enumerate(sizes)
        ]
        return Spent(draft, tuple(trees), tokens, seconds)

    def _rates(self, share: Share, draft: int, fresh: bool) -> tuple[float, ...]:
        rates = share.rates(draft, fresh)
        if share.policy.chain or fresh or not share.known(draft):
            rates = rates[:1]
        return tuple(max(GRAIN / 2, GRAIN * round(rate / GRAIN)) for rate in rates)

    def _size(self, share: Share, levels: int) -> tuple[int, int]:
        """Nodes and levels of a request's largest tree."""
        largest = share.policy.max_nodes
        nodes = min(largest, 1 + max(2, max(MOST, largest) // len(self._planned)))
        return nodes, min(levels, max(0, share.remaining - 1))


@lru_cache(4096)
def _order(rates: tuple[float, ...], nodes: int, levels: int) -> list[tuple[int, int, int, float]]:
    """A request's nodes, best first: (parent, rank, level, value)."""
    return greedy_nodes(rates, nodes, levels)


@lru_cache(4096)
def _tree(rates: tuple[float, ...], nodes: int, levels: int, size: int) -> FixedTree:
    """Of the first `size` of them."""
    return FixedTree.of([(parent, rank) for parent, rank, _, _ in _order(rates, nodes, levels)[:size]])
