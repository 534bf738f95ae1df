"""One budget of nodes for all requests: spent where it earns most, narrowed by load, learned from the clock."""

from __future__ import annotations

import pytest

from treespec_compiler.speculation.cost.acceptance import Acceptance
from treespec_compiler.speculation.cost.latency import CostModel, LatencyTable, Point
from treespec_compiler.speculation.policies.auto import Auto, Controller
from treespec_compiler.speculation.policies.load import (
    CHECK_STEPS,
    FIRST_PATIENCE,
    HORIZON,
    PLAIN_EVERY,
    TRIAL_REQUESTS,
    Load,
    Loaded,
)
from treespec_compiler.speculation.policies.share import Share
from treespec_compiler.speculation.policies.step_costs import Factors, StepCosts, Took
from treespec_compiler.speculation.proposal import Proposal

MS = 1e-3


def table(call: float, node: float) -> LatencyTable:
    """`call` for one node, up to 8 of them, and `node` for each further one."""
    return LatencyTable([Point(n, 0, 1, call + node * max(0, n - 8)) for n in (1, 8, 9, 64)])


def load_of(node: float = 0.3 * MS, draft: float = 0.2 * MS) -> Load:
    load = Load()
    load.prepare(lambda: CostModel(table(4 * MS, node), [table(draft, draft / 40)]))
    return load


def took(shares, verify=4 * MS, draft=0.0, rest=0.0, rows=(), tokens=None) -> Took:
    """What a step is said to have taken, with the trees that the shares have."""
    count = len(shares) + sum(nodes(shares))
    return Took(len(shares), count, rows, 0, len(shares) if tokens is None else tokens, verify, draft, rest)


def planned(load: Load, shares: list[Share]) -> None:
    """The plan after the plain steps that an engine begins with."""
    for _ in range(2):
        load.plan(shares)
        assert sum(nodes(shares)) == 0
        load.took(took(shares, load.costs.tables.verify(len(shares))))
    load.plan(shares)


def share(rates=(0.8, 0.1), remaining: int = 50, tries: float = 100.0, **changes) -> Share:
    found = Share(Auto(**changes), [Acceptance()])
    for rank, rate in enumerate(rates):
        found.own[0].tried[rank], found.own[0].accepted[rank] = tries, tries * rate
    found.remaining = remaining
    return found


def nodes(shares) -> list[int]:
    """Of each tree, the root left out."""
    return [tree.max_nodes - 1 if (tree := s.trees[0]) is not None else 0 for s in shares]


def test_trees_narrow_to_nothing_as_load_rises():
    sizes = []
    for count in (1, 2, 4, 8, 16, 64):
        load, shares = load_of(), [share() for _ in range(count)]
        planned(load, shares)
        assert max(nodes(shares)) - min(nodes(shares)) <= 1 or count == 1
        sizes.append(sum(nodes(shares)) / count)
    assert sizes[0] > 3 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 0
    # while nodes are free, load changes nothing
    load, shares = load_of(node=0.0), [share() for _ in range(16)]
    planned(load, shares)
    assert min(nodes(shares)) > 3


def test_a_lone_request_gets_a_wide_tree_where_nodes_cost_little():
    """As over streamed weights, for which the policy's largest tree is larger (`Auto.for_target`)."""
    wide = {"nodes": 256, "depth": 16}
    load, one = load_of(node=0.002 * MS, draft=0.01 * MS), share((0.6, 0.2, 0.1), **wide)
    planned(load, [one])
    assert sum(nodes([one])) > 64
    load, many = load_of(node=0.002 * MS, draft=0.01 * MS), [share((0.6, 0.2, 0.1), **wide) for _ in range(8)]
    planned(load, many)
    assert max(nodes(many)) <= 32


def test_nodes_go_where_they_earn_most():
    load, shares = load_of(), [share((0.9, 0.05)), share((0.5, 0.1)), share((0.05, 0.02)), share((0.9, 0.05), 2)]
    planned(load, shares)
    best, middle, worst, ending = nodes(shares)
    assert best > middle > worst == 0 and ending == 1  # a second token is all it wants
    assert load.spent is not None and load.spent.tokens > 4


def test_a_request_that_is_new_is_taken_for_the_others():
    known, new = share((0.9, 0.05)), share((), tries=0.0)
    new.pools[0].tried[0], new.pools[0].accepted[0] = 50.0, 45.0
    assert new.rates(0, fresh=False)[0] == pytest.approx(0.9, abs=0.02)
    doubtful = share((0.0,), tries=30.0)
    doubtful.pools = new.pools
    assert doubtful.rates(0, fresh=False)[0] < 0.2 < known.rates(0, fresh=False)[0]


def test_rates_are_probabilities_that_fall():
    for rates in ((0.2, 0.9), (0.6, 0.6, 0.6), (1.0, 1.0), (0.0, 0.0)):
        found = share(rates).rates(0, fresh=False)
        assert found == sorted(found, reverse=True) and sum(found) <= 1 + 1e-9 and min(found) >= 0


def test_what_steps_take_here_counts():
    """Tables promise that nodes are nearly free; the engine finds that they are not, and gives trees up."""
    load, shares = load_of(node=0.01 * MS), [share() for _ in range(8)]
    planned(load, shares)
    before = sum(nodes(shares))
    assert before > 8
    for _ in range(40):
        drafting = sum(nodes(shares))
        rows, draft = [8] * (drafting > 0), 0.3 * MS * (drafting > 0)
        load.took(took(shares, 4 * MS + 1.5 * MS * drafting, draft, 0.1 * MS, rows))
        load.plan(shares)
    assert sum(nodes(shares)) == 0 < before


def test_a_trial_is_made_after_a_wait():
    load, shares = load_of(), [share((0.02, 0.0, 0.0)) for _ in range(2)]
    trials = 0
    for _ in range(3000):
        load.plan(shares)
        assert max(nodes(shares)) <= 2
        trials += sum(nodes(shares)) > 0
        load.took(took(shares))
    assert 2 <= trials <= 60


def test_plans_are_kept_for_some_steps():
    load, shares = load_of(), [share(), share()]
    planned(load, shares)
    first = shares[0].trees[0]
    shares[0].own[0] = share((0.01,)).own[0]
    load.plan(shares)
    assert shares[0].trees[0] is first
    load.plan(shares)
    assert shares[0].trees[0] is None
    more = [*shares, share()]
    load.plan(more)
    assert more[2].trees[0] is not None  # who comes does not wait


def test_a_share_learns_from_its_steps():
    one = share((), tries=0.0)
    planned(load_of(), [one])
    assert one.plan(10, 50) == one.trees and one.nodes > 1
    one.observe(Proposal([5, 6, 7], [-1, 0, 1], [0, 1, 2], [0, 0, 0]), [0, 1], 2, 0.0, 0.0, 0.0)
    assert one.own[0].tried[0] == 2.0 and one.own[0].accepted[0] == 1.0 and one.pools[0].tried[0] == 2.0
    one.trees = [None]
    one.observe(Proposal([5], [-1], [0], [0]), [0], 1, 0.0, 0.0, 0.0)
    assert one.own[0].tried[0] == 2.0 and one.plan(12, 48) == [None] and one.nodes == 1


def test_chains_where_they_are_asked_for():
    load, shares = load_of(node=0.0), [share((0.5, 0.4), chain=True)]
    planned(load, shares)
    tree = shares[0].trees[0]
    assert tree is not None and tree.max_nodes == tree.max_depth + 1 > 1


def test_trees_of_a_seed_do_not_follow_the_load():
    class Unmeasured:
        name, graph_digest = "d", None

    target = draft = Unmeasured()
    policy = Loaded(clock=False)
    sampled = policy.for_sampling(None, None, 1.0, seeded=True)
    assert isinstance(sampled, Loaded) and sampled.load is policy.load
    assert isinstance(sampled.control(target, [draft]), Controller)
    assert isinstance(policy.for_sampling(None, None, 1.0, seeded=False), Loaded)


def test_factors_of_sizes_that_were_not_seen():
    factors = Factors()
    assert factors.at(9) == 1.0
    factors.note(8, 3.0)
    assert factors.at(100) == 2.0
    factors.note(100, 2.0)
    assert factors.at(64) == 2.0 and factors.at(15) == 2.0
    for _ in range(20):
        factors.note(8, 2.0)
    factors.note(8, 1000.0)  # a stall
    assert factors.at(8) == pytest.approx(2.6)
    factors.doubt()
    assert factors.at(8) == pytest.approx(1.8)
    factors.note(8, 4.0)  # what is in doubt is learned anew, soon
    assert factors.at(8) == pytest.approx(2.9)


def test_a_draft_begins_only_where_the_rest_pays_for_its_prompt():
    for behind, remaining, given, begins in ((0, 50, 0, True), (100, 100, 0, True), (40_000, 100, 0, False)):
        load, shares = load_of(), [share(remaining=remaining) for _ in range(2)]
        for one in shares:
            one.behind, one.given = [behind], given
        planned(load, shares)
        assert bool(sum(nodes(shares))) is begins, behind
    # who has gone on for long is taken to go on for as long again; a high limit alone promises nothing
    for given in (0, 20 * HORIZON):
        load, (one,) = load_of(), [share(remaining=100_000)]
        one.behind, one.given = [60_000], given
        planned(load, [one])
        assert bool(sum(nodes([one]))) is bool(given)


def test_prompts_of_drafts_are_spread_over_steps():
    load, shares = load_of(), [share(remaining=400) for _ in range(4)]
    for one in shares:
        one.behind = [150]
    load.prompt_tokens = 256
    planned(load, shares)
    for drafting in range(1, 5):
        assert sum(n > 0 for n in nodes(shares)) == drafting
        for one in shares:
            one.behind = [1 if one.trees[0] is not None else 150]
        load.took(took(shares, rows=[4]))
        load.plan(shares)


def test_what_nobody_knows_is_tried_with_a_few_requests():
    load, shares = load_of(node=0.1 * MS), [share((), tries=0.0, remaining=400) for _ in range(8)]
    for i, one in enumerate(shares):
        one.behind = [100 - i]
    planned(load, shares)
    assert [n > 0 for n in nodes(shares)] == [False] * 7 + [True]  # the one that is soonest ready
    load, shares = load_of(node=0.1 * MS), [share((), tries=0.0) for _ in range(8)]
    planned(load, shares)
    assert sum(n > 0 for n in nodes(shares)) == TRIAL_REQUESTS  # all are ready


def test_trees_that_are_slower_than_promised_end_until_a_trial():
    """By tokens a second, whatever the model of costs says: here acceptance is less than what is known of it."""
    load, shares = load_of(node=0.01 * MS), [share((0.9,), tries=1e6) for _ in range(2)]
    planned(load, shares)
    for _ in range(2 * CHECK_STEPS):
        assert sum(nodes(shares)) or load._steps > CHECK_STEPS
        rows = [2] * (sum(nodes(shares)) > 0)
        load.took(took(shares, 4.2 * MS if rows else 4 * MS, 1.0 * MS * len(rows), rows=rows, tokens=2))
        load.plan(shares)
    assert sum(nodes(shares)) == 0 and load._wait.lost
    quiet = 0
    while not sum(nodes(shares)):
        load.took(took(shares))
        load.plan(shares)
        quiet += 1
    assert quiet >= 3 * FIRST_PATIENCE and not load._wait.lost


def test_trees_are_compared_with_plain_steps_of_the_same_time():
    load, shares = load_of(node=0.0), [share((0.9,)) for _ in range(2)]
    planned(load, shares)
    plain = 0
    for _ in range(4 * PLAIN_EVERY):
        drafting = sum(nodes(shares))
        plain += not drafting
        load.took(took(shares, rows=[2] * (drafting > 0), draft=0.2 * MS, tokens=2 + drafting // 2))
        load.plan(shares)
    assert 3 <= plain <= 6


def test_planning_is_rare_where_trees_do_not_pay(monkeypatch):
    load, shares = load_of(node=9 * MS), [share((0.3,)) for _ in range(8)]
    planned(load, shares)
    made = []
    spend = load._spend
    monkeypatch.setattr(load, "_spend", lambda *given: made.append(1) or spend(*given))
    for _ in range(600):
        load.took(took(shares))
        load.plan(shares)
        assert sum(nodes(shares)) == 0
    assert len(made) < 30


def test_what_a_drafts_prompt_takes():
    costs = load_of().costs
    assert costs.prompt_seconds(0, 100) == pytest.approx(100 * 0.4 * MS * 0.0375)
    costs.prompted(50, 50 * MS)
    costs.prompted(50, 500 * MS)  # a stall
    assert costs.prompt_seconds(0, 100) == pytest.approx(100 * 1.25 * MS * 0.0375)
    before = costs.prompt_seconds(0, 1)
    slow, fast = (Took(1, 2, [1], 50, 1, 4 * MS, seconds, 0.0) for seconds in (1000 * MS, 0.2 * MS + 50 * 0.01 * MS))
    costs.note(slow, 0, 0, False)
    assert costs.prompt_seconds(0, 1) == pytest.approx(1.25 * before)
    costs.note(fast, 0, 0, False)
    assert costs.prompt_seconds(0, 1) == pytest.approx(0.01 * MS, rel=0.01)
    assert StepCosts(CostModel(table(4 * MS, 0.0), [None])).prompt_seconds(0, 100) == 0.0


def looking_up() -> Load:
    """Two drafts that run no program."""
    load = Load()
    load.prepare(lambda: CostModel(table(4 * MS, 0.3 * MS), [None, None]))
    return load


def free_share() -> Share:
    found = Share(Auto(), [Acceptance(), Acceptance()])
    found.remaining = 200
    return found


def test_drafts_without_a_program_are_asked_together_for_every_request():
    load, shares = looking_up(), [free_share() for _ in range(TRIAL_REQUESTS + 2)]
    planned(load, shares)
    assert all(tree is not None for share in shares for tree in share.trees)


def test_finding_nothing_is_no_failure():
    load, shares = looking_up(), [free_share()]
    planned(load, shares)
    for _ in range(4 * CHECK_STEPS):  # each costs more than was known: a busy machine
        load.took(Took(1, 1, (), 0, 1, 6 * MS, 0.0, 0.1 * MS))
        load.plan(shares)
        assert shares[0].trees[0] is not None
    assert load.costs.verify.known == {}  # of trees it says nothing


def test_trees_of_such_drafts_that_are_too_slow_end():
    load, shares = looking_up(), [free_share()]
    planned(load, shares)
    for _ in range(2 * CHECK_STEPS):
        if shares[0].trees[0] is not None:
            load.took(Took(1, 3, (), 0, 1, 9 * MS, 0.0, 0.1 * MS))
        else:
            load.took(Took(1, 1, (), 0, 1, 4 * MS, 0.0, 0.1 * MS))
        load.plan(shares)
    assert shares[0].trees == [None, None]
