"""A model's `generation_config`: what it says of scores is honoured, the rest is named, nothing is passed over."""

from __future__ import annotations

import logging

import pytest
import torch
from llamas import EAGER, PROMPT, llama
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.runtime import model_defaults

COUNT = 16


@pytest.fixture(scope="module")
def model():
    return llama(0)


@pytest.fixture(scope="module")
def plain(model):
    return reference(model)


@pytest.fixture
def config(model, monkeypatch):
    """A configuration that a test may change."""
    monkeypatch.setattr(model, "generation_config", type(model.generation_config)())
    return model.generation_config


def reference(model) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT)
    return out[0, len(PROMPT) :].tolist()


def ours(model, **more) -> list[int]:
    arguments = {"draft": "ngram", "max_new_tokens": COUNT, "options": EAGER} | more
    return treespec.generate(model, PROMPT, **arguments).sequences[0, len(PROMPT) :].tolist()


def asked(plain: list[int]) -> dict[str, dict]:
    """Configurations, of which each gives other tokens than the plain ones."""
    return {
        "eos": {"eos_token_id": [plain[6], plain[9]]},
        "repetition penalty": {"repetition_penalty": 1.8},
        "suppressed": {"suppress_tokens": plain[:2]},
        "suppressed first": {"begin_suppress_tokens": plain[:1]},
        "shortest": {"eos_token_id": plain[3], "min_new_tokens": 12},
        "shortest in all": {"eos_token_id": plain[3], "min_length": 14},
        "n-grams": {"no_repeat_ngram_size": 2, "suppress_tokens": plain[:3]},
        "bad words": {"bad_words_ids": [plain[:1], plain[2:4]]},
        "bias": {"sequence_bias": [[plain[:1], -50.0], [[7, 7], 9.0]]},
        "forced end": {"forced_eos_token_id": 3, "eos_token_id": 3},
        "forced end and penalty": {"forced_eos_token_id": 3, "eos_token_id": 3, "repetition_penalty": 1.5},
        "prompt's tokens": {"encoder_repetition_penalty": 6.0},
        "prompt's n-grams": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[5], 30.0], [[9], 20.0]]},
        "decay": {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 9},
    }


@pytest.mark.parametrize("name", asked([0] * COUNT))
def test_what_it_says_of_scores_is_honoured(model, plain, config, name, caplog):
    for field, value in asked(plain)[name].items():
        setattr(config, field, value)
    wanted = reference(model)
    assert wanted != plain
    assert ours(model) == wanted
    assert ours(model, draft=None) == wanted
    assert ours(model, draft=model, policy="2,2") == wanted
    assert not caplog.records


def test_what_the_call_says_goes_before_it(model, plain, config):
    config.repetition_penalty = 1.8
    assert ours(model, repetition_penalty=1.0) == plain
    config.eos_token_id = plain[3]
    assert ours(model, repetition_penalty=1.0, eos_token_id=()) == plain


def test_a_shortest_length_counts_the_ends_of_the_call(model, plain, config):
    config.min_new_tokens = 12
    assert len(ours(model, eos_token_id=plain[3])) >= 12


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"stop_strings": ["x"]}, "stop_strings=['x']"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "do_sample=True, temperature=0.6, top_p=0.9"),
    ],
)
def test_what_is_not_taken_is_named_once(model, plain, config, fields, text, caplog):
    for field, value in fields.items():
        setattr(config, field, value)
    model_defaults._SAID.clear()
    for _ in range(2):
        assert ours(model) == plain
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"not taken from the model's generation_config: {text};" in record.getMessage()


def test_sampling_that_the_call_says_itself_is_not_named(model, config, caplog):
    config.do_sample, config.temperature, config.top_p = True, 0.6, 0.9
    ours(model, temperature=1.0, top_p=0.5)
    assert not caplog.records


def test_a_configuration_that_is_not_of_transformers(monkeypatch, caplog):
    class Model(nn.Module):
        def forward(self, ids):
            return nn.functional.one_hot((ids + 1) % 7, 7).float()

    model = Model()
    fields = {"eos_token_id": 6, "suppress_tokens": [4], "repetition_penalty": 1.0}
    model.generation_config = type("Config", (), fields)()
    out = treespec.generate(model, [1], on_unsupported="fallback")
    assert out.sequences.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert "generation_config: suppress_tokens=[4];" in caplog.text
