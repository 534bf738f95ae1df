"""Decoders whose forward fills attributes and keeps them: what they compute does not depend on what ran before."""

from __future__ import annotations

from typing import Any

import torch
from modules import DIM, Tiny
from torch import Tensor


class History(Tiny):
    layers = 1


def angles(tokens: int) -> Tensor:
    return torch.arange(tokens)[:, None] * torch.linspace(0.1, 1, DIM)


class FilledOnce(History):
    """Of a fixed size."""

    def setup(self) -> None:
        self.table: Tensor | None = None

    def positions(self, ids: Tensor) -> Tensor:
        if self.table is None:
            self.table = angles(300).sin()
        return self.table[: ids.shape[1]]


class Grown(History):
    """Made again for longer texts (GPT-NeoX, ESM), from a buffer; the length is kept beside it."""

    def setup(self) -> None:
        self.register_buffer("steps", torch.linspace(0.1, 1, DIM))
        self.cos = self.sin = None
        self.known = 0

    def positions(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        if self.cos is None or tokens > self.known:
            self.known = tokens
            steps = torch.arange(tokens)[:, None] * self.steps
            self.cos, self.sin = steps.cos(), steps.sin()
        return self.cos[:tokens] + self.sin[:tokens]


class MadeForEachLength(History):
    def setup(self) -> None:
        self.table = None
        self.length: int | None = None

    def positions(self, ids: Tensor) -> Tensor:
        if ids.shape[1] != self.length:
            self.length, self.table = ids.shape[1], angles(ids.shape[1]).cos()
        return self.table  # type: ignore[return-value]


class FutureMask(History):
    """fairseq's: an empty tensor at first."""

    def setup(self) -> None:
        self._future = torch.empty(0)

    def mask(self, tokens: int) -> Tensor:
        if self._future.size(0) < tokens:
            self._future = torch.triu(torch.full((tokens, tokens), float("-inf")), 1)
        return self._future[:tokens, :tokens]


class RegisteredMask(History):
    """A buffer that is registered by forward (lucidrains)."""

    def setup(self) -> None:
        self.register_buffer("seen", None, persistent=False)

    def mask(self, tokens: int) -> Tensor:
        if self.seen is None or self.seen.shape[-1] < tokens:
            self.register_buffer("seen", torch.ones(tokens, tokens, dtype=torch.bool).tril(), persistent=False)
        return self.seen[:tokens, :tokens]


class AskedFor(History):
    """`hasattr`."""

    def mask(self, tokens: int) -> Tensor:
        if not hasattr(self, "seen") or self.seen.shape[0] < tokens:
            self.seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return self.seen[:tokens, :tokens]


class KeepsWhatItSaw(History):
    """For somebody to look at; forward itself never does."""

    def setup(self) -> None:
        self.last: Any = None
        self.loss: Any = None

    def start(self, ids: Tensor) -> Tensor:
        self.last, self.loss = super().start(ids), None
        return self.last


CONVERTED: tuple[type[History], ...] = (
    FilledOnce,
    Grown,
    MadeForEachLength,
    FutureMask,
    RegisteredMask,
    AskedFor,
    KeepsWhatItSaw,
)


class AddsUp(History):
    """What an earlier text was goes into the next one."""

    def setup(self) -> None:
        self.state: Any = None

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        if self.state is not None:
            x = x + self.state
        self.state = x.mean((0, 1))
        return x


class OtherWhenFilled(History):
    def setup(self) -> None:
        self.table = None

    def positions(self, ids: Tensor) -> Tensor:
        if self.table is None:
            self.table = angles(300).sin()
            return self.table[: ids.shape[1]]
        return 2 * self.table[: ids.shape[1]]


class AsLongAsTheText(History):
    """The table is another one for another length, and is kept."""

    def setup(self) -> None:
        self.table = None

    def positions(self, ids: Tensor) -> Tensor:
        if self.table is None or self.table.shape[0] < ids.shape[1]:
            self.table = angles(ids.shape[1]) / ids.shape[1]
        return self.table[: ids.shape[1]]


class WearsOff(History):
    """By so little in each call that no comparison of logits sees it."""

    def setup(self) -> None:
        self.register_buffer("factor", torch.ones(DIM))

    def start(self, ids: Tensor) -> Tensor:
        self.factor = self.factor * 0.9999999
        return super().start(ids) * self.factor


class Counts(History):
    """Another function after fifty calls."""

    def setup(self) -> None:
        self.calls = 0

    def finish(self, x: Tensor) -> Any:
        self.calls += 1
        return self.head(x) if self.calls <= 50 else self.head(x) * 2


REFUSED: tuple[type[History], ...] = (AddsUp, WearsOff, Counts, OtherWhenFilled, AsLongAsTheText)

__all__ = ["CONVERTED", "REFUSED", "History"]
