"""Decoders whose sizes are the smaller or the larger of the number of tokens and another number."""

from __future__ import annotations

import math
from typing import Any

import torch
from decoders import HEAD, Style, future
from modules import CONTEXT
from torch import Tensor


class LastOfTheText(Style):
    """`ids[:, -min(T, 64):]`, as nanoGPT cuts a text before it is too long."""

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids[:, -min(ids.shape[1], CONTEXT) :])


class StartByMax(Style):
    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids[:, max(0, ids.shape[1] - CONTEXT) :])


class TableByMin(Style):
    """A buffer of the context's length, of which as much is read as there is."""

    def setup(self) -> None:
        self.register_buffer("later", future(CONTEXT))

    def weights(self, scores: Tensor) -> Tensor:
        rows = min(scores.shape[-1], CONTEXT)
        return (scores / math.sqrt(HEAD)).masked_fill(self.later[:rows, : max(rows, 1)], -math.inf).softmax(-1)


class BandByMin(Style):
    """A window that is no wider than the text."""

    def weights(self, scores: Tensor) -> Tensor:
        t = scores.shape[-1]
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        seen = seen & torch.ones(t, t, dtype=torch.bool).triu(1 - min(6, t))
        return (scores / 2).masked_fill(~seen, -math.inf).softmax(-1)


class LatentsOfTheLast(Style):
    """Perceiver AR: the last 64 places ask, all are seen."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        t = x.shape[1]
        n = min(t, CONTEXT)
        q, k, v = (self.split(p) for p in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
        hidden = torch.ones(n, t, dtype=torch.bool).triu(t - n + 1)
        weights = (q[:, :, -n:] @ k.mT / 2).masked_fill(hidden, -math.inf).softmax(-1)
        return x[:, -n:] + self.out[layer](self.join(weights @ v))


class FewOfTheText(Style):
    """No more than eight tokens: the rows of a longer text are others."""

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids[:, -min(ids.shape[1], 8) :])


class FirstTokensInAll(Style):
    """The first five tokens go into every row."""

    def finish(self, x: Tensor) -> Any:
        return self.head(x + x[:, : min(x.shape[1], 5)].mean(1, keepdim=True))


class ScaleByMin(Style):
    """Another scale for each number of tokens, up to five."""

    def weights(self, scores: Tensor) -> Tensor:
        t = scores.shape[-1]
        return (scores / min(t, 5)).masked_fill(future(t), -math.inf).softmax(-1)


class ScaleByLength(Style):
    def weights(self, scores: Tensor) -> Tensor:
        t = scores.shape[-1]
        return (scores / t).masked_fill(future(t), -math.inf).softmax(-1)


CONVERTED = (LastOfTheText, StartByMax, TableByMin, BandByMin, LatentsOfTheLast)
REFUSED = (FewOfTheText, FirstTokensInAll, ScaleByMin, ScaleByLength)
