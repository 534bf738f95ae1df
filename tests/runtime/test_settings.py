"""The record of what `generate` and `stream` are asked for: built once, checked before anything runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from fake_program import FakeProgram, greedy, table_row

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption, LossyPair, TreespecError
from treespec_compiler.runtime import starting
from treespec_compiler.runtime.settings import Call, RequestSettings, Settings
from treespec_compiler.speculation.sampling.settings import Sampling

VOCAB = 40
ROW = table_row(VOCAB, seed=1)
PROMPT = [3, 1, 4]


def test_a_request_says_less_than_a_call():
    request, call = ({field.name for field in dataclasses.fields(record)} for record in (RequestSettings, Call))
    assert "temperature" in request and "draft" not in request and request < call
    assert RequestSettings(temperature=0.5, top_k=3).sampling == Sampling(temperature=0.5, top_k=3)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().max_new_tokens = 3  # type: ignore[misc]


def test_numbers_of_other_libraries():
    settings = Settings(max_new_tokens=torch.tensor(5), top_k=np.int64(3), eos_token_id=np.array([1, 2]))
    assert settings.max_new_tokens == 5 and type(settings.max_new_tokens) is int
    assert settings.eos_token_id == {1, 2}
    assert Settings(eos_token_id=torch.tensor([[4]]), stop_ids=iter([1, 2])).stop_ids == {1, 2}


def test_values_that_ask_for_nothing():
    sampling = Settings(temperature=None, top_k=0).sampling
    assert sampling == Sampling() and sampling.plain
    for draft in ([], [None], None):
        assert Settings(draft=draft).drafts == 0
        out = treespec.generate(FakeProgram(ROW, VOCAB), PROMPT, draft=draft, max_new_tokens=5)
        assert out.sequences.tolist() == [greedy(ROW, PROMPT, 5)]
    assert Settings(draft=["ngram", [None, "early-exit"]]).drafts == 2


BAD = {
    "max_new_tokens": {"max_new_tokens": True},
    "temperature": {"temperature": float("nan")},
    "top_k": {"top_k": -1},
    "draft": {"draft": "no such"},
    "drafts": {"draft": ["ngram", 3]},
    "policy": {"policy": "no such:1"},
    "verifier": {"verifier": "no such"},
    "sampler": {"sampler": "no such"},
    "options": {"options": {"no_such": 1}},
    "on_unsupported": {"on_unsupported": "no such"},
    "tokenizer": {"tokenizer": {"a": 0}, "draft_tokenizer": {"b": 0}},
    "logits_processor": {"logits_processor": [3]},
    "stop_ids": {"stop_ids": "text"},
}


@pytest.mark.parametrize("given", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_changes(given, monkeypatch):
    monkeypatch.setattr(starting, "tree_program", lambda *_, **__: pytest.fail("a program was made"))
    model = torch.nn.Linear(2, 2)
    before = torch.get_rng_state()
    with pytest.raises(TreespecError):
        treespec.generate(model, PROMPT, **{"temperature": 1.0, **given})
    assert torch.equal(before, torch.get_rng_state())


def test_lossy_pairs_are_refused_by_the_record():
    with pytest.raises(LossyPair):
        Settings(temperature=1.0, verifier="recursive", sampler="top-k")


def test_what_a_tokenizer_returns_is_taken():
    target = FakeProgram(ROW, VOCAB)
    given = {"input_ids": torch.tensor([[0, *PROMPT]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    assert treespec.generate(target, given, max_new_tokens=4).sequences.tolist() == [greedy(ROW, PROMPT, 4)]
    assert treespec.generate(target, np.array(PROMPT), max_new_tokens=4).sequences.tolist() == [greedy(ROW, PROMPT, 4)]


def test_processors_of_scores_see_the_tokens_of_each_row():
    """Every second token is even: with a draft that does not know it, in trees, greedily and sampled."""
    target, draft = FakeProgram(ROW, VOCAB), FakeProgram(ROW, VOCAB)

    def parity(ids, scores):
        assert ids.dtype == torch.int64 and ids.shape[0] == 1 and scores.dtype == torch.float32
        banned = torch.arange(scores.shape[1]) % 2 == (ids.shape[1] % 2 == 0)
        return scores.masked_fill(banned, -torch.inf)

    def wanted(count):
        tokens = [*PROMPT]
        while count:
            row = parity(torch.tensor([tokens]), ROW(tuple(tokens))[None])[0]
            tokens.append(int(row.argmax()))
            count -= 1
        return tokens

    for policy in ("1,1,1", "2,2", "best-first:6"):
        out = treespec.generate(target, PROMPT, draft=draft, policy=policy, max_new_tokens=20, logits_processor=parity)
        assert out.sequences.tolist() == [wanted(20)]
    out = treespec.generate(
        target, PROMPT, draft=draft, policy="2,2", temperature=1.0, max_new_tokens=30, logits_processor=[parity]
    )
    assert all(token % 2 == (place % 2 == 1) for place, token in enumerate(out.sequences[0].tolist()) if place > 2)


def test_a_processor_must_return_scores():
    with pytest.raises(InvalidOption, match=r"logits_processor: got 'NoneType', expected scores \[1, 40\]"):
        treespec.generate(FakeProgram(ROW, VOCAB), PROMPT, logits_processor=lambda ids, scores: None)
