"""The loop: collect what all requests want run, run it together, send the results back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..speculation.work import Answer, Work, Working, perform
from .request import Request, Step


@dataclass(slots=True, eq=False)
class _Running:
    """A request within a step, if it has begun one."""

    request: Request
    steps: Working[Step] | None = None
    wanted: Work | None = None


class Engine:
    """Runs any number of requests; each round is one call of every program that something is wanted of."""

    def __init__(self) -> None:
        self._running: list[_Running] = []
        self._ended: list[tuple[Request, Step | Exception]] = []

    def add(self, request: Request) -> None:
        """It takes part from the next step on."""
        self._running.append(_Running(request))

    def step(self) -> Sequence[tuple[Request, Step | Exception]]:
        """Work until some request ends a step: these requests, and the step or why it failed.

        A request that is finished or failed is closed and takes part no longer; the others go on.
        """
        with torch.inference_mode():
            for running in self._running:
                if running.steps is None:
                    running.steps = running.request.advance()
                    self._resume(running)
            while not self._ended and self._running:
                self._round()
        ended, self._ended = self._ended, []
        return ended

    def remove(self, request: Request) -> None:
        """Close a request, whatever it waits for."""
        if any(running.request is request for running in self._running):
            self._running = [running for running in self._running if running.request is not request]
            request.close()

    def _round(self) -> None:
        waiting = self._running  # for something, all of them: a round is made as long as none has ended its step
        for place, answer in perform([running.wanted for running in waiting if running.wanted is not None]):
            self._resume(waiting[place], answer)

    def _resume(self, running: _Running, answer: Answer | Exception | None = None) -> None:
        steps = running.steps
        assert steps is not None
        try:
            if answer is None:
                running.wanted = next(steps)
            elif isinstance(answer, Exception):
                running.wanted = steps.throw(answer)
            else:
                running.wanted = steps.send(answer)
        except StopIteration as end:
            running.steps = running.wanted = None
            self._ended.append((running.request, end.value))
            if running.request.stats.finish_reason is not None:
                self.remove(running.request)
        except Exception as error:
            self.remove(running.request)
            self._ended.append((running.request, error))
