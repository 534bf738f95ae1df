"""Several prompts in one call of `generate` or `stream`: one setting for all or one each, and one engine for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..capture.surroundings import not_traced
from ..errors import InvalidOption
from ..program.prompt import parse_prompts
from .engine import Engine
from .generation import Step
from .output import BatchOutput, GenerationOutput
from .request import Request
from .settings import Call
from .stats import Stats
from .streams import Stream

R = TypeVar("R")

ONE_EACH = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Settings that are one value: a list of them is one for each prompt."""
SEVERAL_EACH = ("logit_bias", "logits_processor", "eos_token_id", "stop_ids")
"""Settings that may be several values: a list is one for each prompt if it holds lists, sets, mappings or None."""
AT_ONCE = 32
"""Requests that run at the same time; more wait for these to end."""


def calls_of(
    record: Callable[..., R],
    model: Any,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    num_return_sequences: Any = 1,
    **settings: Any,
) -> list[R]:
    """A record for each sample of each prompt. Raises what the record raises, and InvalidOption."""
    samples = num_return_sequences
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise InvalidOption(name="num_return_sequences", got=samples, expected="a positive integer")
    if type(input_ids) is list and input_ids and type(input_ids[0]) is int and attention_mask is None:
        prompts: list[Any] = [input_ids]  # not looked at twice
    else:
        prompts = parse_prompts(input_ids, attention_mask).ids
        if len(prompts) == 1:
            prompts = [input_ids]
            settings["attention_mask"] = attention_mask
    device = input_ids.device if isinstance(input_ids, Tensor) else None
    calls = []
    for index, prompt in enumerate(prompts):
        one = {name: _of(index, name, value, len(prompts)) for name, value in settings.items()}
        for sample in range(samples):
            ids = prompt if device is None or len(prompts) == 1 else torch.tensor(prompt, device=device)
            seed = one.get("seed")
            if sample and seed is not None:
                one = {**one, "seed": seed + 1}
            calls.append(record(model, ids, **one))
    if samples > 1 and any(getattr(call, "sampling").greedy for call in calls):  # noqa: B009
        expected = "1, or a temperature above 0: greedy decoding gives one sequence"
        raise InvalidOption(name="num_return_sequences", got=samples, expected=expected)
    return calls


def _of(index: int, name: str, value: Any, prompts: int) -> Any:
    """Prompt `index`'s own value of a setting."""
    if not isinstance(value, (list, tuple)):
        return value
    parts = (list, tuple, set, frozenset, Mapping, type(None))
    each = name in ONE_EACH or (name in SEVERAL_EACH and any(isinstance(part, parts) for part in value))
    if not each or (prompts == 1 and name not in ONE_EACH):
        return value
    if len(value) != prompts:
        raise InvalidOption(name=name, got=value, expected=f"one value, or a list of {prompts}, one for each prompt")
    return value[index]


class _Several(Stream):
    """The steps of several generations; `step.request` says whose each is.

    `tokens` are those of all, in this order; `sequences` and `stats` as in `BatchOutput`.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.tokens = []
        self._padding = _padding(calls[0].module)
        self._began = perf_counter()
        self._seconds = self._compiling = 0.0

    def _outputs(self) -> list[GenerationOutput]:
        raise NotImplementedError

    def _note(self, step: Step, number: int) -> Step:
        self.tokens += step.tokens
        self._seconds = perf_counter() - self._began
        return replace(step, request=number)

    def exhaust(self) -> None:
        for _ in self:
            pass

    def output(self) -> BatchOutput:
        outputs = self._outputs()
        stats = Stats.total([out.stats for out in outputs])
        stats.compile_seconds += self._compiling
        stats.step_seconds = max(0.0, self._seconds - stats.compile_seconds)
        return BatchOutput.of(outputs, self._padding, stats)

    @property
    def stats(self) -> Stats:  # type: ignore[override]
        return self.output().stats

    @property
    def sequences(self) -> Tensor:
        return self.output().sequences


class BatchStream(_Several):
    """By one engine, all at once."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        first, sizes = calls[0], sorted(len(call.prompt) + call.max_new_tokens for call in calls)
        self._engine = Engine(
            first.model,
            draft=first.draft,
            max_requests=min(len(calls), AT_ONCE),
            max_tokens=sum(sizes[-AT_ONCE:]),
            policy=first.policy,
            verifier=first.verifier,
            sampler=first.sampler,
            options=first.compiler,
        )
        self._calls = calls
        self._compiling = self._engine.compile_seconds
        self._requests = [self._engine.enter(replace(call, policy=self._engine.policy)) for call in calls]
        self._numbers = {request: number for number, request in enumerate(self._requests)}
        self._steps: deque[tuple[Request, Step]] = deque()

    @not_traced
    def __next__(self) -> Step:
        while not self._steps:
            if all(request.done for request in self._requests):
                self.close()
                raise StopIteration
            self._steps += self._engine.step()
            for request in self._requests:
                if request.error is not None:
                    self.close()
                    raise request.error
        request, step = self._steps.popleft()
        return self._note(step, self._numbers[request])

    def _outputs(self) -> list[GenerationOutput]:
        return [
            GenerationOutput(
                torch.tensor([[*call.prompt, *request.output.tokens]], dtype=torch.int64, device=call.device),
                request.stats,
            )
            for call, request in zip(self._calls, self._requests, strict=True)
        ]

    def close(self) -> None:
        self._steps.clear()
        self._engine.close()


class OneByOne(_Several):
    """One stream after the other, as the plain loop runs them."""

    def __init__(self, calls: Sequence[Call], streams: Sequence[Stream]) -> None:
        super().__init__(calls)
        self._streams = streams

    def __next__(self) -> Step:
        for number, each in enumerate(self._streams):
            for step in each:
                return self._note(step, number)
        raise StopIteration

    def _outputs(self) -> list[GenerationOutput]:
        return [each.output() for each in self._streams]

    def close(self) -> None:
        for each in self._streams:
            each.close()


def _padding(module: object) -> int:
    """What fills rows up: the model's own padding token, or its end token, or 0."""
    for name in ("pad_token_id", "eos_token_id"):
        for holder in ("generation_config", "config"):
            value = getattr(getattr(module, holder, None), name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and value >= 0:
                return value
    return 0
