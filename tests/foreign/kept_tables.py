"""Small decoders with tables for more places than there are tokens, and null keys. [1, T, V] of ids [1, T]."""

from __future__ import annotations

import torch
from decoders import HEAD, Style
from torch import Tensor, nn
from torch.nn import functional as F


class TablesForAtLeast(Style):
    """StableLM: tables are made at the first call, for 128 places at least, and read by position ids."""

    layers = 1

    def setup(self) -> None:
        self.register_buffer("inv", 1e4 ** -(torch.arange(0, HEAD, 2) / HEAD), persistent=False)
        self.longest = 0

    def places(self, n: int) -> Tensor:
        return torch.arange(n)

    def fill(self, n: int) -> None:
        self.longest = n
        angles = torch.einsum("i,j->ij", self.places(n), self.inv)
        both = torch.cat((angles, angles), -1)[None, None]
        self.register_buffer("cos", both.cos(), persistent=False)
        self.register_buffer("sin", both.sin(), persistent=False)

    def positions(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.longest:
            self.fill(max(ids.shape[1], 128))
        self.ids = torch.arange(ids.shape[1]).unsqueeze(0)
        return torch.zeros(())

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = (table[:, :, : x.shape[2]].squeeze(1).squeeze(0) for table in (self.cos, self.sin))
        half = torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1)
        return x * cos[self.ids].unsqueeze(1) + half * sin[self.ids].unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(self.turn(q), self.turn(k), v, layer)


class NullKeyOfAllHeads(Style):
    """One key head without a dimension of its own, a null key in front of it, and a scale that each head learned."""

    layers = 1

    def setup(self) -> None:
        self.null = nn.Parameter(torch.randn(2, HEAD))
        self.scale = nn.Parameter(torch.tensor([1.0, 1.5, 2.0, 2.5])[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (torch.cat((n.expand(1, 1, -1), x[:, 0]), -2) for n, x in zip(self.null, (k, v), strict=True))
        scores = torch.einsum("bhid,bjd->bhij", F.normalize(q, dim=-1), F.normalize(k, dim=-1)) * self.scale
        t, s = scores.shape[-2:]
        later = torch.ones((t, s), dtype=torch.bool).triu(s - t + 1)
        weights = scores.masked_fill(later, -torch.finfo(scores.dtype).max).softmax(-1)
        return torch.einsum("bhij,bjd->bhid", weights, v)


CONVERTED: tuple[type[Style], ...] = (TablesForAtLeast, NullKeyOfAllHeads)


class TablesFromTheEnd(TablesForAtLeast):
    """A longer text has another table."""

    def places(self, n: int) -> Tensor:
        return torch.arange(n).flip(0)


class TablesInLengths(TablesForAtLeast):
    def places(self, n: int) -> Tensor:
        return torch.arange(n) / n


class PicksFromTheEnd(TablesForAtLeast):
    def positions(self, ids: Tensor) -> Tensor:
        zeros = super().positions(ids)
        self.ids = torch.arange(ids.shape[1] - 1, -1, -1).unsqueeze(0)
        return zeros


class NullKeyOfTheLength(NullKeyOfAllHeads):
    """The null key is hidden from the first half of the text."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (torch.cat((n.expand(1, 1, -1), x[:, 0]), -2) for n, x in zip(self.null, (k, v), strict=True))
        scores = torch.einsum("bhid,bjd->bhij", q, k) * self.scale
        t, s = scores.shape[-2:]
        later = torch.ones((t, s), dtype=torch.bool).triu(s - t + 1)
        later = later | ((torch.arange(t) < t // 2)[:, None] & (torch.arange(s) == 0))
        weights = scores.masked_fill(later, -torch.finfo(scores.dtype).max).softmax(-1)
        return torch.einsum("bhij,bjd->bhid", weights, v)


REFUSED: tuple[type[Style], ...] = (TablesFromTheEnd, TablesInLengths, PicksFromTheEnd, NullKeyOfTheLength)
