"""Decoders whose Python code runs over the number of tokens: loops that fill a mask, lists, arrays."""

from __future__ import annotations

import math

import numpy as np
import torch
from modules import DIM, HEADS, Tiny
from torch import Tensor


class Length(Tiny):
    layers = 1


class RowsInALoop(Length):
    def setup(self) -> None:
        self.window = 4

    def mask(self, tokens: int) -> Tensor:
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        for i in range(tokens):
            seen[i, : max(0, i + 1 - self.window)] = False
        return seen


class BiasInALoop(Length):
    """In the middle of attention, over the queries' own length."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = q @ k.mT / 2
        t = q.shape[-2]
        bias = torch.full((t, t), -math.inf)
        for i in range(t):
            for j in range(i + 1):
                bias[i, j] = (j - i) / 4
        return (scores + bias).softmax(-1) @ v


class BiasOfHeads(Length):
    def mask(self, tokens: int) -> Tensor:
        bias = torch.empty(HEADS, tokens, tokens)
        for head, slope in enumerate([2 ** -(h + 1) for h in range(HEADS)]):
            for i in range(tokens):
                bias[head, i] = -slope * (i - torch.arange(tokens)).abs()
                bias[head, i, i + 1 :] = -torch.inf
        return bias


class ListOfLists(Length):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.size(2)
        mask = torch.tensor([[0.0 if j <= i else -1e9 for j in range(t)] for i in range(t)], device=q.device)
        return (q @ k.mT + mask).softmax(-1) @ v


class StackedRows(Length):
    def mask(self, tokens: int) -> Tensor:
        rows = []
        for i in range(tokens):
            rows.append(torch.arange(tokens) <= i)
        return torch.stack(rows)


class NumpyRows(Length):
    def mask(self, tokens: int) -> Tensor:
        m = np.full((tokens, tokens), -np.inf, dtype=np.float32)
        for i in range(tokens):
            m[i, : i + 1] = 0.0
        return torch.tensor(m)


class WhileRows(Length):
    def mask(self, tokens: int) -> Tensor:
        m, i = torch.zeros(tokens, tokens, dtype=torch.bool), 0
        while i < tokens:
            m[i, : i + 1] = True
            i += 1
        return m


class RowsAreViews(Length):
    def mask(self, tokens: int) -> Tensor:
        m = torch.full((tokens, tokens), -math.inf)
        for i, row in enumerate(m):
            row[: i + 1] = 0
        return m


class PositionsOfAList(Length):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.tensor(list(range(ids.shape[1])), device=ids.device).unsqueeze(0))


class NumpySinusoid(Length):
    def positions(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        angle = np.array([[p / np.power(100, 2 * (i // 2) / DIM) for i in range(DIM)] for p in range(n)])
        angle[:, 0::2] = np.sin(angle[:, 0::2])
        angle[:, 1::2] = np.cos(angle[:, 1::2])
        return torch.FloatTensor(angle)


class UnderAnotherName(Length):
    def mask(self, tokens: int) -> Tensor:
        t = torch
        m = t.zeros(tokens, tokens, dtype=t.bool)
        for i in range(tokens):
            m[i] = t.arange(tokens) <= i
        return m


class DistancesTimesSlopes(Length):
    """The distances come from Python, the slopes from a buffer."""

    def setup(self) -> None:
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1)[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        bias = -torch.tensor([[[abs(i - j) for j in range(t)] for i in range(t)]])
        bias = bias * self.slopes
        scores = (q @ k.mT / 2 + bias).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
        return scores.softmax(-1) @ v


class DifferencesInPairs(Length):
    """Whole numbers of pairs of places, which others look up in a table of biases."""

    def setup(self) -> None:
        self.near = torch.nn.Embedding(9, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        away = torch.tensor([[i - j for j in range(t)] for i in range(t)])
        return self.scored(q @ k.mT / 2, away).softmax(-1) @ v

    def scored(self, scores: Tensor, away: Tensor) -> Tensor:
        bias = self.near(away.clamp(0, 8)).permute(2, 0, 1)
        return (scores + bias).masked_fill(away < 0, -math.inf)


class EndsAt(Length):
    """The code itself runs for 37 tokens and no more, which ends the context."""

    end = 37

    def positions(self, ids: Tensor) -> Tensor:
        rows = [math.sqrt(self.end - i) for i in range(1, ids.shape[1] + 1)]
        return torch.tensor(rows)[:, None] * torch.linspace(0.1, 1, DIM)


class EndsSoon(EndsAt):
    """Before what a table is first made for."""

    end = 24


CONVERTED: tuple[type[Length], ...] = (
    RowsInALoop,
    BiasInALoop,
    BiasOfHeads,
    ListOfLists,
    StackedRows,
    NumpyRows,
    WhileRows,
    RowsAreViews,
    PositionsOfAList,
    NumpySinusoid,
    UnderAnotherName,
    DistancesTimesSlopes,
    DifferencesInPairs,
    EndsAt,
    EndsSoon,
)
