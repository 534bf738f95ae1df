"""Decoders whose loops over tokens read what stands elsewhere: what is kept by length, globals, closures, settings."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lengths import Length
from modules import DIM, Tiny
from torch import Tensor
from torch.nn import functional


class KeptByLength(Length):
    def setup(self) -> None:
        self.masks: dict[Any, Tensor] = {}

    def mask(self, tokens: int) -> Tensor:
        key = f"{tokens}-causal"
        if key not in self.masks:
            self.masks[key] = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return self.masks[key]


KEPT: dict[int, Tensor] = {}


class KeptInAGlobal(Length):
    def mask(self, tokens: int) -> Tensor:
        m = KEPT.get(tokens)
        if m is None:
            m = torch.full((tokens, tokens), float("-inf")).triu(1)
            KEPT[tokens] = m
        return m


class Raises:
    """An object of the module's that raises another error than `AttributeError`."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


RAISES = Raises()


REACH = 5


@functools.cache
def looped(tokens: int) -> Tensor:
    m = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        m[i, max(0, i - REACH) : i + 1] = True
    return m


class CachedLoop(Length):
    def mask(self, tokens: int) -> Tensor:
        return looped(tokens)


REACHES = [4]


def listed(tokens: int) -> Tensor:
    m = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        m[i, max(0, i - REACHES[0]) : i + 1] = True
    return m


class ListedLoop(Length):
    def mask(self, tokens: int) -> Tensor:
        return listed(tokens)


class Settings:
    reach = 4


SETTINGS = Settings()


class SettingsLoop(Length):
    def mask(self, tokens: int) -> Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, max(0, i - SETTINGS.reach) : i + 1] = True
        return m


class FunctionInAnAttribute(Length):
    def setup(self) -> None:
        self.reach = lambda: 3

    def mask(self, tokens: int) -> Tensor:
        reach = self.reach
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, max(0, i - reach()) : i + 1] = True
        return m


class OtherInEachLayer(Tiny):
    """The same lines with other functions."""

    layers = 2

    def setup(self) -> None:
        self.reaches = [lambda: 3, lambda: 6]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        reach, t = self.reaches[layer], q.shape[2]
        m = torch.zeros(t, t, dtype=torch.bool)
        for i in range(t):
            m[i, max(0, i - reach()) : i + 1] = True
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=m)


def held_in_a_closure() -> Length:
    """A class inside a function, which keeps positions in a dict around it; an inner function fills its mask."""
    table: dict[int, Tensor] = {}

    def rows(tokens: int) -> Tensor:
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        for i in range(tokens):
            seen[i, : max(0, i - 3)] = False
        return seen

    class HeldInAClosure(Length):
        kept = table

        def positions(self, ids: Tensor) -> Tensor:
            t = ids.shape[1]
            if t not in table:
                table[t] = torch.arange(t) / 10
            return table[t][:, None] * torch.linspace(-1, 1, DIM)

        def mask(self, tokens: int) -> Tensor:
            return rows(tokens)

    return HeldInAClosure()


CONVERTED: tuple[type[Length], ...] = (
    KeptByLength,
    KeptInAGlobal,
    CachedLoop,
)
