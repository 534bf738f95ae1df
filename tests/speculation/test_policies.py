"""Tree policies: shapes, optimality by exhaustive comparison, and exact output with each."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fake_program import FakeProgram, greedy, table_row
from hypothesis import given
from hypothesis import strategies as st
from proposing import propose
from sequoia import sequoia_trees

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption
from treespec_compiler.speculation.drafts.model import ModelDraft
from treespec_compiler.speculation.drafts.protocol import DraftRequest
from treespec_compiler.speculation.policies.best_first import BestFirst, values
from treespec_compiler.speculation.policies.equal_growth import EqualGrowth
from treespec_compiler.speculation.policies.fixed import FixedTree
from treespec_compiler.speculation.policies.named import as_policy
from treespec_compiler.speculation.policies.protocol import Limits, TreePolicy
from treespec_compiler.speculation.policies.sequoia import fastest_tree, greedy_nodes
from treespec_compiler.speculation.policies.static import StaticExpansion

VOCAB = 40
TARGET = table_row(VOCAB, seed=1)
PROMPT = [3, 1, 4, 1, 5]
WIDE = Limits(100, 10_000)

POLICIES = [
    StaticExpansion((2, 1)),
    FixedTree.chain(4),
    FixedTree((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    BestFirst(8, depth=4, beam=2),
    BestFirst(4, depth=3, beam=4),
    BestFirst(20, depth=5, beam=3, stop=0.05),
    EqualGrowth(2, 4),
    EqualGrowth(3, 2),
]


def draft(agreement: float) -> FakeProgram:
    return FakeProgram(table_row(VOCAB, 2, agree_with=TARGET, agreement=agreement), VOCAB)


def session(program: FakeProgram, tokens=(1, 2, 3)):
    opened = ModelDraft(program).open(DraftRequest(VOCAB, 200, 64, True))
    opened.accept(list(tokens))
    return opened


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_output_is_exact_with_every_policy(policy, agreement):
    assert isinstance(policy, TreePolicy)
    program = FakeProgram(TARGET, VOCAB)
    out = treespec.generate(program, PROMPT, draft=draft(agreement), max_new_tokens=40, policy=policy)
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 40)]
    assert max(n for kind, n in program.calls if kind == "verify") <= policy.max_nodes
    if agreement == 1.0:
        assert out.stats.tokens_per_step > 1.9


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("limit", [6, 9, 14])
def test_the_end_of_the_context_cuts_every_policys_trees(policy, limit):
    program = FakeProgram(TARGET, VOCAB, max_context=limit)
    out = treespec.generate(program, PROMPT, draft=draft(0.9), max_new_tokens=50, policy=policy)
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, limit - 5)]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_nearly_full_cache_cuts_the_tree(policy):
    for nodes in range(1, 8):
        proposal = propose(session(draft(0.5)), policy, Limits(100, nodes))
        assert 1 <= len(proposal) <= nodes
        proposal.tree()


# --- fixed trees


def test_widths_of_a_fixed_tree_are_given_level_by_level():
    tree = FixedTree((-1, 0, 0, 0, 1, 1, 2, 4))
    assert tree.levels == ((3,), (2, 1, 0), (1, 0, 0), (0,))
    assert tree.max_nodes == 8 and tree.max_depth == 3
    proposal = propose(session(draft(0.5)), tree, WIDE)
    assert tuple(proposal.parents) == tree.parents


def test_a_cut_fixed_tree_keeps_each_nodes_own_width():
    tree = FixedTree((-1, 0, 0, 1, 2, 2))
    proposal = propose(session(draft(0.5)), tree, WIDE)
    # The first level's node of rank 0 is missing, as when a proposer had nothing else.
    for values_ in (proposal.tokens, proposal.parents, proposal.depths, proposal.ranks):
        del values_[1], values_[2:]
    assert tree.widths(1, proposal) == [2]


@pytest.mark.parametrize("parents", [(), (0,), (-1, -1), (-1, 1), (-1, 0, 1, 0), (-1, 0, 0, 2, 1)])
def test_bad_fixed_trees_are_refused(parents):
    with pytest.raises(InvalidOption, match=r"FixedTree\.parents"):
        FixedTree(parents)


# --- Sequoia


def every_tree(nodes: int, ranks: int, depth: int):
    """All trees by (parent, rank), siblings without gaps."""
    if nodes == 1:
        yield ()
        return
    for smaller in every_tree(nodes - 1, ranks, depth):
        used = {(p, r) for p, r in smaller}
        depths = [0]
        for p, _ in smaller:
            depths.append(depths[p] + 1)
        for parent in range(nodes - 1):
            rank = sum(p == parent for p, _ in used)
            if rank < ranks and depths[parent] < depth:
                yield (*smaller, (parent, rank))


def value_of(tree, acceptance) -> float:
    value = [1.0]
    for parent, rank in tree:
        value.append(value[parent] * acceptance[rank])
    return sum(value)


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=3), st.integers(1, 3))
def test_the_dynamic_programme_finds_the_best_of_all_trees(acceptance, depth):
    for size, (tree, value) in enumerate(sequoia_trees(acceptance, 5, depth), 1):
        assert tree.max_nodes == size and tree.max_depth <= depth
        best = max(value_of(t, acceptance) for t in every_tree(size, len(acceptance), depth))
        assert value == pytest.approx(best, rel=1e-12)


@given(st.lists(st.floats(0.01, 0.6), min_size=1, max_size=4), st.integers(1, 6))
def test_greedy_growth_gives_the_same_values_where_acceptance_falls(acceptance, depth):
    acceptance = sorted(acceptance, reverse=True)
    planned = sequoia_trees(acceptance, 12, depth)
    nodes = greedy_nodes(acceptance, 12, depth)
    total = list(itertools.accumulate((v for *_, v in nodes), initial=1.0))
    assert total == pytest.approx([value for _, value in planned])


def test_a_tree_stops_growing_where_the_depth_leaves_no_room():
    assert [t.max_nodes for t, _ in sequoia_trees([0.5], 9, 3)] == [1, 2, 3, 4]


def test_the_fastest_tree_follows_the_costs():
    def flat(nodes, rows):
        return 1.0 + 0.01 * len(rows)

    def steep(nodes, rows):
        return float(nodes) + 0.5 * len(rows)

    assert fastest_tree([0.7, 0.1], flat, 16, 6).tree.max_nodes == 16
    plain = fastest_tree([0.7, 0.1], steep, 16, 6)
    assert plain.tree.max_nodes == 1 and plain.tokens == 1.0
    # Each level costs much and verification little: rather wide than deep.
    wide = fastest_tree([0.4, 0.2, 0.1], lambda nodes, rows: 1.0 + 0.4 * len(rows), 8, 6).tree
    assert wide.max_depth == 1 and wide.max_nodes == 4
    # Wide levels cost much: a chain.
    tree = fastest_tree([0.8, 0.1], lambda n, rows: 1 + sum(r - 1 for r in rows) + 0.3 * (n > 5), 8, 8).tree
    assert tree == FixedTree.chain(tree.max_depth)
    best = fastest_tree([0.6, 0.2, 0.05], lambda n, rows: 1 + 0.05 * n + 0.1 * len(rows), 12, 5)
    brute = max(
        value / (1 + 0.05 * tree.max_nodes + 0.1 * tree.max_depth)
        for depth in range(1, 6)
        for tree, value in sequoia_trees([0.6, 0.2, 0.05], 12, depth)
    )
    assert best.rate == pytest.approx(brute)


# --- best first and equal growth


def smooth(tokens):
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tokens[-3:]) % 2**31)) * 1.5


def exhaustive(root_tokens, depth: int, width: int):
    """Values of all nodes within reach, largest first."""
    found = []

    def walk(tokens, value, d):
        if d == depth:
            return
        q, ids = smooth(tokens).softmax(-1).topk(width)
        for chance, token in zip(q.tolist(), ids.tolist()):
            found.append(value * chance)
            walk((*tokens, token), value * chance, d + 1)

    walk(tuple(root_tokens), 1.0, 0)
    return sorted(found, reverse=True)


@pytest.mark.parametrize("nodes", [2, 5, 9, 14])
def test_best_first_verifies_the_most_valuable_nodes(nodes):
    width = 4
    policy = BestFirst(nodes, depth=3, beam=width)
    proposal = propose(session(FakeProgram(smooth, VOCAB)), policy, WIDE)
    value = values(proposal)
    assert len(proposal) == nodes
    # A beam as wide as the level loses nothing that ranks among the first 4 of each level.
    best = exhaustive((1, 2, 3), 3, width)
    assert sorted(value[1:], reverse=True)[:4] == pytest.approx(best[: min(4, nodes - 1)])
    for node, parent in enumerate(proposal.parents[1:], 1):
        path = proposal.tree().path_tokens(parent)
        q = smooth((1, 2, *path)).softmax(-1)
        assert math.isclose(proposal.q[node], q[proposal.tokens[node]], rel_tol=1e-5)


def test_best_first_runs_only_its_beam():
    program = FakeProgram(smooth, VOCAB)
    propose(session(program), BestFirst(30, depth=4, beam=3), WIDE)
    assert program.calls == [("prefill", 2), ("verify", 1), ("extend", 3), ("extend", 3), ("extend", 3)]


def test_an_unsure_draft_gets_a_small_tree():
    flat = FakeProgram(lambda tokens: torch.zeros(VOCAB), VOCAB)
    assert len(propose(session(flat), BestFirst(12, stop=0.1), WIDE)) == 1
    assert flat.calls[-1] == ("verify", 1)


def test_equal_growth_runs_the_same_number_of_nodes_each_time():
    program = FakeProgram(smooth, VOCAB)
    proposal = propose(session(program), EqualGrowth(3, 4), WIDE)
    assert program.calls == [("prefill", 2), ("verify", 1), ("extend", 3), ("extend", 3), ("extend", 3)]
    assert len(proposal) == 13


def test_equal_growth_may_grow_an_older_node():
    """The likeliest leaf can be at any depth."""

    def row(tokens):
        logits = torch.full((VOCAB,), -9.0)
        if tokens[-1] == 3:
            logits[[10, 11]] = torch.tensor([0.5, 0.4]).log()
        elif tokens[-1] == 10:
            logits[:] = 0.0  # unsure: nothing below 10 is worth more than 11
        else:
            logits[[20, 21]] = torch.tensor([0.9, 0.1]).log()
        return logits

    proposal = propose(session(FakeProgram(row, VOCAB)), EqualGrowth(1, 3), WIDE)
    assert proposal.tokens[:2] == [3, 10]
    two = propose(session(FakeProgram(row, VOCAB)), EqualGrowth(2, 2), WIDE)
    assert set(two.tokens) == {3, 10, 11, 20, 21}


@pytest.mark.parametrize("bad", [{"nodes": 0}, {"depth": -1}, {"beam": True}, {"stop": 1.0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(InvalidOption, match="expected a"):
        BestFirst(**bad)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("chain:3", FixedTree.chain(3)),
        ("best-first:9", BestFirst(9)),
        ("best-first", BestFirst()),
        ("equal-growth:3,2", EqualGrowth(3, 2)),
        ("<2,1>", StaticExpansion((2, 1))),
    ],
)
def test_policies_have_names(text, policy):
    assert as_policy(text) == policy


@pytest.mark.parametrize("text", ["chain:x", "best-first:1,2", "width:3", "chain:0"])
def test_unknown_names_are_refused(text):
    with pytest.raises(InvalidOption, match="Invalid option policy"):
        as_policy(text)
