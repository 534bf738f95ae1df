"""Where trees meet the edges of a request: ends inside a tree, full caches, short contexts, useless numbers."""

from __future__ import annotations

import math

import pytest
import torch
from fake_program import FakeProgram, greedy, table_row

import treespec_compiler as treespec
from treespec_compiler.speculation.cost.acceptance import forget

VOCAB = 40
TARGET = table_row(VOCAB, seed=1)
PROMPT = [3, 1, 4, 1, 5]
POLICIES = ["auto", "chain:4", "2,2,1", "best-first:7", "equal-growth:2,3"]


@pytest.fixture(autouse=True)
def _fresh():
    forget()


def target(**kw):
    return FakeProgram(TARGET, VOCAB, **kw)


def partial(**kw):
    return FakeProgram(table_row(VOCAB, 2, agree_with=TARGET, agreement=0.8), VOCAB, **kw)


DRAFTS = {"model": partial, "ngram": lambda: "ngram", "both": lambda: [partial(), "ngram"]}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("policy", POLICIES)
class TestEdges:
    def test_an_end_inside_a_tree(self, policy, draft):
        new = greedy(TARGET, PROMPT, 30)[5:]
        for at in (1, 4, 9, 17):
            out = treespec.generate(
                target(), PROMPT, draft=DRAFTS[draft](), max_new_tokens=30, policy=policy, eos_token_id=new[at]
            )
            assert out.sequences[0, 5:].tolist() == new[: new.index(new[at]) + 1]
            assert out.stats.finish_reason == "eos"

    def test_the_length_ends_inside_a_tree(self, policy, draft):
        for count in range(1, 9):
            program = target()
            out = treespec.generate(program, PROMPT, draft=DRAFTS[draft](), max_new_tokens=count, policy=policy)
            assert out.sequences.tolist() == [greedy(TARGET, PROMPT, count)]
            assert all(cache.length() == 0 for cache in program.caches)

    def test_the_context_ends_inside_a_tree(self, policy, draft):
        for limit in (6, 7, 11, 20):
            out = treespec.generate(
                target(max_context=limit), PROMPT, draft=DRAFTS[draft](), max_new_tokens=40, policy=policy
            )
            assert out.sequences.tolist() == [greedy(TARGET, PROMPT, limit - 5)]
            assert out.stats.finish_reason == "context"

    def test_a_prompt_of_one_token(self, policy, draft):
        out = treespec.generate(target(), [7], draft=DRAFTS[draft](), max_new_tokens=20, policy=policy)
        assert out.sequences.tolist() == [greedy(TARGET, [7], 20)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("limit", [1, 5, 6, 13])
def test_a_draft_of_shorter_context_drops_out(policy, limit):
    drafts = [partial(max_context=limit), "ngram"]
    out = treespec.generate(target(), PROMPT, draft=drafts, max_new_tokens=40, policy=policy)
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 40)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("often", [1, 3])
def test_useless_numbers_of_a_draft_are_no_proposal(policy, value, often):
    row = table_row(VOCAB, 2, agree_with=TARGET, agreement=0.9)

    def sick(tokens):
        logits = row(tokens).clone()
        if len(tokens) % often == 0:
            logits[torch.arange(VOCAB) % 2 == 0] = value
        return logits

    out = treespec.generate(target(), PROMPT, draft=FakeProgram(sick, VOCAB), max_new_tokens=40, policy=policy)
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 40)]
    assert out.stats.unusable_draft_rows > 0
    if often == 1:
        assert out.stats.nodes == out.stats.steps
