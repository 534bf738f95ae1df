"""The plain loop on the original module: what `on_unsupported="fallback"` runs."""

from __future__ import annotations

import inspect
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..speculation.verifiers.judge import Judge
from .engine import Ending, Step
from .stats import FinishReason, Stats


class PlainLoop:
    """One token a step; the whole sequence is run again for each, which is right for every causal model."""

    def __init__(self, module: nn.Module, prompt: list[int], ending: Ending, judge: Judge, stats: Stats) -> None:
        self.module, self.ending, self.judge, self.stats = module, ending, judge, stats
        judge.accept(prompt)
        self.ids, self.remaining = list(prompt), ending.max_new_tokens
        parameter = next(module.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        names = inspect.signature(module.forward).parameters
        self.arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}

    def prefill(self) -> Step:
        began = perf_counter()
        step = self._next()
        self.stats.prefill_seconds += perf_counter() - began
        return step

    def step(self) -> Step:
        began = perf_counter()
        step = self._next()
        seconds = perf_counter() - began
        self.stats.verify_seconds += seconds
        self.stats.step_seconds += seconds
        self.stats.steps += 1
        self.stats.nodes += 1
        self.stats.step_tokens += 1
        return step

    def _next(self) -> Step:
        ids = torch.tensor([self.ids], dtype=torch.int64, device=self.device)
        with torch.no_grad():
            # NOTE: `forward`, so that a module compiled in place does not go through Dynamo for every length.
            logits = _logits(self.module.forward(ids, **self.arguments))
        token = self.judge.first(logits[0, -1])
        self.judge.accept([token])
        self.ids.append(token)
        self.remaining -= 1
        self.stats.tokens += 1
        reason: FinishReason | None = None
        if token in self.ending.eos:
            reason = "eos"
        elif token in self.ending.stop:
            reason = "stop"
        elif self.remaining == 0:
            reason = "length"
        self.stats.finish_reason = reason
        return Step([token], 0, token, None, [])

    def close(self) -> None:
        """Nothing is held."""


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]
