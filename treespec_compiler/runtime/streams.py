"""The steps of a generation as they happen: what `stream` returns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..capture.surroundings import not_traced
from ..speculation.work import alone
from .generation import Generation, Step
from .output import GenerationOutput


class Stream(Iterator[Step]):
    """The steps of one generation, as they happen. `stats` and `tokens` grow with them."""

    def __init__(self, generation: Generation, device: torch.device) -> None:
        self.stats = generation.stats
        self.tokens: list[int] = []
        self._prompt, self._device = generation.prompt, device
        self._generation: Generation | None = generation

    @not_traced
    def __next__(self) -> Step:
        with torch.inference_mode():
            return self._advance()

    def exhaust(self) -> None:
        """All steps that are left, without what keeping out of a user's trace and mode costs each of them."""
        with torch.inference_mode():
            while self._generation is not None and self.stats.finish_reason is None:
                self._advance()
        self.close()

    def _advance(self) -> Step:
        generation = self._generation
        if generation is None or self.stats.finish_reason is not None:
            self.close()
            raise StopIteration
        try:
            step = alone(generation.advance())
        except BaseException:
            self.close()
            raise
        self.tokens += step.tokens
        if self.stats.finish_reason is not None:
            self.close()
        return step

    @property
    def sequences(self) -> Tensor:
        """[1, prompt + tokens so far] int64."""
        return torch.tensor([[*self._prompt, *self.tokens]], dtype=torch.int64, device=self._device)

    def close(self) -> None:
        """End early and free the caches; exhausting the stream does it too."""
        generation, self._generation = self._generation, None
        if generation is not None:
            generation.close()

    def output(self) -> GenerationOutput:
        """What there is so far."""
        return GenerationOutput(self.sequences, self.stats)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_generation", None) is not None:
            self.close()
