"""Decoders that go through the text in pieces. Each returns [1, T, V] logits of token ids [1, T]."""

from __future__ import annotations

import math
from typing import Any

import torch
from decoders import Style
from torch import Tensor

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


class MeanOfAPiece(Style):
    def finish(self, x: Tensor) -> Any:
        parts = [x[:, i : i + PIECE] for i in range(0, x.shape[1], PIECE)]
        return self.head(torch.cat([p - p.mean(1, keepdim=True) for p in parts], 1))


class SmallPieces(QueriesInALoop):
    """More than one piece in the text that is traced."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        found = [super(SmallPieces, self).attend(q[:, :, i : i + 3], k, v, layer) for i in range(0, q.shape[2], 3)]
        return torch.cat(found, 2)


REFUSED: tuple[type[Style], ...] = (MeanOfAPiece, SmallPieces)
