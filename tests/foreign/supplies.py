"""Decoders that are given more than token ids: masks, positions, tables that their caller makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from modules import DIM, Tiny
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


class Called(nn.Module):
    """The model as a function of ids alone."""

    def __init__(self, model: nn.Module, arguments: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, ids: Tensor) -> Any:
        made = self.arguments(ids)
        return self.model(**made) if isinstance(made, dict) else self.model(*made)


class Masked(Tiny):
    """The mask comes from the caller, for two layers."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        self.given = mask
        return super().forward(ids)

    def mask(self, tokens: int) -> Tensor | None:
        return self.given


class Hiding(Masked):
    """True where a key is hidden."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        assert self.given is not None
        return (q @ k.mT / 2).masked_fill(self.given, -math.inf).softmax(-1) @ v


class Placed(Tiny):
    """Positions and frequencies come from the caller."""

    def forward(self, ids: Tensor, input_pos: Tensor, freqs: Tensor | None = None) -> Any:
        x = self.embed(ids) + self.wpe(input_pos)
        x = x if freqs is None else x + freqs.sin()
        for layer in range(self.layers):
            x = self.block(x, layer)
        return self.finish(x)


FREQS = torch.arange(50)[:, None] * torch.linspace(0.1, 1, DIM)


def seen(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()


def added(ids: Tensor) -> dict[str, Tensor]:
    t = ids.shape[1]
    return {"ids": ids, "mask": torch.full((1, 1, t, t), -1e9).triu(1)}


def hidden(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)


def counted(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.arange(ids.shape[1])


def placed(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.arange(ids.shape[1])[None], FREQS[: ids.shape[1]]


def everything(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)


def banded(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().triu(-3)


class Blocked(Masked):
    """A BlockMask for flex_attention, set as an attribute."""

    layers = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return flex_attention(q, k, v, block_mask=self.given)


def blocks(ids: Tensor) -> tuple[Tensor, Any]:
    t = ids.shape[1]
    return ids, create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 5), None, None, t, t, device="cpu")


def blocks_ahead(ids: Tensor) -> dict[str, Any]:
    t = ids.shape[1]
    made = create_block_mask(lambda b, h, q, k: q >= k - 1, None, None, t, t, device="cpu")
    return {"ids": ids, "mask": made}


BY_EXAMPLE = ((Masked, seen), (Masked, added), (Hiding, hidden), (Placed, counted))
BY_FUNCTION = (*BY_EXAMPLE, (Placed, placed), (Masked, banded))
