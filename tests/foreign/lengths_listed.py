"""Decoders that read a table of positions by a Python list or range of places."""

from __future__ import annotations

import math
from typing import Any

import torch
from modules import CONTEXT, DIM, VOCAB, Tiny
from torch import Tensor, nn


class Listed(Tiny):
    layers = 1

    def setup(self) -> None:
        self.places = nn.Parameter(torch.randn(CONTEXT, DIM))


class ByRange(Listed):
    def positions(self, ids: Tensor) -> Tensor:
        return self.places[range(ids.shape[1])]


class ByListOfRange(Listed):
    def positions(self, ids: Tensor) -> Tensor:
        return self.places[list(range(len(ids[0])))]


class ByComprehension(Listed):
    def positions(self, ids: Tensor) -> Tensor:
        return self.places[None, [i for i in range(ids.size(1))]]  # noqa: C416


class ByNamedList(Listed):
    def positions(self, ids: Tensor) -> Tensor:
        where = [*range(ids.shape[1])]
        return self.places[where]


class PlainFunctions(nn.Module):
    """A decoder of [T] ids as one writes it in NumPy: joined heads, no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = (nn.Parameter(torch.randn(n, DIM)) for n in (VOCAB, CONTEXT))
        self.w, self.o = nn.Parameter(torch.randn(DIM, 3 * DIM)), nn.Parameter(torch.randn(DIM, DIM))
        self.eval()

    def forward(self, ids: Tensor) -> Any:
        ids = ids[0]
        x = self.wte[ids] + self.wpe[range(len(ids))]
        heads = [list(torch.split(part, 4, -1)) for part in torch.split(x @ self.w, DIM, -1)]
        later = (1 - torch.tril(torch.ones(len(ids), len(ids)))) * -1e10
        outs = []
        for q, k, v in zip(*heads, strict=True):
            s = q @ k.T / math.sqrt(4) + later
            e = torch.exp(s - torch.max(s, -1, keepdim=True)[0])
            outs.append(e / torch.sum(e, -1, keepdim=True) @ v)
        return ((x + torch.hstack(outs) @ self.o) @ self.wte.T)[None]


class ListedBackwards(Listed):
    """The last token is at place 0."""

    def positions(self, ids: Tensor) -> Tensor:
        return self.places[range(ids.shape[1] - 1, -1, -1)]


class ListedInPairs(Listed):
    def positions(self, ids: Tensor) -> Tensor:
        return self.places[[i // 2 for i in range(ids.shape[1])]]


class ChangedList(Listed):
    """The list is turned round before it is read."""

    def positions(self, ids: Tensor) -> Tensor:
        where = list(range(ids.shape[1]))
        where.reverse()
        return self.places[where]


CONVERTED: tuple[type[nn.Module], ...] = (ByRange, ByListOfRange, ByComprehension, ByNamedList, PlainFunctions)
REFUSED: tuple[type[nn.Module], ...] = (ListedBackwards, ListedInPairs, ChangedList)
