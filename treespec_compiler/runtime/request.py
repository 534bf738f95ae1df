"""A request of an engine, as its user holds it: steps as they come, the output so far, and its end."""

from __future__ import annotations

import asyncio
import enum
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .generation import Step
from .likelihood import TokenLikelihood
from .stats import FinishReason, Stats


class Status(enum.StrEnum):
    """How far a request is."""

    WAITING = "waiting"  # for its first step, or, preempted, for pages
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"  # `request.error` says why


@dataclass(frozen=True)
class Output:
    """What a request has given so far."""

    tokens: list[int]
    """New ones, the end token included."""
    text: str
    """With a tokenizer: without the stop string; see `Step.text`."""
    likelihoods: list[TokenLikelihood]
    finish_reason: FinishReason | None
    """None: it goes on, or was cancelled, or failed."""
    prompt_likelihoods: Sequence[TokenLikelihood | None] = ()
    """Of each token of the prompt, where asked for; of the first one: None."""


class Driver(Protocol):
    """What a request needs of its engine."""

    def cancel(self, request: Request) -> None: ...

    def progress(self, request: Request) -> None:
        """Return when the request has a new step or is over."""
        ...

    def start(self) -> None:
        """Have a thread step the engine."""
        ...


class Request(Iterator[Step], AsyncIterator[Step]):
    """Made by `Engine.add`. Iterating gives its `Step`s, and raises its error if it failed; `async for` as well.

    Iterating drives the engine, all requests of it, unless a thread does (`Engine.start`). `async for` starts that
    thread. Methods may be called from any thread.
    """

    def __init__(self, driver: Driver, number: int, prompt: list[int], stats: Stats, priority: int) -> None:
        self.number, self.prompt, self.stats, self.priority = number, prompt, stats, priority
        self.status = Status.WAITING
        self.error: Exception | None = None
        self._driver = driver
        self._lock = threading.Lock()
        self._steps: deque[Step] = deque()  # not iterated over yet
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._likelihoods: list[TokenLikelihood] = []
        self._prompt_likelihoods: list[TokenLikelihood | None] = []

    @property
    def done(self) -> bool:
        """Whether it is over, in one way or another."""
        return self.status not in (Status.WAITING, Status.RUNNING)

    @property
    def output(self) -> Output:
        """Everything so far, whether iterated over or not."""
        with self._lock:
            text, scored = "".join(self._text), [*self._prompt_likelihoods]
            return Output([*self._tokens], text, [*self._likelihoods], self.stats.finish_reason, scored)

    def result(self) -> Output:
        """The whole output, waited for. Raises the request's error."""
        while not self.done:
            self._driver.progress(self)
            self._steps.clear()
        if self.error is not None:
            raise self.error
        return self.output

    def cancel(self) -> None:
        """End it at once, or at the end of the engine's step under way; what came so far stays."""
        self._driver.cancel(self)

    def __next__(self) -> Step:
        while not self._steps and not self.done:
            self._driver.progress(self)
        found = self._next()
        if found is None:
            raise StopIteration
        return found

    async def __anext__(self) -> Step:
        while not self._steps and not self.done:
            self._driver.start()
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            with self._lock:
                self._waiters.append((loop, future))
                if self._steps or self.done:  # since it was looked at
                    future.set_result(None)
            await future
        found = self._next()
        if found is None:
            raise StopAsyncIteration
        return found

    def _next(self) -> Step | None:
        if self._steps:
            return self._steps.popleft()
        if self.error is not None:
            raise self.error
        return None

    def _add(self, step: Step) -> None:
        with self._lock:
            self._tokens += step.tokens
            self._likelihoods += step.likelihoods
            self._prompt_likelihoods += step.prompt_likelihoods
            if step.text:
                self._text.append(step.text)
            self._steps.append(step)
        self._wake()

    def _end(self, status: Status, error: Exception | None = None) -> None:
        with self._lock:
            self.status, self.error = status, error
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_set, future)

    def __repr__(self) -> str:
        return f"Request({self.number}: {len(self.prompt)} + {self.stats.tokens} tokens, {self.status})"


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
