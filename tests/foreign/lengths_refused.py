"""Decoders whose Python code makes something else for some number of tokens, or of more than that number: refused."""

from __future__ import annotations

import math
import time

import torch
from lengths import DifferencesInPairs, DistancesTimesSlopes, Length
from lengths_read import Settings
from modules import DIM
from torch import Tensor


class DividedByLength(Length):
    """Another table for each length."""

    def mask(self, tokens: int) -> Tensor:
        m = torch.full((tokens, tokens), -math.inf)
        for i in range(tokens):
            m[i, : i + 1] = torch.arange(i + 1) / tokens
        return m


class OtherAt300(Length):
    """Far beyond the lengths that a trace sees."""

    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, 0 if tokens < 300 else i : i + 1] = True
        return m


class Drawn(Length):
    def positions(self, ids: Tensor) -> Tensor:
        return torch.stack([torch.rand(DIM) for _ in range(ids.shape[1])])


class FromWeights(Length):
    def positions(self, ids: Tensor) -> Tensor:
        return torch.stack([self.wpe.weight[i] * 2 for i in range(ids.shape[1])])


class FromTokens(Length):
    """What a row of the loop makes depends on the token."""

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        rows = torch.zeros_like(x)
        for i in range(ids.shape[1]):
            rows[:, i] = x[:, : i + 1].mean(1)
        return rows


class OneToken(Length):
    """A token sees the one before it only."""

    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, max(0, i - 1)] = True
        return m


class SeesTheFuture(Length):
    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, : i + 2] = True
        return m


class OtherAtSevenBits(Length):
    """At 127 tokens, to which no number in the code points."""

    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, 0 if bin(tokens).count("1") < 7 else i : i + 1] = True
        return m


def reach_at(tokens: int) -> int:
    return 4 if tokens != 1501 else 9


class OtherInAFunction(Length):
    """At a number in another function."""

    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        m[0, 0] = True
        for i in range(1, tokens):
            m[i] = torch.arange(tokens) > i - reach_at(tokens)
        return m.tril()


class OtherLater(Length):
    """The clock is asked."""

    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, 0 if time.time() < 1e12 else i : i + 1] = True
        return m


class CountsElsewhere(Length):
    """In an object of the module's, for many calls to come."""

    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, 0 if counted() < 100_000 else i : i + 1] = True
        return m


CALLS = Settings()


def counted() -> int:
    CALLS.reach += 1
    return CALLS.reach


class Counts(Length):
    """The loop counts calls besides."""

    def setup(self) -> None:
        self.calls = 0

    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, : i + 1] = True
            self.calls += 1
        return m if self.calls < 10_000 else ~m


class DifferencesButOne(DifferencesInPairs):
    """One pair of places, far away, is something else."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        away = torch.tensor([[i - j if (i, j) != (50, 7) else -5 for j in range(t)] for i in range(t)])
        return self.scored(q @ k.mT / 2, away).softmax(-1) @ v


class DistancesTurned(DistancesTimesSlopes):
    """Behind the query the bias is that of its own place."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        bias = -torch.tensor([[[abs(i - 2 * j) for j in range(t)] for i in range(t)]])
        bias = bias * self.slopes
        scores = q @ k.mT / 2 + bias
        return scores.softmax(-1) @ v


REFUSED: tuple[type[Length], ...] = (
    DividedByLength,
    OtherAt300,
    Drawn,
    FromWeights,
    FromTokens,
    OneToken,
    SeesTheFuture,
    OtherAtSevenBits,
    OtherInAFunction,
    OtherLater,
    CountsElsewhere,
    Counts,
    DifferencesButOne,
    DistancesTurned,
)
