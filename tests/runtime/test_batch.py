"""Several prompts in one call: each gives what it gives alone, under its own settings."""

from __future__ import annotations

import inspect

import pytest
import torch
from llamas import EAGER, llama
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption, InvalidPrompt, TokenOutOfRange
from treespec_compiler.runtime.stats import Count, Stats

VOCAB = 61
PROMPTS = [[5, 17, 3, 9, 42, 7], [1, 2], [9] * 13]
PLAIN = {"options": EAGER, "eos_token_id": (), "max_new_tokens": 9, "policy": "2,1"}


@pytest.fixture(scope="module")
def model():
    return llama(1, hidden=32, vocab=VOCAB)


def alone(model, prompt, **changes) -> list[int]:
    return treespec.generate(model, prompt, **PLAIN | changes).sequences[0].tolist()


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_each_is_what_it_is_alone(model, draft):
    outs = treespec.generate(model, PROMPTS, draft=draft, **PLAIN)
    assert isinstance(outs, treespec.BatchOutput) and len(outs) == 3
    assert [out.sequences[0].tolist() for out in outs] == [alone(model, prompt) for prompt in PROMPTS]
    assert outs[1].stats.tokens == 9 and outs[1].stats.finish_reason == "length"
    assert outs.stats.tokens == 27 and outs.stats.prompt_tokens == 21 and outs.stats.step_seconds > 0
    assert outs.sequences.shape == (3, 22) and outs.sequences[1, 11:].tolist() == [0] * 11


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_off(model, side):
    ids, mask = torch.full((3, 13), 60), torch.zeros(3, 13, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        at = slice(13 - len(prompt), 13) if side == "left" else slice(0, len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    outs = treespec.generate(model, ids, attention_mask=mask, **PLAIN)
    assert [out.sequences[0].tolist() for out in outs] == [alone(model, prompt) for prompt in PROMPTS]
    outs = treespec.generate(model, {"input_ids": ids, "attention_mask": mask}, **PLAIN)
    assert outs[2].sequences[0].tolist() == alone(model, PROMPTS[2])
    one = treespec.generate(model, ids[1:2], attention_mask=mask[1:2], **PLAIN)
    assert not isinstance(one, treespec.BatchOutput) and one.sequences[0].tolist() == alone(model, PROMPTS[1])


def test_settings_may_be_one_each(model):
    def last(ids, scores):
        return scores.masked_fill(torch.arange(VOCAB) != 7, -torch.inf)

    end = alone(model, PROMPTS[0])[8]
    given = {
        "max_new_tokens": [3, 5, 7],
        "temperature": [0.0, 1.0, 0.7],
        "seed": (1, 2, 3),
        "eos_token_id": [[end], None, ()],
        "logits_processor": [None, [], [last]],
    }
    outs = treespec.generate(model, [torch.tensor(prompt) for prompt in PROMPTS], **PLAIN | given)
    for i, (out, prompt) in enumerate(zip(outs, PROMPTS, strict=True)):
        own = {name: values[i] for name, values in given.items()}
        assert out.sequences[0].tolist() == alone(model, prompt, **own)
    assert outs[0].stats.finish_reason == "eos" and outs[2].sequences[0, 13:].tolist() == [7] * 7


def test_several_samples_of_each_prompt(model):
    given = PLAIN | {"temperature": 1.0, "seed": 5, "max_new_tokens": 6}
    outs = treespec.generate(model, PROMPTS[:2], num_return_sequences=3, **given)
    expected = [alone(model, p, **given | {"seed": 5 + i}) for p in PROMPTS[:2] for i in range(3)]
    assert [out.sequences[0].tolist() for out in outs] == expected
    one = treespec.generate(model, PROMPTS[0], num_return_sequences=2, **given)
    assert [out.sequences[0].tolist() for out in one] == expected[:2]
    assert one[1].stats.cached_tokens == 5


def test_steps_say_whose_they_are(model):
    tokens: list[list[int]] = [[], [], []]
    steps = treespec.stream(model, PROMPTS, **PLAIN | {"max_new_tokens": [2, 4, 6]})
    for step in steps:
        tokens[step.request] += step.tokens
    assert [[*p, *t] for p, t in zip(PROMPTS, tokens)] == [
        alone(model, p, max_new_tokens=n) for p, n in zip(PROMPTS, (2, 4, 6))
    ]
    assert len(steps.tokens) == 12 and steps.stats.tokens == 12 and steps.sequences.shape == (3, 19)
    with treespec.stream(model, PROMPTS, **PLAIN) as steps:
        next(steps)
    assert list(steps) == []


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"max_new_tokens": [1, 2]}, InvalidOption, "a list of 3, one for each prompt"),
        ({"eos_token_id": [[1], [2]]}, InvalidOption, "a list of 3, one for each prompt"),
        ({"temperature": [0.0, -1.0, 0.0]}, InvalidOption, "temperature"),
        ({"num_return_sequences": 2}, InvalidOption, "greedy decoding gives one sequence"),
        ({"num_return_sequences": 0}, InvalidOption, "a positive integer"),
        ({"input_ids": [[1], []]}, InvalidPrompt, "no ids"),
        ({"input_ids": [[1], [VOCAB]]}, TokenOutOfRange, "out of range"),
        ({"attention_mask": [[1, 1]]}, InvalidPrompt, "attention_mask"),
    ],
)
def test_refused(model, changes, kind, text):
    with pytest.raises(kind, match=text):
        treespec.generate(model, changes.pop("input_ids", PROMPTS), **PLAIN | changes)


def test_the_signature_names_them():
    for function in (treespec.generate, treespec.stream):
        assert {"attention_mask", "num_return_sequences"} < set(inspect.signature(function).parameters)
    with pytest.raises(TypeError, match=r"generate: got an unexpected keyword argument 'atention_mask'"):
        treespec.generate(None, [[1], [2]], atention_mask=None)


def test_an_error_of_one_ends_the_call(model):
    def broken(ids, scores):
        if ids.shape[1] == 4:
            raise ZeroDivisionError("mine")
        return scores

    with pytest.raises(ZeroDivisionError, match="mine"):
        treespec.generate(model, PROMPTS, **PLAIN | {"logits_processor": [[], [broken], []]})


@pytest.mark.rare
def test_the_plain_loop_takes_several_one_by_one(caplog):
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 9)

        def forward(self, ids):
            return self.head(self.mix(self.table(ids))[0])

    model = Foreign().eval()
    given = {"max_new_tokens": 4, "on_unsupported": "fallback"}
    outs = treespec.generate(model, [[1, 2], [3]], **given)
    for out, prompt in zip(outs, ([1, 2], [3]), strict=True):
        assert out.sequences.tolist() == treespec.generate(model, prompt, **given).sequences.tolist()
    assert outs.stats.fallback and outs.stats.tokens == 8
    with pytest.raises(treespec.Unsupported):
        treespec.generate(model, [[1, 2], [3]], max_new_tokens=4)


def test_statistics_add_up():
    first = Stats(tokens=3, steps=2, accepted_by_depth=[Count(3, 2, 1)])
    second = Stats(tokens=4, steps=1, accepted_by_depth=[Count(1, 1, 1), Count(1, 0, 0)], finish_reason="eos")
    total = Stats.total([first, second])
    assert (total.tokens, total.steps, total.finish_reason) == (7, 3, None)
    assert total.accepted_by_depth == [Count(4, 3, 2), Count(1, 0, 0)] and first.accepted_by_depth == [Count(3, 2, 1)]
