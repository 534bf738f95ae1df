"""Whoever drives an engine: a caller, an iterator, an event loop, a thread, a crowd in any order."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
from engine_cases import (
    BREAKS,
    POISON,
    PROMPTS,
    alone,
    asked,
    check,
    engine_of,
    made_pair,
    pages_of,
)
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from treespec_compiler.runtime.request import Status


@pytest.fixture(scope="module")
def pair():
    return made_pair()


def test_iterating_drives_the_engine(pair):
    with engine_of(pair) as engine:
        first, second = (engine.add(prompt, **asked(prompt, i)) for i, prompt in enumerate(PROMPTS[:2]))
        tokens = [token for step in second for token in step.tokens]
        assert tokens == second.output.tokens == alone(pair, PROMPTS[1], 1)[0]
        assert first.output.tokens and engine.step() is not None
        engine.run()
        assert [token for step in first for token in step.tokens] == alone(pair, PROMPTS[0], 0)[0]
        assert list(first) == [] and engine.step() == []


def test_steps_arrive_in_an_event_loop(pair):
    engine = engine_of(pair)

    async def read(prompt, i):
        request = engine.add(prompt, **asked(prompt, i))
        return [token async for step in request for token in step.tokens]

    async def leave():
        request = engine.add(PROMPTS[0], max_new_tokens=200, eos_token_id=())
        async for _ in request:
            request.cancel()
        return request.status

    async def fail():
        with pytest.raises(ZeroDivisionError):
            async for _ in engine.add([1, BREAKS], **asked([1, BREAKS], 0)):
                pass

    async def everything():
        return await asyncio.gather(*(read(prompt, i) for i, prompt in enumerate(PROMPTS)), leave(), fail())

    *found, left, _ = asyncio.run(everything())
    assert found == [alone(pair, prompt, i)[0] for i, prompt in enumerate(PROMPTS)]
    assert left is Status.CANCELLED
    engine.close()
    assert engine._thread is not None and not engine._thread.is_alive()


def test_many_threads_ask_one_engine(pair):
    found: dict[int, list[int]] = {}
    with engine_of(pair) as engine:
        engine.start()

        def ask(i: int) -> None:
            prompt = PROMPTS[i % 6]
            found[i] = engine.add(prompt, **asked(prompt, i)).result().tokens

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.run()
    assert found == {i: alone(pair, PROMPTS[i % 6], i)[0] for i in range(12)}


def test_closing_ends_what_runs(pair):
    engine = engine_of(pair)
    running, waiting = (engine.add(PROMPTS[0], max_new_tokens=200) for _ in range(2))
    engine.step()
    engine.close()
    assert running.status is waiting.status is Status.CANCELLED
    engine.close()


class Crowd(RuleBasedStateMachine):
    """Requests come, go, fail and are preempted in any order; who finishes gives what he gives alone."""

    pair: SimpleNamespace

    @initialize(pages=st.integers(7, 40), most=st.integers(1, 5), prompt_tokens=st.integers(1, 20))
    def begin(self, pages, most, prompt_tokens):
        self.engine = engine_of(self.pair, max_tokens=4 * pages, max_requests=most, prompt_tokens=prompt_tokens)
        self.requests, self.cancelled, self.count = [], set(), 0

    @rule(prompt=st.sampled_from([*PROMPTS, [2, POISON], [3, 3, BREAKS]]), index=st.integers(0, 9), p=st.integers(0, 2))
    def add(self, prompt, index, p):
        self.requests.append((self.engine.add(prompt, priority=p, **asked(prompt, index)), index))

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        request, _ = data.draw(st.sampled_from(self.requests))
        if not request.done:
            self.cancelled.add(request.number)
        request.cancel()

    @precondition(lambda self: self.engine._scheduler.running)
    @rule(data=st.data())
    def preempt(self, data):
        job = data.draw(st.sampled_from(self.engine._scheduler.running))
        self.engine._scheduler.preempt(job)

    @invariant()
    def pages_are_accounted_for(self):
        engine = getattr(self, "engine", None)
        if engine is None:
            return
        cache = engine._slots.cache(engine.program)
        held = {page for table in cache._tables for page in table}
        assert cache.page_counts.held == len(held) and cache.page_counts.free == cache.page_counts.total - len(held)
        assert sum(length > 0 for length in cache._lengths) <= len(engine._scheduler.running)

    def teardown(self):
        self.engine.run()
        assert pages_of(self.engine).held == 0
        for request, index in self.requests:
            if request.number in self.cancelled:
                assert request.status is Status.CANCELLED
                assert request.output.tokens == alone(self.pair, request.prompt, index)[0][: request.stats.tokens]
            else:
                check(self.pair, request, index)
        self.engine.close()


@pytest.mark.rare
def test_a_crowd_in_any_order(pair):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("CrowdOfPair", (Crowd,), {"pair": pair})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=25, stateful_step_count=25, deadline=None, phases=[Phase.generate])
    )
