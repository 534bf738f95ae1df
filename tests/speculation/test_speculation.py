"""Proposals, policies, verifiers and drafts, each by itself."""

from __future__ import annotations

import pytest
import torch
from fake_program import FakeProgram, greedy, table_row
from hypothesis import given, settings
from hypothesis import strategies as st
from proposing import propose

from treespec_compiler.errors import InvalidOption, InvalidTree, TokenizerMismatch
from treespec_compiler.runtime.stats import Count, Stats
from treespec_compiler.speculation.drafts.model import ModelDraft
from treespec_compiler.speculation.drafts.protocol import DraftRequest
from treespec_compiler.speculation.drafts.session import MAX_CHAIN
from treespec_compiler.speculation.drafts.tokenizers import check_tokenizers
from treespec_compiler.speculation.policies.named import as_policy
from treespec_compiler.speculation.policies.protocol import Limits, TreePolicy
from treespec_compiler.speculation.policies.static import StaticExpansion
from treespec_compiler.speculation.proposal import Proposal
from treespec_compiler.speculation.sampling.ranking import likeliest
from treespec_compiler.speculation.verifiers.greedy import GreedyVerifier, Verdict, Verifier
from treespec_compiler.speculation.verifiers.near_ties import near_tie
from treespec_compiler.tree import TokenTree

WIDE = Limits(depth=100, nodes=10_000)


def proposal_of(tokens, parents, name="draft") -> Proposal:
    tree = TokenTree(tokens, parents)
    ranks = [tree.children(parent).index(node) for node, parent in enumerate(parents)]
    return Proposal(list(tokens), list(parents), list(tree.depths), ranks, proposer=name)


# --- policies


@pytest.mark.parametrize("text", ["1,1,3", "<1,1,3>", " 1, 1 ,3 "])
def test_an_expansion_is_parsed_as_the_paper_writes_it(text):
    policy = StaticExpansion.parse(text)
    assert policy == StaticExpansion((1, 1, 3)) == as_policy(text) == as_policy([1, 1, 3])
    assert str(policy) == "<1,1,3>"
    assert policy.max_nodes == 1 + 1 + 1 + 3 and policy.max_depth == 3
    assert isinstance(policy, TreePolicy)


def test_nodes_of_an_expansion_multiply():
    assert StaticExpansion((4, 2, 1)).max_nodes == 1 + 4 + 8 + 8


@pytest.mark.parametrize("text", ["", "1,,2", "0", "1,-1", "a", "1.5", "1 1"])
def test_bad_expansions_are_refused(text):
    with pytest.raises(InvalidOption, match="expected one positive integer a level") as caught:
        StaticExpansion.parse(text)
    assert 'Type "1,1,3"' in str(caught.value)


@pytest.mark.parametrize("widths", [(), 3, "1,1", (1, True), (1, 2.0)])
def test_bad_widths_are_refused(widths):
    with pytest.raises(InvalidOption, match="Invalid option expansion"):
        StaticExpansion(widths)


# --- the greedy verifier


def rows(*choices: int, vocab: int = 8) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(choices), vocab).float()


def test_greedy_walks_by_parent_not_by_depth():
    # Both branches hold a 3 at depth 2; only the one below the accepted 1 counts.
    proposal = proposal_of([0, 2, 1, 3, 3], [-1, 0, 0, 1, 2])
    assert GreedyVerifier().verify(proposal, rows(1, 7, 3, 6, 5)) == Verdict([0, 2, 4], 5)


def test_greedy_without_a_match_gives_the_bonus_only():
    proposal = proposal_of([0, 2, 4], [-1, 0, 0])
    assert GreedyVerifier().verify(proposal, rows(1, 7, 7)) == Verdict([0], 1)


def test_ties_go_to_the_lowest_id():
    logits = torch.zeros(2, 8)
    assert GreedyVerifier().verify(proposal_of([5, 0], [-1, 0]), logits) == Verdict([0, 1], 0)


def test_equal_siblings_take_the_first():
    proposal = proposal_of([0, 1, 1], [-1, 0, 0])
    assert GreedyVerifier().verify(proposal, rows(1, 2, 3)) == Verdict([0, 1], 2)


def test_several_roots_need_the_targets_token():
    proposal = proposal_of([4, 5, 6], [-1, -1, 1])
    verifier = GreedyVerifier()
    assert verifier.verify(proposal, rows(0, 6, 7), first=5) == Verdict([1, 2], 7)
    assert verifier.verify(proposal, rows(0, 6, 7), first=3) == Verdict([], 3)
    with pytest.raises(InvalidTree, match="several roots"):
        verifier.verify(proposal, rows(0, 6, 7))
    assert isinstance(verifier, Verifier)


@st.composite
def trees(draw):
    parents = [-1, *(draw(st.integers(0, i)) for i in range(draw(st.integers(0, 90))))]
    return proposal_of([draw(st.integers(0, 2)) for _ in parents], parents)


@given(trees(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_greedy_accepts_the_longest_path_the_target_would_take(proposal, seed):
    choices = torch.randint(3, (len(proposal),), generator=torch.Generator().manual_seed(seed)).tolist()
    verdict = GreedyVerifier().verify(proposal, rows(*choices, vocab=3))
    tree = proposal.tree()
    assert tree.path(verdict.path[-1]) == verdict.path
    for node, child in zip(verdict.path, verdict.path[1:], strict=False):
        assert tree.tokens[child] == choices[node]
    last = verdict.path[-1]
    assert verdict.bonus == choices[last]
    assert verdict.bonus not in [tree.tokens[child] for child in tree.children(last)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_the_likeliest_ids_are_those_of_topk(dtype, rows, k):
    logits = torch.stack([torch.randperm(50) for _ in range(rows)]).to(dtype)
    before = logits.clone()
    assert likeliest(logits, k) == logits.topk(k).indices.flatten().tolist()
    assert likeliest(logits.t().contiguous().t(), k) == likeliest(logits, k)
    assert torch.equal(logits, before)
    assert likeliest(torch.zeros(2, 50, dtype=dtype)) == [0, 0]
    nan = torch.zeros(1, 50, dtype=dtype)
    nan[0, 7] = torch.nan
    assert likeliest(nan) == [7] == nan.argmax(-1).tolist()


# --- proposals


def test_merge_keeps_multiplicity_and_every_proposers_own():
    one = proposal_of([0, 1, 2, 3], [-1, 0, 0, 1], "one")
    two = proposal_of([0, 2, 3, 3], [-1, 0, 1, 0], "two")
    two.q = [1.0, 0.5, 0.4, 0.3]
    merged = Proposal.merge([one, two])
    assert merged.tokens == [0, 1, 2, 3, 3, 3]
    assert merged.parents == [-1, 0, 0, 1, 2, 0]
    assert merged.depths == [0, 1, 1, 2, 2, 1]
    assert merged.ranks == [0, 0, 1, 0, 0, 1]
    assert merged.multiplicity == [2, 1, 2, 1, 1, 1]
    assert merged.proposer == "one+two"
    assert [(part.proposer, nodes) for part, nodes in merged.parts] == [("one", [0, 1, 2, 3]), ("two", [0, 2, 4, 5])]
    assert merged.parts[1][0].q == two.q
    assert merged.tree() == TokenTree.merge([one.tree(), two.tree()])
    assert Proposal.merge([one]) is one


# --- the draft model

VOCAB = 20
ROW = table_row(VOCAB, seed=5)


def session_of(program, *, vocab=VOCAB, needs_q=False, max_tokens=200, max_nodes=100):
    session = ModelDraft(program).open(DraftRequest(vocab, max_tokens, max_nodes, needs_q))
    session.accept([1, 2, 3])
    return session


def test_a_tree_holds_the_likeliest_children_of_every_node():
    proposal = propose(session_of(FakeProgram(ROW, VOCAB), needs_q=True), StaticExpansion((2, 3)), WIDE)
    assert len(proposal) == 1 + 2 + 6 and proposal.tokens[0] == 3
    assert proposal.parents == [-1, 0, 0, 1, 1, 1, 2, 2, 2]
    assert proposal.depths == [0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert proposal.ranks == [0, 0, 1, 0, 1, 2, 0, 1, 2]
    tree = proposal.tree()
    assert proposal.q is not None and proposal.q[0] == 1.0
    for node in range(3):
        q = ROW((1, 2, *tree.path_tokens(node))).softmax(-1)
        children = tree.children(node)
        assert [tree.tokens[child] for child in children] == q.topk(len(children)).indices.tolist()
        assert [proposal.q[child] for child in children] == pytest.approx(q.topk(len(children)).values.tolist())


def test_one_packed_call_a_level_and_none_for_the_last():
    program = FakeProgram(ROW, VOCAB)
    propose(session_of(program), StaticExpansion((2, 2, 2)), WIDE)
    assert program.calls == [("prefill", 2), ("verify", 1), ("extend", 2), ("extend", 4)]


@pytest.mark.parametrize("nodes", range(1, 16))
def test_the_node_limit_holds(nodes):
    proposal = propose(session_of(FakeProgram(ROW, VOCAB)), StaticExpansion((2, 2, 2)), Limits(100, nodes))
    assert len(proposal) <= nodes
    assert len(proposal) == nodes or nodes not in (1, 3, 7, 15)


def test_the_depth_limit_holds_and_runs_no_level_in_vain():
    program = FakeProgram(ROW, VOCAB)
    assert max(propose(session_of(program), StaticExpansion((1, 1, 1)), Limits(2, 100)).depths) == 2
    assert program.calls == [("prefill", 2), ("verify", 1), ("extend", 1)]


def test_widths_beyond_the_vocabulary_are_cut():
    assert len(propose(session_of(FakeProgram(ROW, VOCAB)), StaticExpansion((50,)), WIDE)) == 1 + VOCAB


class Uneven:
    """Widths by node, as a measured tree would have them."""

    max_nodes, max_depth, needs_q = 20, 3, False

    def widths(self, depth, proposal):
        return ([3], [2, 0, 1], [])[depth]


def test_a_policy_may_choose_a_width_for_every_node():
    policy = as_policy(Uneven())
    proposal = propose(session_of(FakeProgram(ROW, VOCAB)), policy, WIDE)
    assert proposal.parents == [-1, 0, 0, 0, 1, 1, 3]
    assert proposal.ranks == [0, 0, 1, 2, 0, 1, 0]
    tree = proposal.tree()
    assert tree.tokens[6] == int(ROW((1, 2, *tree.path_tokens(3))).argmax())
    cut = propose(session_of(FakeProgram(ROW, VOCAB)), policy, Limits(9, 6))
    assert cut.parents == [-1, 0, 0, 0, 1, 1]


def test_a_policy_with_a_wrong_number_of_widths_is_told():
    policy = Uneven()
    policy.widths = lambda depth, proposal: [1, 1]
    with pytest.raises(InvalidOption, match=r"got \[1, 1\], expected a number, an empty list or 1 numbers"):
        propose(session_of(FakeProgram(ROW, VOCAB)), policy, WIDE)


@pytest.mark.parametrize("plain_steps", [0, 1, 5, MAX_CHAIN - 1, MAX_CHAIN, 60])
def test_catching_up_after_steps_without_it(plain_steps):
    program = FakeProgram(ROW, VOCAB)
    session = session_of(program)
    truth = greedy(ROW, [1, 2, 3], 140)
    seen = 3
    policy = StaticExpansion((1, 1))
    for _ in range(2):
        assert propose(session, policy, WIDE).tokens == truth[seen - 1 : seen + 2]
        session.accept(truth[seen : seen + 3])  # both and a bonus token
        seen += 3
        for _ in range(plain_steps // 2):
            assert len(propose(session, policy, Limits(0, 1))) == 1
            session.accept([truth[seen]])
            seen += 1
        session.accept(truth[seen : seen + plain_steps - plain_steps // 2])
        seen += plain_steps - plain_steps // 2
    assert propose(session, policy, WIDE).tokens[0] == truth[seen - 1]
    session.close()
    assert program.caches[0].length() == 0


@pytest.mark.parametrize("vocab", [VOCAB - 7, VOCAB + 9])
def test_a_draft_never_proposes_ids_the_target_lacks(vocab):
    program = FakeProgram(table_row(vocab, seed=5), vocab)
    session = session_of(program, needs_q=True)
    proposal = propose(session, StaticExpansion((vocab, 1)), WIDE)
    assert len(proposal) == 1 + 2 * min(vocab, VOCAB)
    assert max(proposal.tokens) < min(vocab, VOCAB)
    assert proposal.q is not None and sum(proposal.q[1 : 1 + min(vocab, VOCAB)]) == pytest.approx(1.0, abs=1e-5)
    session.accept([VOCAB - 1])  # an id the smaller draft lacks
    assert propose(session, StaticExpansion((1,)), WIDE).tokens[0] == VOCAB - 1


# --- statistics, near ties, tokenizers


def test_counts_by_depth_and_rank():
    stats = Stats()
    stats.record(proposal_of([0, 1, 2, 3, 4], [-1, 0, 0, 1, 2]), [0, 2, 4])
    stats.record(proposal_of([0, 1, 2, 3, 4], [-1, 0, 0, 1, 2]), [0])
    stats.record(proposal_of([0], [-1]), [0])
    assert stats.steps == 3 and stats.nodes == 11 and stats.accepted == 2
    assert stats.accepted_by_depth == [Count(4, 2, 1), Count(4, 1, 1)]
    assert stats.accepted_by_rank == [Count(6, 3, 1), Count(2, 2, 1)]
    assert stats.accepted_by_depth[0].rate == 0.5 and Count().rate == 0.0


def test_near_ties_look_at_the_path_only():
    logits = torch.tensor([[4.0, 1.0], [4.0, 3.999], [4.0, 1.0]])
    assert not near_tie(logits, [0, 2], 2.0**-7)
    assert near_tie(logits, [0, 1], 2.0**-7)
    assert not near_tie(logits, [0, 1], 2.0**-13)


def test_tokenizers_are_compared_by_id():
    vocab = {"a": 0, "b": 1}
    for other in (vocab, {"a": 0}, {"a": 0, "b": 1, "c": 2}, {"b": 1, "x": 7}, None):
        check_tokenizers(vocab, other)
        check_tokenizers(other, vocab)

    class Tokenizer:
        def get_vocab(self):
            return {"a": 0, "B": 1}

    with pytest.raises(TokenizerMismatch, match=r"id 1 = 'b' in the target and 'B' in the draft \(1 of 2 common ids"):
        check_tokenizers(vocab, Tokenizer())
    with pytest.raises(TokenizerMismatch, match="without a common id"):
        check_tokenizers(vocab, {"z": 9})
