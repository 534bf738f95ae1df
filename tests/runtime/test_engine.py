"""Many requests at once: each gives what it gives alone, whoever comes, goes, fails or waits beside it."""

from __future__ import annotations

import pytest
import torch
from engine_cases import (
    BREAKS,
    POISON,
    PROMPTS,
    VOCAB,
    asked,
    check,
    engine_of,
    made_pair,
    pages_of,
)
from llamas import EAGER

import treespec_compiler as treespec
from treespec_compiler.errors import (
    EngineClosed,
    InvalidLogits,
    InvalidOption,
    InvalidPrompt,
    RequestTooLarge,
    TokenOutOfRange,
)
from treespec_compiler.runtime.engine import Engine
from treespec_compiler.runtime.request import Status
from treespec_compiler.runtime.scheduler import PATIENCE, common_length


@pytest.fixture(scope="module")
def pair():
    return made_pair()


def test_greedy_output_is_the_single_request_output(pair):
    for draft in (None, pair.draft, "ngram", [pair.draft, "ngram"], "early-exit:1"):
        with engine_of(pair, draft=draft, prompt_tokens=5) as engine:
            requests = [engine.add(prompt, max_new_tokens=12, eos_token_id=()) for prompt in PROMPTS]
            engine.run()
            for request, prompt in zip(requests, PROMPTS, strict=True):
                out = treespec.generate(pair.target, prompt, max_new_tokens=12, eos_token_id=())
                assert [*prompt, *request.output.tokens] == out.sequences[0].tolist()
                assert request.status is Status.FINISHED and request.output.finish_reason == "length"
            assert engine.stats.finished == 6 and engine.stats.tokens == 72 and pages_of(engine).held == 0
            assert engine.stats.accepted > 20 or draft in (None, "ngram")


def test_no_neighbour_changes_a_request(pair):
    with engine_of(pair) as engine:
        requests = [engine.add(prompt, **asked(prompt, i)) for i, prompt in enumerate(PROMPTS)]
        for _ in range(3):
            engine.step()
        requests += [engine.add(prompt, **asked(prompt, 6 + i)) for i, prompt in enumerate(PROMPTS)]
        engine.run()
        for i, request in enumerate(requests):
            check(pair, request, i)


def test_prompts_run_in_pieces_beside_trees_and_drafts_level_by_level(pair, monkeypatch):
    calls: dict[str, list[tuple[int, int]]] = {"target": [], "draft": []}

    def spy(program, name):
        mixed, extend = program.mixed, program.extend

        def seen_mixed(trees, prompts, cache):
            calls[name].append((len(trees), sum(len(ids) for _, ids in prompts)))
            return mixed(trees, prompts, cache)

        def seen_extend(forest, cache, *rest):
            calls[name].append((len(forest.items), 0))
            return extend(forest, cache, *rest)

        monkeypatch.setattr(program, "mixed", seen_mixed)
        monkeypatch.setattr(program, "extend", seen_extend)

    spy(pair.target, "target"), spy(pair.draft, "draft")
    with engine_of(pair, draft=pair.draft, prompt_tokens=4) as engine:
        first = [engine.add(prompt, max_new_tokens=30, eos_token_id=()) for prompt in PROMPTS[:2]]
        while not all(len(request.output.tokens) > 3 for request in first):
            engine.step()
        calls["target"].clear(), calls["draft"].clear()
        late = engine.add([9] * 13, max_new_tokens=2, eos_token_id=())
        before = engine.stats.steps
        while not late.output.tokens:
            engine.step()
        assert engine.stats.steps - before == 4
        # one call of the target a step, for both trees and a piece of the prompt
        assert calls["target"] == [(2, 4), (2, 4), (2, 4), (2, 1)]
        # and three of the draft, for both requests
        assert calls["draft"] == [(2, 0)] * 12


def test_a_request_that_can_never_run_is_refused_at_add(pair):
    with engine_of(pair, max_tokens=20) as engine:
        with pytest.raises(RequestTooLarge, match="a prompt of 13 tokens and 8 new ones, expected at most 20 together"):
            engine.add([9] * 13, max_new_tokens=8)
        engine.add([9] * 13, max_new_tokens=7, eos_token_id=())
        with pytest.raises(InvalidPrompt):
            engine.add([])
        with pytest.raises(TokenOutOfRange):
            engine.add([VOCAB])
        for wrong in ({"temperature": -1}, {"priority": "high"}, {"logprobs": -1}, {"stop": "text"}):
            with pytest.raises(InvalidOption):
                engine.add([1], **wrong)
        assert engine.stats.requests == 1
        engine.run()
    with pytest.raises(EngineClosed):
        engine.add([1])
    for wrong in ({"max_requests": 0}, {"max_tokens": -1}, {"page_size": 1.5}, {"prompt_tokens": 0}):
        with pytest.raises(InvalidOption):
            engine_of(pair, **wrong)


def test_out_of_pages_the_youngest_waits_and_is_computed_again(pair):
    with engine_of(pair, max_tokens=27, max_requests=6, page_size=2, prompt_tokens=7) as engine:
        requests = [engine.add(prompt, **asked(prompt, i)) for i, prompt in enumerate(PROMPTS * 2)]
        engine.run()
        assert engine.stats.preemptions > 3
        for i, request in enumerate(requests):
            check(pair, request, i)
        assert pages_of(engine).held == 0


def test_a_single_request_always_fits(pair):
    for size in (1, 4, 64):
        with engine_of(pair, max_tokens=30, page_size=size) as engine:
            request = engine.add([9] * 13, max_new_tokens=17, eos_token_id=())
            engine.run()
            assert len(request.output.tokens) == 17 and engine.stats.preemptions == 0


def test_what_requests_begin_with_alike_is_computed_and_stored_once(pair):
    with engine_of(pair, max_requests=8) as engine:
        samples = engine.add_samples(PROMPTS[3], 4, seed=5, temperature=1.0, max_new_tokens=9, eos_token_id=())
        other = engine.add(PROMPTS[2], max_new_tokens=9, eos_token_id=())
        shared = 0
        while not all(r.done for r in (*samples, other)):
            engine.step()
            shared = max(shared, pages_of(engine).shared)
        assert shared == 3  # twelve tokens of the prompt
        assert [r.stats.cached_tokens for r in samples] == [0, 11, 11, 11] and other.stats.cached_tokens == 10
        assert engine.stats.cached_tokens == 43
        assert len({tuple(r.output.tokens) for r in samples}) > 1
        again = engine.add(PROMPTS[3], seed=7, temperature=1.0, max_new_tokens=9, eos_token_id=())
        assert again.result().tokens == samples[2].output.tokens
        assert again.stats.cached_tokens == 8  # whole pages, which nobody held any more
        engine.forget()
        assert pages_of(engine).idle == 0
        anew = engine.add(PROMPTS[3], seed=7, temperature=1.0, max_new_tokens=9, eos_token_id=())
        assert anew.result().tokens == again.output.tokens and anew.stats.cached_tokens == 0


def test_higher_priorities_come_first(pair):
    with engine_of(pair, max_requests=1, draft=None) as engine:
        low, high = (engine.add([p + 1], max_new_tokens=3, priority=p, eos_token_id=()) for p in (0, 3))
        while not high.done:
            engine.step()
            assert low.status is Status.WAITING
        engine.run()
        assert low.status is Status.FINISHED


def test_nobody_starves(pair):
    """However many of higher priority come, a request waits for a bounded number of steps only."""
    with engine_of(pair, max_requests=1, draft=None, max_tokens=64) as engine:
        low = engine.add([1], max_new_tokens=3, eos_token_id=())
        steps = 0
        while not low.done:
            while engine.stats.waiting < 3:
                engine.add([2], max_new_tokens=4, priority=2, eos_token_id=())
            engine.step()
            steps += 1
            assert steps <= 2 * PATIENCE + 4 + 3
        assert low.status is Status.FINISHED and steps > PATIENCE


def test_a_request_is_cancelled_at_any_moment(pair):
    with engine_of(pair, draft=pair.draft, prompt_tokens=4, max_requests=2) as engine:
        at_once, waiting, in_prompt, in_tree, stays = (engine.add([9, i, *[8] * 9], **asked([1], 0)) for i in range(5))
        at_once.cancel()
        assert at_once.status is Status.CANCELLED and at_once.output.tokens == []
        engine.step()
        in_prompt.cancel()
        waiting.cancel(), waiting.cancel()
        while not in_tree.output.tokens:
            engine.step()
        engine.step()
        in_tree.cancel()
        assert in_tree.status is Status.CANCELLED and 0 < len(in_tree.output.tokens) < 4 and list(in_tree) != []
        engine.run()
        check(pair, stays, 0)
        stays.cancel()
        assert stays.status is Status.FINISHED and engine.stats.cancelled == 4 and pages_of(engine).held == 0


def test_a_request_is_cancelled_within_a_step(pair):
    with engine_of(pair, draft=None) as engine:
        victim = engine.add(PROMPTS[0], max_new_tokens=20, eos_token_id=())

        def cancels(ids, scores):
            if ids.shape[1] == 4:
                victim.cancel()  # the engine is in the middle of a step
            return scores

        other = engine.add([1, 2], max_new_tokens=5, eos_token_id=(), logits_processor=[cancels])
        engine.run()
        assert victim.status is Status.CANCELLED and 0 < len(victim.output.tokens) < 20
        assert len(other.output.tokens) == 5


def test_a_request_that_fails_ends_alone(pair):
    prompts = [[1, 2, POISON], PROMPTS[0], [3, 4, BREAKS], PROMPTS[1]]
    with engine_of(pair) as engine:
        requests = [engine.add(prompt, **asked(prompt, i)) for i, prompt in enumerate(prompts)]
        engine.run()
        for i, request in enumerate(requests):
            check(pair, request, i)
        assert isinstance(requests[0].error, InvalidLogits) and isinstance(requests[2].error, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError, match="the draft's own"):
            list(requests[2])
        with pytest.raises(InvalidLogits):
            requests[0].result()
        assert engine.stats.failed == 2 and engine.stats.finished == 2 and pages_of(engine).held == 0


def test_the_context_of_the_model_ends_a_request(pair):
    program = treespec.tree_program(pair.model, options={**EAGER, "max_context": 24})
    with engine_of(pair, draft=None) as engine, Engine(program, max_requests=2, options=EAGER) as short:
        ended = short.add(PROMPTS[0], max_new_tokens=40, eos_token_id=())
        whole = engine.add(PROMPTS[0], max_new_tokens=40, eos_token_id=())
        assert ended.result().tokens == whole.result().tokens[:18] and ended.output.finish_reason == "context"


def test_likelihoods_are_the_models(pair):
    with engine_of(pair) as engine:
        request = engine.add(PROMPTS[0], max_new_tokens=9, eos_token_id=(), logprobs=3, temperature=1.0, seed=1)
        found = [one for step in request for one in step.likelihoods]
    assert [one.token for one in found] == request.output.tokens and found == request.output.likelihoods
    ids = torch.tensor([[*PROMPTS[0], *request.output.tokens]])
    with torch.no_grad():
        rows = pair.model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    for row, one in zip(rows, found, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        values, best = row.topk(3)
        assert [token for token, _ in one.top] == best.tolist()
        assert [x for _, x in one.top] == pytest.approx(values.tolist(), abs=1e-4)


class Letters:
    """A tokenizer whose token i is the letter number i."""

    def decode(self, ids, **_):
        return "".join(chr(65 + i) for i in ids)


def test_stop_strings_end_the_text_and_ids_stay(pair):
    with engine_of(pair, tokenizer=Letters()) as engine:
        plain = engine.add(PROMPTS[0], max_new_tokens=20, eos_token_id=())
        text = plain.result().text
        assert text == Letters().decode(plain.output.tokens)
        stop = text[7:10]
        request = engine.add(PROMPTS[0], max_new_tokens=20, eos_token_id=(), stop=["no such text", stop])
        pieces = [step.text for step in request]
        at = text.index(stop)
        assert "".join(pieces) == request.output.text == text[:at] and request.output.finish_reason == "stop"
        assert request.output.tokens == plain.output.tokens[: at + len(stop)]
        token = plain.output.tokens[5]
        request = engine.add(PROMPTS[0], max_new_tokens=20, eos_token_id=(), stop=token)
        first = plain.output.tokens.index(token)
        assert request.result().tokens == plain.output.tokens[: first + 1] and request.output.finish_reason == "stop"


@pytest.mark.parametrize(("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1), ([2], [1], 0)])
def test_common_length(a, b, n):
    assert common_length(a, b) == n
