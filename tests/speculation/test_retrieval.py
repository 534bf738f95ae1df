"""Drafts that look continuations up: earlier outputs (`suffix`) and the target's own likeliest tokens (`recycle`)."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from fake_program import FakeProgram, greedy, table_row
from hypothesis import given
from hypothesis import strategies as st

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption
from treespec_compiler.speculation.drafts.automaton import Matcher, SuffixAutomaton
from treespec_compiler.speculation.drafts.protocol import Draft, DraftRequest, Learner
from treespec_compiler.speculation.drafts.recycle import Followers, RecycleDraft
from treespec_compiler.speculation.drafts.suffix import Outputs, SuffixDraft
from treespec_compiler.speculation.policies.best_first import BestFirst
from treespec_compiler.speculation.policies.protocol import Limits
from treespec_compiler.speculation.policies.static import StaticExpansion
from treespec_compiler.speculation.sampling.ranking import largest

WIDE = Limits(100, 1000)
VOCAB = 50
ROW = table_row(VOCAB, 3)
PROMPT = [3, 4, 5, 6]


def occurs(texts: list[list[int]], part: list[int]) -> bool:
    return any(text[i : i + len(part)] == part for text in texts for i in range(len(text) - len(part) + 1))


tokens = st.lists(st.integers(0, 2), max_size=20)


@given(st.lists(tokens, max_size=3), tokens, st.lists(tokens, max_size=2))
def test_a_matcher_finds_the_longest_suffix_while_the_other_text_grows(before, text, later):
    automaton = SuffixAutomaton()

    def add(other):
        for token in other:
            automaton.append(token)
        automaton.separate()

    for other in before:
        add(other)
    matcher = Matcher(automaton)
    known, pending = list(before), list(later)
    for at, token in enumerate(text):
        matcher.follow(token)
        longest = max(n for n in range(at + 2) if n == 0 or occurs(known, text[at + 1 - n : at + 1]))
        # what the text matched when it was followed, unless a longer string has come since: at least that
        assert 0 <= matcher.length <= longest and (matcher.length == longest or len(known) > len(before))
        part = text[at + 1 - matcher.length : at + 1]
        assert matcher.length == 0 or occurs(known, part)
        if pending and at % 5 == 4:
            known.append(pending.pop())
            add(known[-1])
            found = {token for token, _, _ in automaton.shares(matcher.state, 9)} if matcher.length else set()
            matcher.settle(1)
            if matcher.length:
                part = text[at + 1 - matcher.length : at + 1]
                found = {token for token, _, _ in automaton.shares(matcher.state, 9)}
                followed = {
                    other[i + len(part)]
                    for other in known
                    for i in range(len(other) - len(part))
                    if other[i : i + len(part)] == part
                }
                assert found == followed
            return  # shortened: from here on it is another match


def opened(draft: Draft, text: list[int], prompt: list[int] | None = None):
    session = draft.open(DraftRequest(VOCAB, 200, 64, prompt=text if prompt is None else prompt))
    session.accept(text)
    return session


def test_what_an_earlier_request_wrote_is_proposed():
    draft = SuffixDraft()
    first = opened(draft, [1, 2, 3], prompt=[1, 2, 3])
    first.accept([7, 8, 9, 10])
    first.close()
    proposal = opened(draft, [40, 41, 7, 8]).propose(StaticExpansion((1, 1, 1)), WIDE)
    assert proposal.tokens == [8, 9, 10] and proposal.parents == [-1, 0, 1]  # nothing follows the text's end
    assert proposal.proposer == "suffix"
    # a request's own text wins where it matches as well
    own = opened(draft, [7, 8, 20, 7, 8]).propose(StaticExpansion((1,)), WIDE)
    assert own.tokens == [8, 20]


def test_branches_of_earlier_outputs_by_how_often_they_were_taken():
    draft = SuffixDraft()
    for last in (9, 5, 9):
        session = opened(draft, [30], prompt=[30])
        session.accept([7, 8, last])
        session.close()
    proposal = opened(draft, [7, 8]).propose(BestFirst(4), WIDE)
    assert proposal.tokens[:3] == [8, 9, 5]
    assert proposal.q == pytest.approx([1.0, 2 / 3, 1 / 3])


def test_nothing_of_the_prompt_is_remembered_but_its_end():
    draft = SuffixDraft()
    session = opened(draft, list(range(20, 40)))
    session.close()
    assert draft.outputs.size == 0  # no output
    session = opened(draft, list(range(20, 40)))
    session.accept([1, 2])
    session.close()
    assert len(opened(draft, [20, 21]).propose(StaticExpansion((1,)), WIDE)) == 1
    assert opened(draft, [38, 39]).propose(StaticExpansion((1,)), WIDE).tokens == [39, 1]


def test_memory_is_bounded_and_the_oldest_goes_first():
    outputs = Outputs(most=40)
    draft = SuffixDraft(outputs)
    for start in range(0, 400, 4):
        outputs.add([1000 + start, 1001 + start, 1002 + start])
        assert outputs.size <= 40
    session = draft.open(DraftRequest(5000, 200, 64, prompt=[1]))
    session.accept([1396, 1397])
    assert session.propose(StaticExpansion((1,)), WIDE).tokens == [1397, 1398]
    session.accept([1000, 1001])
    assert len(session.propose(StaticExpansion((1,)), WIDE)) == 1
    # the session goes on when the halves are exchanged under it
    for start in range(0, 80, 4):
        outputs.add([2000 + start, 2001 + start, 2002 + start])
    session.accept([2076, 2077])
    assert session.propose(StaticExpansion((1,)), WIDE).tokens == [2077, 2078]
    outputs.add(list(range(3000, 3100)))
    assert outputs.size <= 40


@given(
    st.integers(1, 700) | st.integers(2000, 5000),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64]),  # by numpy, and as on a GPU
)
def test_largest_are_those_of_topk(width, k, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randperm(3 * width, generator=generator)[:width].to(dtype).repeat(2, 1)
    logits[1] = logits[1].flip(0)
    k = min(k, width)
    ids, finite = largest(logits, k)
    assert ids.tolist() == logits.topk(k).indices.tolist() and finite.tolist() == [True, True]
    logits[1, width // 2] = float("nan")
    assert largest(logits, k)[1].tolist() == [True, False]


def test_the_targets_choices_are_proposed_the_latest_ones():
    followers = Followers(VOCAB, k=3)
    session = opened(RecycleDraft(followers), [1, 2])
    assert isinstance(session, Learner)
    assert len(session.propose(StaticExpansion((2, 2)), WIDE)) == 1  # nothing known
    rows = torch.zeros(3, VOCAB)
    for row, best in enumerate([(5, 6, 7), (8, 9, 10), (11, 12, 13)]):
        rows[row, list(best)] = torch.tensor([3.0, 2.0, 1.0])
    session.learn([2, 5, 2], rows)  # of a token twice in the tree the later node counts
    proposal = session.propose(StaticExpansion((2, 1)), WIDE)
    assert proposal.tokens == [2, 11, 12] and proposal.ranks == [0, 0, 1]
    session.accept([5])
    assert session.propose(StaticExpansion((3,)), Limits(4, 3)).tokens == [5, 8, 9]
    rows[1] = float("nan")
    session.learn([2, 5, 60], rows)
    assert followers.table[5].tolist() == [8, 9, 10] and followers.table[2].tolist() == [5, 6, 7]


def test_shares_are_how_often_each_place_was_right():
    followers = Followers(4, k=2)
    row = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    for _ in range(400):
        followers.learn([0], row)
    assert followers.shares[0] > 0.95 and followers.shares[1] < 0.05
    assert np.isclose(sum(followers.shares), 1.0, atol=0.02)


@pytest.mark.parametrize("policy", ["1,1,1", "2,2", "chain:4", "best-first:8", "auto"])
@pytest.mark.parametrize("draft", ["suffix", "recycle", ["suffix", "recycle", "ngram"]])
def test_the_output_stays_the_targets(draft, policy):
    program = FakeProgram(ROW, VOCAB)
    for _ in range(2):  # the second time with a memory
        out = treespec.generate(program, [PROMPT], draft=draft, policy=policy, max_new_tokens=40)
        assert out.sequences.tolist() == [greedy(ROW, PROMPT, 40)]
    assert out.stats.tokens_per_step > 1 or policy == "auto"


def test_sampled_output_of_a_seed_does_not_depend_on_what_is_remembered():
    program = FakeProgram(ROW, VOCAB)
    given = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5, "policy": "2,1"}
    for draft in ("suffix", "recycle"):
        first, second = (treespec.generate(program, [PROMPT], draft=draft, **given) for _ in range(2))
        assert first.sequences.tolist() == second.sequences.tolist()


def test_what_is_remembered_lives_as_long_as_the_program():
    from treespec_compiler.speculation.drafts import recycle, suffix

    program = FakeProgram(ROW, VOCAB)
    treespec.generate(program, [PROMPT], draft=["suffix", "recycle"], max_new_tokens=9)
    kept = weakref.ref(suffix._OUTPUTS[program]), weakref.ref(recycle._FOLLOWERS[program])
    assert all(ref() is not None for ref in kept)
    del program
    gc.collect()
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("name", ["suffix:", "suffix:0", "suffix:-3", "suffix:many", "recycle:8"])
def test_arguments_that_mean_nothing_are_refused(name):
    if name == "suffix:":
        assert treespec.generate(FakeProgram(ROW, VOCAB), [PROMPT], draft=name, max_new_tokens=3)
        return
    with pytest.raises(InvalidOption, match=r"suffix:TOKENS|\"recycle\""):
        treespec.generate(FakeProgram(ROW, VOCAB), [PROMPT], draft=name, max_new_tokens=3)
