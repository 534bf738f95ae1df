"""Automatic choice among tree, chain and no speculation, by measured acceptance and measured cost.

Every so many steps each draft's fastest tree is planned anew from its acceptance by rank (Sequoia, arXiv 2402.12374v3,
section 3) and the cost model. A draft that is not worth its time is left alone, and tried again after a wait that
doubles with every failure and is long enough for the trial to cost at most `REGRET` of the time until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..cost import interleaving
from ..cost.acceptance import GREEDY, Acceptance, remembered, split
from ..cost.latency import CONTEXT_GRAIN, CostModel, LatencyTable, latency
from ..proposal import Proposal
from .fixed import FixedTree
from .protocol import Control, TreePolicy
from .sequoia import Planned, fastest_tree

HYSTERESIS = 0.04
"""A new plan, or the return to plain decoding, must promise this much more speed."""
FIRST_LEVELS = 2
"""Levels of the chain for a pair of which fewer than `KNOWN` tries were seen."""
KNOWN = 4.0
REGRET = 0.01
FIRST_WAIT = 64
LONGEST_WAIT = 4096
FIRST_INTERVAL, LONGEST_INTERVAL = 2, 32
"""Steps between plans: doubles from the first to the longest."""
ASSUMED_OVERHEAD = 0.05
"""Of a step beyond plain decoding, in plain steps, until it was measured."""
SMOOTHING = 0.05
ROUNDED = 0.04
CHECK_STEPS, CHECK_DECAY, CHECK_MARGIN = 16, 0.95, 1.05
FIRST_CHECK_STEPS, FIRST_CHECK_MARGIN = 4, 1.6
STREAMED_NODES, STREAMED_DEPTH = 256, 16
"""Of trees over streamed weights; the measured cost decides how many of these are worth their time."""
OUTLIER = 4.0
"""Times longer than this many times the predicted ones are cut: the machine did something else meanwhile."""


@dataclass(frozen=True)
class Auto:
    """`policy="auto"`. Trees have at most `nodes` nodes and `depth` levels."""

    nodes: int = 24
    depth: int = 8
    chain: bool = False
    """Whether only chains are wanted, as block verification needs."""
    remember: bool = True
    """Whether the acceptance of earlier calls counts; without, a request gets the same trees whatever went before."""
    clock: bool = True
    """Whether the times of its own steps count; without, the trees depend on tokens and on the latency tables only."""
    kind: str = GREEDY
    """What the acceptance is remembered under: a draw and a likeliest token are accepted differently often."""

    @property
    def max_nodes(self) -> int:
        return self.nodes

    def for_target(self, target: Any) -> Auto:
        """Larger trees, where bringing weights takes so long that nodes cost little (docs/offload.md)."""
        if getattr(target, "stream_stats", None) is None:
            return self
        return replace(self, nodes=max(self.nodes, STREAMED_NODES), depth=max(self.depth, STREAMED_DEPTH))

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def needs_q(self) -> bool:
        return False

    def for_sampling(self, verifier: object, sampler: object, temperature: float, seeded: bool) -> Auto:
        """For sampled output: a given seed must give the same sample whatever happened before and however long it
        took; without one, earlier calls of the same kind and the clock count. Trees may not fork where the rule takes
        chains."""
        rule, children = (getattr(x, "name", x) or "default" for x in (verifier, sampler))
        kind = f"{rule}, {children}, {temperature:.2g}"
        chain, free = self.chain or rule == "block", not seeded
        return replace(self, remember=self.remember and free, clock=self.clock and free, kind=kind, chain=chain)

    def widths(self, depth: int, proposal: Proposal) -> int:
        """Without a controller: a chain of three."""
        return 1 if depth < 3 else 0

    def control(self, target: Any, drafts: Sequence[Any]) -> Control:
        cost = cost_model(target, drafts, self.kind != GREEDY)
        return Controller(self, cost, [self._memory(target, draft, drafts) for draft in drafts])

    def _memory(self, target: Any, draft: Any, drafts: Sequence[Any]) -> Acceptance:
        if not self.remember:
            return Acceptance()
        # A draft that is superfluous beside another one may be the best there is when it is alone.
        beside = "".join(f", beside {other.name}" for other in drafts if other is not draft)
        learned_as = getattr(draft, "program", None) or getattr(draft, "learned_as", type(draft))
        return remembered(target, learned_as, self.kind + beside)

    def __str__(self) -> str:
        return "auto"


def cost_model(target: Any, drafts: Sequence[Any], sampled: bool = False) -> CostModel:
    """Tables of the target and of every draft whose calls take time."""
    table = latency(target)
    programs = [getattr(draft, "program", None) for draft in drafts]
    tables = [_table(draft, program) for draft, program in zip(drafts, programs, strict=True)]
    if not all(t is None or t.measured == table.measured for t in tables):
        table = LatencyTable.assumed()
        tables = [None if t is None else LatencyTable.assumed() for t in tables]
    if not table.measured:  # stand-ins, whose drafts are taken to be small
        tables = [None if t is None else LatencyTable.assumed(0.1, 0.002) for t in tables]
    else:
        tables = [
            t and t.scaled(interleaving.draft_factor(target, draft)) for t, draft in zip(tables, drafts, strict=True)
        ]
    return CostModel(table, tables, ASSUMED_OVERHEAD * table.seconds(1), table.sampled_row if sampled else 0.0)


def _table(draft: Any, program: Any) -> LatencyTable | None:
    """Of a draft's program, or what a draft without one says of its calls itself."""
    if program is not None:
        return latency(program)
    own = getattr(draft, "latency", None)
    return own() if callable(own) else None


@dataclass(slots=True)
class Arm:
    """One draft in one request."""

    memory: Acceptance
    plan: Planned | None = None
    """None: not used at present."""
    begun: bool = False
    """Whether it was asked in this request, and so has run the prompt."""


class Controller:
    """One request's choices. `plan` before a step, `observe` after it; both take microseconds but for replanning."""

    def __init__(self, policy: Auto, cost: CostModel, memories: Sequence[Acceptance]) -> None:
        self.policy, self.cost = policy, cost
        self.arms = [Arm(memory) for memory in memories]
        self.context = 0
        self._interval = FIRST_INTERVAL
        self._due = 0  # steps until the next plan
        self._none: list[TreePolicy | None] = [None] * len(self.arms)
        self._current = self._none
        self._checks = policy.clock and cost.measured
        self._restart()

    def plan(self, context: int, remaining: int) -> list[TreePolicy | None]:
        """Each draft's tree; None: it is not asked. `context` tokens are committed, `remaining` wanted."""
        self.context = context
        if self._due <= 0:
            self._replan(remaining)
        self._due -= 1
        return self._current

    def observe(
        self, proposal: Proposal, path: Sequence[int], tokens: int, verify: float, draft: float, rest: float
    ) -> None:
        """A step's outcome: new tokens, and the seconds of the target's pass, of the drafts and of everything else."""
        if self._current is self._none:
            for arm in self.arms:
                arm.memory.waited += tokens
            return
        parts = split(proposal, path)
        active = [arm for arm, policy in zip(self.arms, self._current, strict=True) if policy is not None]
        for arm in self.arms:
            if arm.plan is None:
                arm.memory.waited += tokens
        if len(parts) == len(active):
            lengths = [len(nodes) - 1 for _, nodes in parts]
            for i, (arm, (part, nodes)) in enumerate(zip(active, parts, strict=True)):
                arm.memory.observe(part, nodes)
                if len(active) > 1 and len(part.tokens) > 1:
                    arm.memory.compare(lengths[i], max(lengths[:i] + lengths[i + 1 :]))
        if self._checks:
            self._check(len(proposal.tokens), tokens, verify, draft, rest)

    def _restart(self) -> None:
        self._steps = 0
        # Of late steps with speculation, older ones counting less: the target's measured and predicted seconds, all
        # others, and tokens.
        self._verify = self._predicted = self._others = self._tokens = 0.0

    def _check(self, nodes: int, tokens: int, verify: float, draft: float, rest: float) -> None:
        """Learn the overhead, and end speculation that is slower than plain decoding, whatever was predicted."""
        predicted = self.cost.verify(nodes, self.context)
        others = sum(arm.plan.seconds for arm in self.arms if arm.plan is not None) - predicted + self.cost.overhead
        self._verify = self._verify * CHECK_DECAY + min(verify, OUTLIER * predicted)
        self._predicted = self._predicted * CHECK_DECAY + predicted
        self._others = self._others * CHECK_DECAY + min(draft + rest, OUTLIER * max(others, self.cost.overhead))
        self._tokens = self._tokens * CHECK_DECAY + tokens
        self._steps += 1
        busy = self._verify / self._predicted  # a machine that does other things too is slower at everything
        self.cost.overhead += SMOOTHING * (min(rest / busy, self.cost.verify(1, self.context)) - self.cost.overhead)
        plain = self._tokens * self.cost.verify(1, self.context) * busy
        if self._steps >= CHECK_STEPS or (
            self._steps >= FIRST_CHECK_STEPS and self._verify + self._others > plain * FIRST_CHECK_MARGIN
        ):
            slower = self._verify + self._others > plain * CHECK_MARGIN
            for arm in self.arms:
                if arm.plan is not None:
                    if slower:
                        self._give_up(arm, 4)
                    elif plain > self._verify + self._others:
                        arm.memory.patience = 0
            if slower:
                self._current, self._due = self._none, FIRST_WAIT
                self._restart()

    def _replan(self, remaining: int) -> None:
        for index, arm in enumerate(self.arms):
            self._plan_arm(index, arm, remaining)
        self._drop_superfluous()
        current: list[TreePolicy | None] = [None if arm.plan is None else arm.plan.tree for arm in self.arms]
        if any(policy is not None for policy in current):
            self._current = current
            self._due, self._interval = self._interval, min(2 * self._interval, LONGEST_INTERVAL)
        else:
            self._current = self._none
            self._interval = FIRST_INTERVAL
            left = [self._wait(i) - arm.memory.waited for i, arm in enumerate(self.arms)]
            self._due = max(1, min(left, default=LONGEST_WAIT))

    def _plan_arm(self, index: int, arm: Arm, remaining: int) -> None:
        memory, policy = arm.memory, self.policy
        if arm.plan is None and memory.patience and memory.waited < self._wait(index):
            return
        rates = memory.rates()
        known = memory.tried[0] >= KNOWN
        if arm.plan is None and memory.patience:
            # A new trial: what was seen long ago counts no more than one try.
            total = max(1.0, memory.tried[0])
            memory.tried = [t / total for t in memory.tried]
            memory.accepted = [a / total for a in memory.accepted]
            rates, known = Acceptance().rates(), False
        depth = min(policy.depth if known else FIRST_LEVELS, max(1, remaining - 1))
        best = self._fastest(index, memory, rates if known and not policy.chain else rates[:1], depth)
        plain = 1.0 / self.cost.verify(1, self.context)
        if best.tree.max_nodes == 1 or best.rate < plain * (1 + HYSTERESIS * (arm.plan is None)):
            self._give_up(arm)
            return
        if arm.plan is not None:
            present = self._valued(index, arm.plan.tree, rates)
            if best.rate < present.rate * (1 + HYSTERESIS) and present.rate > plain:
                best = present
        if known and best.rate > plain * (1 + HYSTERESIS) and not self._checks:
            memory.patience = 0  # else when it was as fast as promised
        arm.plan, arm.begun = best, True
        memory.waited = 0

    def _fastest(self, index: int, memory: Acceptance, rates: Sequence[float], depth: int) -> Planned:
        """The fastest tree by rates rounded to `ROUNDED`, so that the next request finds most plans made."""
        key = (*(round(rate / ROUNDED) for rate in rates), depth, self.context // CONTEXT_GRAIN, self.policy.nodes)
        tree = memory.plans.get(key)
        if tree is None:
            rounded = [max(ROUNDED / 4, ROUNDED * k) for k in key[: len(rates)]]
            cost, context = self.cost, self.context
            best = fastest_tree(rounded, lambda n, rows: cost.step(index, n, rows, context), self.policy.nodes, depth)
            tree = memory.plans[key] = best.tree
        return self._valued(index, tree, rates)

    def _valued(self, index: int, tree: FixedTree, rates: Sequence[float]) -> Planned:
        """What a tree is worth by these rates."""
        value, seen = [1.0], [0] * tree.max_nodes
        for parent in tree.parents[1:]:
            rank = seen[parent]
            seen[parent] += 1
            value.append(value[parent] * (rates[rank] if rank < len(rates) else 0.0))
        rows = [len(level) for level in tree.levels[:-1]]
        return Planned(tree, sum(value), self.cost.step(index, tree.max_nodes, rows, self.context))

    def _give_up(self, arm: Arm, factor: int = 2) -> None:
        arm.plan = None
        memory = arm.memory
        memory.patience = min(max(FIRST_WAIT * factor // 2, factor * memory.patience), LONGEST_WAIT)
        memory.waited = 0

    def _wait(self, index: int) -> int:
        """Plain tokens before a new trial: the draft's own patience, and time enough to afford one."""
        patience = self.arms[index].memory.patience
        plain = self.cost.verify(1, self.context)
        behind = patience if self.arms[index].begun else self.context
        catch_up = [16] * -(-behind // 16)
        trial = self.cost.draft(index, [*catch_up, 1, 1, 1, 1]) + 4 * (self.cost.verify(3, self.context) - plain)
        return max(patience, int(trial / (REGRET * plain)))

    def _drop_superfluous(self) -> None:
        """With several drafts: leave out one whose own share of the accepted tokens is not worth its time."""
        used = [i for i, arm in enumerate(self.arms) if arm.plan is not None]
        if len(used) < 2:
            return
        plain = self.cost.verify(1, self.context)

        def gain(i: int) -> tuple[float, float]:
            plan = self.arms[i].plan
            assert plan is not None
            return (plan.tokens - 1) * self.arms[i].memory.share_alone, plan.seconds - plain

        gains = {i: gain(i) for i in used}
        for i in sorted(used, key=lambda i: gains[i][0] / max(gains[i][1], 1e-12)):
            others = [j for j in gains if j != i]
            if not others:
                break
            rate = (1 + sum(gains[j][0] for j in others)) / (plain + sum(gains[j][1] for j in others))
            if gains[i][0] < gains[i][1] * rate:
                self._give_up(self.arms[i])
                del gains[i]
