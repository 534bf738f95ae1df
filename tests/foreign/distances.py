"""Decoders whose scores hold a query's product with a vector of its distance to the key. Each returns [1, T, V] logits
of token ids [1, T]."""

from __future__ import annotations

import math

import torch
from modules import CONTEXT, DIM, HEADS, Tiny
from torch import Tensor, nn
from torch.nn import functional

SIZE = DIM // HEADS


class Clipped(Tiny):
    """A table read at clipped distances, by einsum; the scale is applied to all of it."""

    layers = 1

    def positions(self, ids: Tensor) -> Tensor:
        return torch.zeros(DIM)

    def setup(self) -> None:
        self.near = nn.Embedding(9, SIZE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        steps = torch.arange(t)
        return self.weighted((q @ k.mT + self.term(q, steps)) / 2) @ v

    def term(self, q: Tensor, steps: Tensor) -> Tensor:
        away = (steps[:, None] - steps[None]).clamp(-4, 4) + 4
        return torch.einsum("bhid,ijd->bhij", q, self.near(away))

    def weighted(self, scores: Tensor) -> Tensor:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1)


class ClippedRows(Clipped):
    """The same as products of each query's rows, less ALiBi."""

    def term(self, q: Tensor, steps: Tensor) -> Tensor:
        b, h, t, d = q.shape
        vectors = self.near.weight[(steps[None] - steps[:, None]).clamp(-4, 4) + 4]
        rows = q.permute(2, 0, 1, 3).reshape(t, b * h, d) @ vectors.transpose(1, 2)
        slopes = 2.0 ** -torch.arange(1, h + 1)[:, None, None]
        return rows.transpose(0, 1).reshape(b, h, t, t) + slopes * (steps[None] - steps[:, None])


class Shifted(Clipped):
    """One vector a distance, brought into place by a column in front, in two layers."""

    layers = 2

    def setup(self) -> None:
        self.far = nn.Parameter(torch.empty(CONTEXT, SIZE))

    def term(self, q: Tensor, steps: Tensor) -> Tensor:
        return self.shifted(q @ self.vectors(len(steps)).transpose(-2, -1))

    def vectors(self, t: int) -> Tensor:
        return self.far[CONTEXT - t :]

    def shifted(self, s: Tensor) -> Tensor:
        b, h, t, _ = s.shape
        return functional.pad(s, (1, 0)).reshape(b, h, t + 1, t)[:, :, 1:]


class ShiftedHeads(Shifted):
    """Vectors of each head; queries with a bias; a column that is joined; taken from the scores."""

    layers = 1

    def setup(self) -> None:
        self.far = nn.Parameter(torch.empty(HEADS, CONTEXT, SIZE))
        self.bias = nn.Parameter(torch.empty(HEADS, 1, SIZE))

    def term(self, q: Tensor, steps: Tensor) -> Tensor:
        vectors = self.far[:, CONTEXT - len(steps) :]
        s = (q + self.bias) @ vectors.transpose(1, 2)
        b, h, t, _ = s.shape
        return -torch.cat([torch.zeros(b, h, t, 1), s], -1).view(b, h, t + 1, t)[:, :, 1:].view_as(s)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self.weighted(q @ k.mT / 2 - self.term(q, torch.arange(q.shape[2]))) @ v


class ProjectedSines(Shifted):
    """Transformer-XL: sines of distances, projected, a column that is joined, queries with biases of their own."""

    layers = 1

    def setup(self) -> None:
        self.project = nn.Linear(DIM, DIM, bias=False)
        self.u, self.w = (nn.Parameter(torch.empty(HEADS, 1, SIZE)) for _ in range(2))

    def places(self, t: int) -> Tensor:
        return torch.arange(t - 1, -1, -1.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        b, h, t, _ = q.shape
        angles = torch.outer(self.places(t), 1 / 100 ** (torch.arange(0, DIM, 2) / DIM))
        vectors = self.project(torch.cat([angles.sin(), angles.cos()], -1)).view(t, h, SIZE).transpose(0, 1)
        s = torch.cat([torch.zeros(b, h, t, 1), (q + self.w) @ vectors.mT], 3)
        s = s.view(b, h, t + 1, t)[:, :, 1:].view(b, h, t, t)
        return self.weighted(((q + self.u) @ k.mT + s) / 2) @ v


class TokensFirst(ProjectedSines):
    """Transformer-XL as it was written: tokens before the batch everywhere, scores [i, j, b, n], softmax over j."""

    def start(self, ids: Tensor) -> Tensor:
        return self.embed(ids.t())  # [T, 1, C]

    def shifted(self, s: Tensor) -> Tensor:
        i, j, b, n = s.shape
        return torch.cat([torch.zeros(i, 1, b, n), s], 1).view(j + 1, i, b, n)[1:].view_as(s)

    def block(self, x: Tensor, layer: int) -> Tensor:
        t = x.shape[0]
        q, k, v = (p.view(t, 1, HEADS, SIZE) for p in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
        angles = torch.outer(self.places(t), 1 / 100 ** (torch.arange(0, DIM, 2) / DIM))
        vectors = self.project(torch.cat([angles.sin(), angles.cos()], -1)).view(t, HEADS, SIZE)
        by_content = torch.einsum("ibnd,jbnd->ijbn", q + self.u[:, 0], k)
        scores = by_content + self.shifted(torch.einsum("ibnd,jnd->ijbn", q + self.w[:, 0], vectors))
        future = torch.ones(t, t, dtype=torch.bool).triu(1)[:, :, None, None]
        weights = (scores / 2).masked_fill(future, -math.inf).softmax(1)
        return x + self.out[layer](torch.einsum("ijbn,jbnd->ibnd", weights, v).reshape(t, 1, DIM))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x).transpose(0, 1)


CONVERTED: tuple[type[Clipped], ...] = (Clipped, ClippedRows, Shifted, ShiftedHeads)


class ReadAtTheQuery(Clipped):
    """By the query's place, not by the distance."""

    def term(self, q: Tensor, steps: Tensor) -> Tensor:
        away = (steps[:, None] + 0 * steps[None]).clamp(0, 8)
        return torch.einsum("bhid,ijd->bhij", q, self.near(away))


class ReadAtTwice(Clipped):
    """i - 2 j, which is no distance."""

    def term(self, q: Tensor, steps: Tensor) -> Tensor:
        away = (steps[:, None] - 2 * steps[None]).clamp(-4, 4) + 4
        return torch.einsum("bhid,ijd->bhij", q, self.near(away))


class OfTheKeys(Clipped):
    """Keys are multiplied, not queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(q.shape[2])
        away = (steps[:, None] - steps[None]).clamp(-4, 4) + 4
        return self.weighted((q @ k.mT + torch.einsum("bhjd,ijd->bhij", k, self.near(away))) / 2) @ v


class FromTheFront(Shifted):
    """The vectors of a longer text are others."""

    def vectors(self, t: int) -> Tensor:
        return self.far[:t]


class ShiftedByOneMore(Shifted):
    """Laid out so that a row begins with what the one before it is about."""

    def shifted(self, s: Tensor) -> Tensor:
        b, h, t, _ = s.shape
        return functional.pad(s, (1, 0)).reshape(b, h, t + 1, t)[:, :, :-1]


class ColumnBehind(Shifted):
    def shifted(self, s: Tensor) -> Tensor:
        b, h, t, _ = s.shape
        return functional.pad(s, (0, 1)).reshape(b, h, t + 1, t)[:, :, 1:]


class NotShifted(Shifted):
    """Columns are places, counted from the end of the text."""

    def shifted(self, s: Tensor) -> Tensor:
        return s


class SinesOfTheLength(ProjectedSines):
    """Distances are counted in lengths of the text."""

    def places(self, t: int) -> Tensor:
        return super().places(t) / t


class SinesFromTheFront(ProjectedSines):
    """The first vector is that of distance 0."""

    def places(self, t: int) -> Tensor:
        return torch.arange(t).float()


class QueriesShifted(TokensFirst):
    """The rows are shifted, not the columns."""

    def shifted(self, s: Tensor) -> Tensor:
        return super().shifted(s.transpose(0, 1)).transpose(0, 1)


class HeadsShifted(TokensFirst):
    """Columns and heads are laid out anew."""

    def shifted(self, s: Tensor) -> Tensor:
        i, j, b, n = s.shape
        return torch.cat([torch.zeros(1, j, b, n), s], 0).view(i + 1, j, b, n)[1:].view_as(s)


class SeesOneMore(Shifted):
    """A look ahead by one, where the term is something of the next query's."""

    def weighted(self, scores: Tensor) -> Tensor:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(2)
        return scores.masked_fill(future, -math.inf).softmax(-1)


REFUSED: tuple[type[Clipped], ...] = (
    ReadAtTheQuery,
    ReadAtTwice,
    OfTheKeys,
    FromTheFront,
    ShiftedByOneMore,
    ColumnBehind,
    NotShifted,
    SinesOfTheLength,
    SinesFromTheFront,
    QueriesShifted,
    HeadsShifted,
    SeesOneMore,
)
