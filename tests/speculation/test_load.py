"""One budget of nodes for all requests: spent where it earns most, narrowed by load, learned from the clock."""

from __future__ import annotations

import pytest

from treespec_compiler.speculation.cost.acceptance import Acceptance
from treespec_compiler.speculation.cost.latency import CostModel, LatencyTable, Point
from treespec_compiler.speculation.policies.auto import Auto, Controller
from treespec_compiler.speculation.policies.load import Load, Loaded, Share, Timings
from treespec_compiler.speculation.proposal import Proposal

MS = 1e-3


def table(call: float, node: float) -> LatencyTable:
    """`call` for one node, up to 8 of them, and `node` for each further one."""
    return LatencyTable([Point(n, 0, 1, call + node * max(0, n - 8)) for n in (1, 8, 9, 64)])


def load_of(node: float = 0.3 * MS, draft: float = 0.2 * MS) -> Load:
    load = Load()
    load.prepare(lambda: CostModel(table(4 * MS, node), [table(draft, draft / 40)]))
    return load


def planned(load: Load, shares: list[Share]) -> None:
    """The plan after the plain steps that an engine begins with."""
    for _ in range(2):
        load.plan(shares)
        assert sum(nodes(shares)) == 0
        load.took(len(shares), [], load.cost.verify(len(shares)), 0.0, 0.0)
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
        took = 4 * MS + 1.5 * MS * drafting
        load.took(8 + drafting, [8] * (drafting > 0), took, 0.3 * MS * (drafting > 0), 0.1 * MS)
        load.plan(shares)
    assert sum(nodes(shares)) == 0 < before


def test_a_trial_is_made_after_a_wait():
    load, shares = load_of(), [share((0.02,)) for _ in range(2)]
    trials = 0
    for _ in range(3000):
        load.plan(shares)
        assert max(nodes(shares)) <= 2
        trials += sum(nodes(shares)) > 0
        load.took(2 + sum(nodes(shares)), [], 4 * MS, 0.0, 0.0)
    assert 2 <= trials <= 60


def test_plans_are_kept_for_some_steps():
    load, shares = load_of(), [share(), share()]
    planned(load, shares)
    first = shares[0].trees[0]
    shares[0].own[0] = share((0.01,)).own[0]
    for _ in range(3):
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
    assert one.plan(10, 50) == one.trees and one.asked
    one.observe(Proposal([5, 6, 7], [-1, 0, 1], [0, 1, 2], [0, 0, 0]), [0, 1], 2, 0.0, 0.0, 0.0)
    assert one.own[0].tried[0] == 2.0 and one.own[0].accepted[0] == 1.0 and one.pools[0].tried[0] == 2.0
    one.trees = [None]
    one.observe(Proposal([5], [-1], [0], [0]), [0], 1, 0.0, 0.0, 0.0)
    assert one.own[0].tried[0] == 2.0 and one.plan(12, 48) == [None] and not one.asked


def test_chains_where_they_are_asked_for():
    load, shares = load_of(node=0.0), [share((0.5, 0.4), chain=True)]
    planned(load, shares)
    tree = shares[0].trees[0]
    assert tree is not None and tree.max_nodes == tree.max_depth + 1 > 1


def test_trees_of_a_seed_do_not_follow_the_load():
    class Unmeasured:
        name, graph_module = "d", None

    target = draft = Unmeasured()
    policy = Loaded(clock=False)
    sampled = policy.for_sampling(None, None, 1.0, seeded=True)
    assert isinstance(sampled, Loaded) and sampled.load is policy.load
    assert isinstance(sampled.control(target, [draft]), Controller)
    assert isinstance(policy.for_sampling(None, None, 1.0, seeded=False), Loaded)


def test_factors_of_sizes_that_were_not_seen():
    factors: dict[int, float] = {}
    assert Timings.factor(factors, 9) == 1.0
    Timings.note(factors, 8, 3.0)
    assert Timings.factor(factors, 100) == 2.0
    Timings.note(factors, 100, 2.0)
    assert Timings.factor(factors, 64) == 2.0 and Timings.factor(factors, 15) == 2.0
    Timings.note(factors, 8, 1000.0)  # a stall
    assert Timings.factor(factors, 8) == pytest.approx(2.6)
