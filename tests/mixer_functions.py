"""Functions that mix tokens, as users write them in their own files, and decoders that call them by name."""

from __future__ import annotations

import torch
from modules import DIM, HEADS, Tiny
from torch import Tensor, nn


def fading_sums(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """[1, T, H, D] of q, k, v and [1, T, H] of logarithms: what came before, faded, by one matrix of T x T."""
    total = decay.cumsum(1).transpose(1, 2)  # [1, H, T]
    fade = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    weights = torch.einsum("bihd,bjhd->bhij", q, k) * fade
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def fading_sums_as_recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    import torch

    return torch.ops.treespec.recurrence(q, k, v, decay, None)


def restarted_sums(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, restart: Tensor) -> Tensor:
    """As `fading_sums`, and nothing before a token is seen from it on where `restart` [1, T] says so."""
    group = restart.long().cumsum(1)
    same = (group[:, :, None] == group[:, None, :])[:, None]
    total = decay.cumsum(1).transpose(1, 2)
    fade = (total[..., :, None] - total[..., None, :]).tril().exp().tril() * same
    weights = torch.einsum("bihd,bjhd->bhij", q, k) * fade
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def restarted_sums_as_recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, restart: Tensor) -> Tensor:
    import torch

    faded = decay.masked_fill(restart[..., None], -torch.inf)
    return torch.ops.treespec.recurrence(q, k, v, faded, None)


def sums_by_length(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """What is said to be `fading_sums`, and fades more slowly in longer texts."""
    return fading_sums(q, k, v, decay * 8 / (q.shape[1] + 8))


def sums_of_both_sides(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """What is said to be `fading_sums`, and sees the next token."""
    return fading_sums(q, k, v, decay) + 0.1 * torch.cat([v[:, 1:], v[:, -1:]], 1)


class Mixed(Tiny):
    """A block of fading sums in front of each attention."""

    def setup(self) -> None:
        self.mix = nn.ModuleList(nn.Linear(DIM, 3 * DIM + HEADS) for _ in range(self.layers))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, ids: Tensor) -> Tensor:
        return fading_sums(q, k, v, decay)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        for layer in range(self.layers):
            q, k, v, gate = self.mix[layer](x).split([DIM, DIM, DIM, HEADS], -1)
            q, k, v = (p.unflatten(-1, (HEADS, -1)) for p in (q, k, v))
            mixed = self.mixed(q, k, v, nn.functional.logsigmoid(gate), ids)
            x = self.block(x + mixed.flatten(2), layer)
        return self.finish(x)


class ByMethod(Mixed):
    """The sums are a method of the module's."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, ids: Tensor) -> Tensor:
        return self.sums(q, k, v, decay)

    def sums(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        total = decay.cumsum(1).transpose(1, 2)
        fade = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k) * fade, v)


def sums_as_recurrence(self: ByMethod, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    import torch

    return torch.ops.treespec.recurrence(q, k, v, decay, None)


class Restarted(Mixed):
    """Token 3 ends a text: the state begins anew."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, ids: Tensor) -> Tensor:
        return restarted_sums(q, k, v, decay, ids == 3)


class ByLength(Mixed):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, ids: Tensor) -> Tensor:
        return sums_by_length(q, k, v, decay)


class BothSides(Mixed):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, ids: Tensor) -> Tensor:
        return sums_of_both_sides(q, k, v, decay)
