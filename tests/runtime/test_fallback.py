"""What `generate` does with a model that cannot be converted: the plain loop, where that was asked for."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_program import FakeProgram, table_row
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import ModelFailed, Refusal, Unsupported
from treespec_compiler.runtime import starting
from treespec_compiler.speculation.drafts import model as model_draft

VOCAB = 40


TARGET = table_row(VOCAB, seed=1)


PROMPT = [3, 1, 4, 1, 5]


def target(**kw) -> FakeProgram:
    return FakeProgram(TARGET, VOCAB, **kw)


class Counter(nn.Module):
    """Next token = last + 1 modulo 7; nothing to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(7).roll(1, 1))

    def forward(self, ids):
        return self.weight[ids]


@pytest.fixture
def refusing(monkeypatch):
    def refuse(model, options=None):
        raise Unsupported(Refusal.NO_ATTENTION, "no attention at all", node="weight[ids]")

    monkeypatch.setattr(starting, "tree_program", refuse)
    monkeypatch.setattr(model_draft, "tree_program", refuse)


def test_an_unsupported_target_raises_or_falls_back_with_one_warning(refusing, caplog):
    model = Counter()
    with pytest.raises(Unsupported, match="no attention at all"):
        treespec.generate(model, [1], max_new_tokens=9)
    with caplog.at_level(logging.WARNING, logger="treespec.runtime.generate"):
        out = treespec.generate(model, [1], max_new_tokens=9, on_unsupported="fallback")
    assert len(caplog.records) == 1 and "no attention at all" in caplog.text
    assert out.sequences.tolist() == [[1, 2, 3, 4, 5, 6, 0, 1, 2, 3]]
    assert "no attention at all" in out.stats.fallback
    assert out.stats.tokens == 9 and out.stats.steps == 8 and out.stats.tokens_per_step == 1.0
    options = {"on_unsupported": "fallback"}
    out = treespec.generate(model, [1], max_new_tokens=9, options=options, eos_token_id=4)
    assert out.sequences.tolist() == [[1, 2, 3, 4]] and out.stats.finish_reason == "eos"


class Wrapped(Counter):
    """The same, given back in another way."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, ids):
        return self.wrap(super().forward(ids))


WRAPS = {
    "a dict": lambda logits: {"loss": None, "logits": logits},
    "behind None": lambda logits: (None, logits),
    "an object": lambda logits: type("Output", (), {"logits": logits})(),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_outputs_of_the_plain_loop(refusing, wrap):
    out = treespec.generate(Wrapped(wrap), [1], max_new_tokens=3, on_unsupported="fallback")
    assert out.sequences.tolist() == [[1, 2, 3, 4]]


def test_ids_that_the_plain_loop_cannot_look_up(refusing):
    with pytest.raises(ModelFailed, match="1 tokens"):
        treespec.generate(Counter(), [7], max_new_tokens=3, on_unsupported="fallback")


def test_an_unsupported_draft_always_raises(refusing):
    with pytest.raises(Unsupported):
        treespec.generate(target(), PROMPT, draft=Counter(), on_unsupported="fallback")


def test_the_models_own_end_token_is_the_default(refusing):
    model = Counter()
    model.config = type("Config", (), {"eos_token_id": [3, 6]})()
    out = treespec.generate(model, [1], on_unsupported="fallback")
    assert out.sequences.tolist() == [[1, 2, 3]]
    model.generation_config = type("Config", (), {"eos_token_id": 6})()
    out = treespec.generate(model, [1], on_unsupported="fallback")
    assert out.sequences.tolist() == [[1, 2, 3, 4, 5, 6]]
    out = treespec.generate(model, [1], on_unsupported="fallback", eos_token_id=(), max_new_tokens=20)
    assert out.stats.finish_reason == "length"
