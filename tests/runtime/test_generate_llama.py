"""`generate` with real tree programs of tiny Hugging Face models, against the eager model's own greedy loop."""

from __future__ import annotations

import functools

import pytest
import torch
from fake_program import greedy, module_row
from llamas import EAGER, PROMPT, llama

import treespec_compiler as treespec

transformers = pytest.importorskip("transformers")
pytest.importorskip("treespec_compiler.program.tree_program")


@pytest.fixture(scope="module")
def target():
    return llama(0)


@pytest.fixture(scope="module")
def truth(target):
    return greedy(module_row(target), PROMPT, 48)


@functools.cache
def noisy_copy(noise: float):
    """A draft that agrees now and then: the target with disturbed weights."""
    draft = llama(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    return draft


def test_the_reference_is_what_hugging_face_generates(target, truth):
    with torch.no_grad():
        out = target.generate(torch.tensor([PROMPT]), max_new_tokens=48, do_sample=False)
    assert out[0].tolist() == truth


@pytest.mark.parametrize("expansion", [(1,), (1, 1, 3), (3, 2, 1), (4, 4, 4)])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 3.0])
@pytest.mark.family
def test_same_ids_as_eager_greedy(target, truth, noise, expansion):
    draft = noisy_copy(noise)
    ids = torch.tensor([PROMPT])
    out = treespec.generate(target, ids, draft=draft, max_new_tokens=48, policy=expansion, options=EAGER)
    assert out.sequences.tolist() == [truth]
    if noise == 0.0:
        assert out.stats.tokens_per_step > 0.9 * min(len(expansion) + 1, 47)


@pytest.mark.parametrize("vocab", [100, 128, 160])
@pytest.mark.family
def test_vocabularies_of_different_sizes(target, truth, vocab):
    out = treespec.generate(target, PROMPT, draft=llama(2, vocab=vocab), max_new_tokens=48, options=EAGER)
    assert out.sequences.tolist() == [truth]


@pytest.mark.rare
def test_two_drafts_and_no_draft(target, truth):
    drafts = [noisy_copy(0.05), llama(3, hidden=32, layers=1)]
    for draft in (drafts, None, target):
        out = treespec.generate(target, PROMPT, draft=draft, max_new_tokens=48, policy=(2, 1), options=EAGER)
        assert out.sequences.tolist() == [truth]


def test_compile_seconds_are_of_this_call_only():
    model = llama(4, hidden=32, layers=1)
    assert treespec.generate(model, PROMPT, max_new_tokens=3, options=EAGER).stats.compile_seconds > 0.01
    assert treespec.generate(model, PROMPT, max_new_tokens=3, options=EAGER).stats.compile_seconds == 0.0


def test_a_short_context_of_target_and_draft(target, truth):
    short = llama(0, context=24)
    short.load_state_dict(target.state_dict())
    out = treespec.generate(target, PROMPT, draft=short, max_new_tokens=48, options=EAGER)
    assert out.sequences.tolist() == [truth]


def test_a_model_compiled_with_the_backend(target, truth):
    backend = pytest.importorskip("treespec_compiler.backend").treespec_backend
    compiled = torch.compile(target, backend=backend)
    out = treespec.generate(compiled, PROMPT, draft=noisy_copy(0.05), max_new_tokens=20, options=EAGER)
    assert out.sequences.tolist() == [truth[:26]]


def test_weights_changed_between_two_calls_are_noticed(target):
    model = llama(0)
    first = treespec.generate(model, PROMPT, max_new_tokens=20, options=EAGER)
    assert first.sequences.tolist() == [greedy(module_row(model), PROMPT, 20)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.3).add_(0.05 * torch.randn_like(parameter))  # no version is bumped
    second = treespec.generate(model, PROMPT, draft=target, max_new_tokens=20, options=EAGER)
    assert second.sequences.tolist() == [greedy(module_row(model), PROMPT, 20)]
