"""The suffix automaton against brute force, and prompt lookup as a draft."""

from __future__ import annotations

from collections import Counter

import pytest
from fake_program import FakeProgram, greedy, table_row
from hypothesis import given
from hypothesis import strategies as st

import treespec_compiler as treespec
from treespec_compiler.speculation.drafts.automaton import SuffixAutomaton
from treespec_compiler.speculation.drafts.ngram import NGramDraft
from treespec_compiler.speculation.drafts.protocol import Draft, DraftRequest
from treespec_compiler.speculation.policies.best_first import BestFirst
from treespec_compiler.speculation.policies.protocol import Limits
from treespec_compiler.speculation.policies.static import StaticExpansion

WIDE = Limits(100, 1000)


def occurrences(text: list[int], part: list[int]) -> list[int]:
    n = len(part)
    return [i for i in range(len(text) - n + 1) if text[i : i + n] == part]


@given(st.lists(st.integers(0, 2), max_size=40))
def test_match_and_continuations_are_those_of_brute_force(text):
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    state, length = automaton.match()
    longest = max((n for n in range(len(text)) if len(occurrences(text, text[len(text) - n :])) > 1), default=0)
    assert length == longest
    if longest:
        part = text[len(text) - longest :]
        followed = Counter(text[i + longest] for i in occurrences(text, part) if i + longest < len(text))
        found = automaton.continuations(state, 10)
        assert {token: times for token, _, times in found} == followed
        latest = {text[i + longest]: i for i in occurrences(text, part) if i + longest < len(text)}
        keys = [(times, latest[token]) for token, _, times in found]
        assert keys == sorted(keys, reverse=True)


def session(text, **request):
    opened = NGramDraft().open(DraftRequest(50, 200, 64, **request))
    opened.accept(text)
    return opened


def test_what_followed_the_longest_match_is_proposed():
    proposal = session([1, 2, 3, 4, 5, 9, 9, 2, 3, 4]).propose(StaticExpansion((1, 1, 1)), WIDE)
    assert proposal.tokens == [4, 5, 9, 9] and proposal.parents == [-1, 0, 1, 2]
    assert proposal.q is None and proposal.proposer == "ngram"


def test_branches_are_ordered_by_how_often_and_how_lately():
    text = [1, 2, 7, 1, 2, 8, 1, 2, 8, 1, 2, 9, 1, 2]
    proposal = session(text, needs_q=True).propose(StaticExpansion((3, 1)), WIDE)
    assert proposal.tokens[:4] == [2, 8, 9, 7]
    assert proposal.ranks[:4] == [0, 0, 1, 2]
    assert proposal.q == pytest.approx([1.0, 0.5, 0.25, 0.25, 1.0, 1.0, 1.0])
    assert len(session(text).propose(StaticExpansion((3, 3)), Limits(9, 3))) == 3


def test_a_period_is_continued_past_the_texts_end():
    proposal = session([1, 2, 3] * 4).propose(StaticExpansion((1,) * 20), WIDE)
    assert proposal.tokens == [3, *([1, 2, 3] * 7)[:20]]


@pytest.mark.parametrize("text", [[5], [5, 6, 7], [5, 6, 5]])
def test_nothing_is_proposed_without_a_match_of_two(text):
    assert len(session(text).propose(StaticExpansion((2, 2)), WIDE)) == 1


def test_it_learns_from_what_is_accepted():
    s = session([1, 2, 3])
    assert len(s.propose(StaticExpansion((1, 1)), WIDE)) == 1
    s.accept([4, 1, 2])
    assert s.propose(StaticExpansion((1, 1)), WIDE).tokens == [2, 3, 4]


def repetitive(period: int):
    """A model that repeats itself after some time."""
    row = table_row(30, seed=5)

    def periodic(tokens):
        return row((tokens[-1] % period,))

    return periodic


@pytest.mark.parametrize("policy", ["1,1,3", "chain:5", "best-first:8", "equal-growth:2,3"])
def test_generate_with_ngrams_is_exact_and_faster(policy):
    row = repetitive(9)
    out = treespec.generate(FakeProgram(row, 30), [1, 2, 3], draft="ngram", max_new_tokens=60, policy=policy)
    assert out.sequences.tolist() == [greedy(row, [1, 2, 3], 60)]
    assert out.stats.tokens_per_step > 2
    assert out.stats.draft_prefill_seconds > 0


def test_merge_of_a_model_and_ngrams_is_exact_and_better_than_each():
    row = repetitive(25)
    steps = {}
    for name in ("model", "ngram", "both"):
        model = FakeProgram(table_row(30, 2, agree_with=row, agreement=0.5), 30)
        draft = {"model": model, "ngram": "ngram", "both": [model, "ngram"]}[name]
        out = treespec.generate(FakeProgram(row, 30), [1, 2, 3], draft=draft, max_new_tokens=80, policy="2,1,1")
        assert out.sequences.tolist() == [greedy(row, [1, 2, 3], 80)]
        steps[name] = out.stats.steps
    assert steps["both"] <= min(steps["model"], steps["ngram"])


def test_it_is_a_draft():
    draft = NGramDraft()
    assert isinstance(draft, Draft)
    # A policy that chooses nodes gets the widths it would give.
    proposal = draft.open(DraftRequest(50, 200, 64, True))
    proposal.accept([1, 2, 7, 1, 2, 8, 1, 2])
    assert len(proposal.propose(BestFirst(8, 3, 2), WIDE)) > 2
