"""`policy="auto"` by virtual costs: what it chooses, when it changes its mind, and what it costs. No real time."""

from __future__ import annotations

import gc
import itertools
import random

import pytest
from fake_program import FakeProgram, greedy, table_row

import treespec_compiler as treespec
from treespec_compiler.speculation.cost.acceptance import Acceptance, forget, remembered, split
from treespec_compiler.speculation.cost.latency import CostModel, LatencyTable, Point
from treespec_compiler.speculation.drafts.model import ModelDraft
from treespec_compiler.speculation.drafts.ngram import NGramDraft
from treespec_compiler.speculation.policies.auto import Auto, Controller
from treespec_compiler.speculation.policies.fixed import FixedTree
from treespec_compiler.speculation.policies.named import as_policy
from treespec_compiler.speculation.policies.sequoia import fastest_tree
from treespec_compiler.speculation.proposal import Proposal

VOCAB = 40
TARGET = table_row(VOCAB, seed=1)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(autouse=True)
def _fresh():
    forget()


def table(call: float, node: float) -> LatencyTable:
    return LatencyTable([Point(1, 0, 1, call), Point(2, 0, 1, call + node)])


class World:
    """Steps with virtual time: children of rank r are accepted with chance `rates[r]`."""

    def __init__(self, rates, *, verify=(1.0, 0.05), draft=(0.1, 0.005), prefill=1.0, seed=0, memory=None):
        self.rates, self.prefill = rates, prefill
        self.cost = CostModel(table(*verify), [table(*draft)], overhead=0.04)
        self.true = CostModel(table(*verify), [table(*draft)], overhead=0.04)
        self.memory = memory or Acceptance()
        self.chance = random.Random(seed)
        self.plans = []

    def request(self, tokens: int, policy=None):
        """(seconds, steps) of a request."""
        controller = Controller(Auto(), self.cost, [self.memory])
        seconds, steps, done, begun = 0.0, 0, 0, False
        while done < tokens:
            tree = policy or controller.plan(100 + done, tokens - done)[0]
            self.plans.append(tree)
            if tree is not None and not begun:
                begun, seconds = True, seconds + self.prefill
            tree = tree or FixedTree((-1,))
            proposal = Proposal.root(1)
            ranks = {}
            for parent in tree.parents[1:]:
                ranks[parent] = ranks.get(parent, -1) + 1
                proposal.tokens.append(1)
                proposal.parents.append(parent)
                proposal.depths.append(proposal.depths[parent] + 1)
                proposal.ranks.append(ranks[parent])
            path = [0]
            while True:
                draw, node = self.chance.random(), None
                for child in [i for i, p in enumerate(proposal.parents) if p == path[-1]]:
                    draw -= self.rates[proposal.ranks[child]] if proposal.ranks[child] < len(self.rates) else 0.0
                    if draw < 0:
                        node = child
                        break
                if node is None:
                    break
                path.append(node)
            verify = self.true.verify(len(proposal.tokens), 100 + done)
            draft = self.true.draft(0, [len(level) for level in tree.levels[:-1]])
            rest = self.true.overhead if len(proposal.tokens) > 1 else 0.0
            controller.observe(proposal, path, len(path), verify, draft, rest)
            seconds += verify + draft + rest
            steps, done = steps + 1, done + len(path)
        return seconds, steps


def test_a_useless_draft_costs_little():
    for seed in range(20):
        world = World([0.001], prefill=1.0, seed=seed)
        seconds, _ = world.request(128)
        assert seconds <= 128 * 1.03
        # and over many requests, each of which would have to run the prompt again, hardly anything
        more = sum(world.request(128)[0] for _ in range(20))
        assert more <= 20 * 128 * 1.015


def test_a_good_draft_reaches_the_best_static_tree():
    rates = [0.75, 0.12, 0.04, 0.02]
    cost = World(rates).true
    best = fastest_tree(rates, lambda n, rows: cost.step(0, n, rows), 24, 8)
    auto, static = 0.0, 0.0
    for seed in range(10):
        world = World(rates, seed=seed)
        world.request(128)  # the first request learns
        auto += sum(world.request(128)[0] for _ in range(4))
        static += sum(World(rates, seed=seed).request(128, best.tree)[0] for _ in range(4))
    assert auto <= static * 1.05


def test_the_first_request_of_a_good_draft_is_faster_too():
    seconds = [World([0.8, 0.1], seed=seed).request(128)[0] for seed in range(10)]
    assert sum(seconds) / 10 < 128 / 1.8


def test_it_ends_speculation_when_the_draft_stops_being_good_and_comes_back():
    world = World([0.8, 0.1])
    world.request(256)
    assert world.plans[-1] is not None
    world.rates = [0.01]
    seconds, _ = world.request(1000)
    assert world.plans[-1] is None and seconds < 1000 * 1.03
    world.rates = [0.9]
    seconds, _ = world.request(3000)
    assert world.plans[-1] is not None and seconds < 3000 * 0.75


def test_plans_do_not_flutter():
    world = World([0.6, 0.15, 0.05])
    for _ in range(10):
        world.request(200)
    late = world.plans[len(world.plans) // 2 :]
    changes = sum(a != b for a, b in itertools.pairwise(late))
    assert changes <= len(late) / 25


def test_an_expensive_draft_is_not_even_tried():
    world = World([0.9], draft=(1.2, 0.0))
    seconds, _ = world.request(128)
    assert seconds == pytest.approx(128) and set(world.plans) == {None}


def test_wrong_tables_are_found_out():
    """The draft takes ten times as long as the table says."""
    world = World([0.6])
    world.true = CostModel(world.cost.target, [table(1.5, 0.0)], overhead=0.04)
    seconds, _ = world.request(2000)
    assert seconds < 2000 * 1.08


def test_a_busy_machine_does_not_end_speculation():
    """Everything takes three times as long as measured; now and then the machine is away for a while."""
    world = World([0.8, 0.1])
    slow, away = world.true, random.Random(3)
    world.true = CostModel(table(3.0, 0.15), [table(0.3, 0.015)], overhead=0.12)
    verify = world.true.verify
    world.true.verify = lambda *a: verify(*a) + (20.0 if away.random() < 0.02 else 0.0)
    world.request(400)
    assert sum(p is not None for p in world.plans) > 0.9 * len(world.plans)
    assert slow is not world.true


def test_a_draft_that_another_one_makes_superfluous_is_left_out():
    cost = CostModel(table(1.0, 0.05), [table(0.1, 0.0), table(0.25, 0.0)], 0.02)
    better, worse = Acceptance(), Acceptance()
    better.tried, better.accepted = [40.0, 9, 9, 9], [32.0, 1, 0, 0]
    worse.tried, worse.accepted = [40.0, 9, 9, 9], [24.0, 1, 0, 0]
    for _ in range(30):
        better.compare(3, 2)
        worse.compare(2, 3)
    plans = Controller(Auto(), cost, [better, worse]).plan(0, 100)
    assert plans[0] is not None and plans[1] is None
    for _ in range(200):
        worse.compare(3, 0)
        better.compare(3, 0)
    worse.patience = 0
    cost.drafts[1] = cost.drafts[0]
    assert None not in Controller(Auto(), cost, [better, worse]).plan(0, 100)


def test_only_chains_where_only_chains_are_allowed():
    memory = Acceptance()
    memory.tried, memory.accepted = [50.0, 20, 20, 20], [20.0, 8, 4, 2]
    cost = CostModel(table(1.0, 0.001), [table(0.2, 0.0)], 0.02)
    forked, chain = (Controller(Auto(chain=c), cost, [memory]).plan(0, 100)[0] for c in (False, True))
    assert forked.max_nodes > forked.max_depth + 1 and chain.max_nodes == chain.max_depth + 1


def test_no_deeper_than_what_is_still_wanted():
    memory = Acceptance()
    memory.tried, memory.accepted = [50.0, 0, 0, 0], [49.0, 0, 0, 0]
    cost = CostModel(table(1.0, 0.001), [table(0.01, 0.0)], 0.0)
    assert Controller(Auto(), cost, [memory]).plan(0, 4)[0].max_depth <= 3


# --- acceptance


def test_rates_begin_with_the_prior_and_follow_what_is_seen():
    memory = Acceptance()
    assert memory.rates()[0] == pytest.approx(0.7)
    missed = Proposal([1, 2, 3], [-1, 0, 0], [0, 1, 1], [0, 0, 1])
    for _ in range(3):
        memory.observe(missed, {0})
    assert memory.rates()[0] < 0.2
    for _ in range(300):
        memory.observe(missed, {0, 2})
    assert memory.rates()[1] > 0.9 and memory.rates()[0] < 0.05 and sum(memory.rates()) <= 1.0 + 1e-9


def test_children_of_rejected_nodes_do_not_count():
    memory = Acceptance()
    memory.observe(Proposal([1, 2, 3], [-1, 0, 1], [0, 1, 2], [0, 0, 0]), {0})
    assert memory.tried[0] == 1.0 and memory.accepted[0] == 0.0


def test_merged_proposals_are_told_apart():
    one = Proposal([1, 5, 6], [-1, 0, 1], [0, 1, 2], [0, 0, 0])
    two = Proposal([1, 7, 5], [-1, 0, 0], [0, 1, 1], [0, 0, 1])
    merged = Proposal.merge([one, two])
    (a, on_a), (b, on_b) = split(merged, [0, 1, 2])
    assert (a, on_a) == (one, {0, 1, 2}) and (b, on_b) == (two, {0, 2})


def test_memory_keeps_no_model_alive():
    target, draft = FakeProgram(TARGET, VOCAB), FakeProgram(TARGET, VOCAB)
    memory = remembered(target, draft)
    assert remembered(target, draft) is memory
    assert remembered(target, FakeProgram(TARGET, VOCAB)) is not memory
    import weakref

    gone = weakref.ref(draft)
    del draft
    gc.collect()
    assert gone() is None


def test_what_a_draft_is_worth_beside_another_says_nothing_about_it_alone():
    target, draft = FakeProgram(TARGET, VOCAB), ModelDraft(FakeProgram(TARGET, VOCAB))
    alone, together = Auto().control(target, [draft]), Auto().control(target, [draft, NGramDraft()])
    again = Auto().control(target, [draft, NGramDraft()])
    assert alone.arms[0].memory is not together.arms[0].memory
    assert again.arms[0].memory is together.arms[0].memory
    together._give_up(together.arms[0])
    assert together.arms[0].memory.patience and not alone.arms[0].memory.patience


# --- in generate


@pytest.mark.parametrize("agreement", [0.0, 0.4, 0.9, 1.0])
def test_auto_is_the_default_and_exact(agreement):
    assert isinstance(as_policy(None), Auto) and as_policy("auto") == Auto()
    program = FakeProgram(TARGET, VOCAB)
    draft = FakeProgram(table_row(VOCAB, 2, agree_with=TARGET, agreement=agreement), VOCAB)
    for _ in range(3):
        out = treespec.generate(program, PROMPT, draft=[draft, "ngram"], max_new_tokens=80)
        assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 80)]
    if agreement == 1.0:
        assert out.stats.tokens_per_step > 4
    if agreement == 0.0:
        assert out.stats.nodes_per_step < 1.5


def test_a_useless_draft_is_remembered_and_its_prompt_never_run_again():
    program, draft = FakeProgram(TARGET, VOCAB), FakeProgram(table_row(VOCAB, 7), VOCAB)
    for _ in range(2):
        treespec.generate(program, PROMPT, draft=draft, max_new_tokens=30)
        calls = len(draft.calls)
    assert calls and calls == len(draft.calls)
    treespec.generate(program, PROMPT, draft=draft, max_new_tokens=10)
    assert len(draft.calls) == calls
