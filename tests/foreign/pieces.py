"""Decoders that go through the text in pieces. Each returns [1, T, V] logits of token ids [1, T]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from decoders import Style
from modules import DIM
from torch import Tensor, nn

PIECE = 32


class QueriesInALoop(Style):
    """Attention of a piece of the queries at a time."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t, found = q.shape[2], []
        for start in range(0, t, PIECE):
            own = q[:, :, start : start + PIECE]
            later = torch.arange(start, start + own.shape[2])[:, None] < torch.arange(t)
            found.append((own @ k.mT / 2).masked_fill(later, -math.inf).softmax(-1) @ v)
        return torch.cat(found, 2)


class QueriesSplit(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        parts = zip(q.split(PIECE, 2), later.split(PIECE), strict=True)
        return torch.cat([(own @ k.mT / 2).masked_fill(m, -math.inf).softmax(-1) @ v for own, m in parts], 2)


class HeadInPieces(Style):
    """The head for a piece of the text at a time, in as many turns as there are pieces."""

    def finish(self, x: Tensor) -> Any:
        count = (x.shape[1] + PIECE - 1) // PIECE
        return torch.cat([self.head(x[:, i * PIECE : (i + 1) * PIECE]) for i in range(count)], 1)


class HeadOfSplit(Style):
    def finish(self, x: Tensor) -> Any:
        return torch.cat([self.head(piece) for piece in x.split(PIECE, dim=1)], 1)


class PiecesAlone(Style):
    """Each piece sees itself: so far, that is plain attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        parts = zip(*(x.split(PIECE, 2) for x in (q, k, v)), strict=True)
        return torch.cat([super(PiecesAlone, self).attend(a, b, c, layer) for a, b, c in parts], 2)


CONVERTED: tuple[type[Style], ...] = (QueriesInALoop, QueriesSplit, HeadInPieces, HeadOfSplit, PiecesAlone)


class Halves(Style):
    """Something token by token for each half of the text."""

    def done(self, x: Tensor) -> Tensor:
        return x.tanh()

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        half = x.shape[1] // 2
        return x[:, :half], x[:, half:]

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.cat([self.done(piece) for piece in self.cut(x)], dim=1))


class FeedForwardInHalves(Halves):
    """`chunk(2, dim=1)` through a norm and two projections."""

    def setup(self) -> None:
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 32), nn.Linear(32, DIM)

    def done(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        return x.chunk(2, dim=1)


class FusedQueriesInHalves(Style):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        seen, half = torch.ones(t, t, dtype=torch.bool).tril(), t // 2
        parts = ((q[:, :, :half], seen[:half]), (q[:, :, half:], seen[half:]))
        return torch.cat([nn.functional.scaled_dot_product_attention(own, k, v, rows) for own, rows in parts], 2)


class QueriesInHalvesByHand(Style):
    """The softmax written out for each half: a maximum, exponentials and their sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        found = []
        for own, later in zip(q.chunk(2, 2), torch.ones(q.shape[2], q.shape[2]).triu(1).chunk(2), strict=True):
            scores = (own @ k.mT / 2).masked_fill(later > 0, -math.inf)
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            found.append(e / e.sum(-1, keepdim=True) @ v)
        return torch.cat(found, 2)


JOINED: tuple[type[Style], ...] = (Halves, FeedForwardInHalves, FusedQueriesInHalves, QueriesInHalvesByHand)


class MeansOfHalves(FeedForwardInHalves):
    def done(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class HalvesTurned(Halves):
    def cut(self, x: Tensor) -> Sequence[Tensor]:
        return super().cut(x)[::-1]


class HalvesThatOverlap(Halves):
    """The token in the middle comes twice, and the first one not at all."""

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        half = x.shape[1] // 2
        return x[:, 1 : half + 1], x[:, half:]


class HalvesBySize(FeedForwardInHalves):
    def done(self, x: Tensor) -> Tensor:
        return x * x.shape[1]


class HalvesUnlike(Halves):
    """Each half has another factor."""

    def finish(self, x: Tensor) -> Any:
        first, second = self.cut(x)
        return self.head(torch.cat([first * 1.5, second * 2.5], 1))


class HalvesAlone(Style):
    """Each half of the text sees itself alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        parts = zip(*(x.chunk(2, 2) for x in (q, k, v)), strict=True)
        return torch.cat([super(HalvesAlone, self).attend(a, b, c, layer) for a, b, c in parts], 2)


class MeanOfAPiece(Style):
    def finish(self, x: Tensor) -> Any:
        parts = [x[:, i : i + PIECE] for i in range(0, x.shape[1], PIECE)]
        return self.head(torch.cat([p - p.mean(1, keepdim=True) for p in parts], 1))


class SmallPieces(QueriesInALoop):
    """More than one piece in the text that is traced."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        found = [super(SmallPieces, self).attend(q[:, :, i : i + 3], k, v, layer) for i in range(0, q.shape[2], 3)]
        return torch.cat(found, 2)


REFUSED: tuple[type[Style], ...] = (
    MeanOfAPiece,
    SmallPieces,
    MeansOfHalves,
    HalvesTurned,
    HalvesThatOverlap,
    HalvesBySize,
    HalvesUnlike,
    HalvesAlone,
)
