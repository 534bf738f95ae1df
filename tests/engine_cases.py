"""An engine over a tiny pair, requests of every kind to it, and what each gives alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from llamas import EAGER, llama

import treespec_compiler as treespec
from treespec_compiler.runtime.engine import Engine
from treespec_compiler.runtime.request import Status
from treespec_compiler.speculation.drafts.ngram import NGramDraft

VOCAB = 61
SYSTEM = [7, 3, 11, 2, 19, 23, 5, 5, 8, 1]
PROMPTS = [[5, 17, 3, 9, 42, 7], [1, 2], [*SYSTEM, 30], [*SYSTEM, 31, 32], [9] * 13, [*SYSTEM, 30, 4, 4]]
POISON, BREAKS = 59, 60
"""Last ids of prompts: of one whose logits become NaN, and of one whose draft raises."""


class Breaks(NGramDraft):
    """Raises at the second tree of a prompt that ends with `BREAKS`."""

    def open(self, request):
        session = super().open(request)
        if request.prompt[-1] == BREAKS:
            propose, asked = session.propose, []

            def broken(policy, limits):
                asked.append(1)
                if len(asked) == 2:
                    raise ZeroDivisionError("the draft's own")
                return propose(policy, limits)

            session.propose = broken
        return session


def made_pair() -> SimpleNamespace:
    """A target, and a draft that guesses it right about every second time."""
    model = llama(1, hidden=32, vocab=VOCAB)
    near = copy.deepcopy(model)
    with torch.no_grad():
        for weight in near.parameters():
            weight += 0.12 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(
        model=model,
        near=near,
        target=treespec.tree_program(model, options=EAGER),
        draft=treespec.tree_program(near, options=EAGER),
        alone={},
    )


def engine_of(pair, **changes) -> Engine:
    given = {"draft": [pair.draft, Breaks()], "max_requests": 4, "page_size": 4, "policy": "2,1,1", "options": EAGER}
    return Engine(pair.target, **given | changes)


def asked(prompt, index: int) -> dict:
    """Settings of request number `index`: greedy, sampled, penalised."""
    kinds = [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2}, {"repetition_penalty": 1.3}, {}]
    given = {"max_new_tokens": 4 + 5 * (index % 3), "eos_token_id": (), "seed": index, **kinds[index % 5]}
    if prompt[-1] == POISON:
        given["logits_processor"] = [poisoned]
    return given


def poisoned(ids, scores):
    return scores * torch.nan if ids.shape[1] > 5 else scores


def alone(pair, prompt, index: int):
    """What the request gives in an engine of its own: its tokens, or the type of its error."""
    key = (tuple(prompt), index)
    if key not in pair.alone:
        with engine_of(pair) as engine:
            request = engine.add(prompt, **asked(prompt, index))
            engine.run()
            pair.alone[key] = request.output.tokens, type(request.error)
    return pair.alone[key]


def check(pair, request, index: int) -> None:
    tokens, error = alone(pair, request.prompt, index)
    assert type(request.error) is error and request.output.tokens == tokens, request
    assert request.status is (Status.FINISHED if error is type(None) else Status.FAILED)


def pages_of(engine: Engine):
    return engine._slots.cache(engine.program).page_counts
