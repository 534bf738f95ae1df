"""Decoders composed at random from a grammar of spellings: masks, positions, norms, mixers, casts, endings.

Some spellings are a causal decoder's, some mix tokens, count them or round; what a decoder made of them is, nobody
wrote down. So the test asks one thing only: exact, or refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from modules import DIM, HEADS, VOCAB, Tiny
from torch import Tensor, nn

Mask = Callable[[Tensor, Tensor], Tensor]
Step = Callable[["Composed", Tensor], Tensor]
INF = float("inf")


def _causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


MASKS: dict[str, Mask] = {
    "causal": _causal,
    "triangle": lambda q, k: torch.ones(len(q), k.shape[1], dtype=torch.bool).tril(),
    "window": lambda q, k: (k <= q) & (q - k < 5),
    "chunks": lambda q, k: (k <= q) & (q // 6 == k // 6),
    "additive": lambda q, k: torch.where(k <= q, 0.0, -INF),
    "log": lambda q, k: (k <= q).float().log(),
    "low": lambda q, k: (k > q) * -1e9,
    "alibi": lambda q, k: ((k - q) * 0.25).masked_fill(k > q, -INF),
    "offset alibi": lambda q, k: ((k - q + 512.0) * 0.11).masked_fill(k > q, -INF),
    "root": lambda q, k: torch.where(k <= q, -((q - k).clamp(min=0).float().sqrt()), -INF),
    "root in chunks": lambda q, k: torch.where(
        (k <= q) & (q // 7 == k // 7), -((q - k).clamp(min=0).float().sqrt()), -INF
    ),
    "quadratic": lambda q, k: torch.where(k <= q, 0.0, -1e9) + (q - k).float() ** 2 * 1e3,
    "int32": lambda q, k: (k.int() * 90_000_000) <= (q.int() * 90_000_000),
    "rounded": lambda q, k: (k * 0.7 / 0.7) <= (q * 0.7 / 0.7),
    "absorbed": lambda q, k: (k <= q) & ((q + 16777190.0) - (k + 16777190.0) < 4),
    "band": lambda q, k: (k <= q) & ((q - k).abs() < 5) & ((k - q).clamp(min=0) == 0),
    "even": lambda q, k: (k <= q) & ((q - k) % 2 == 0),
    "half": lambda q, k: (k <= q) & (k >= q - len(q) // 2),
    "future": lambda q, k: k <= q + 1,
    "late": lambda q, k: (k <= q) | (q > 200),
    "narrow": lambda q, k: k.to(torch.int8) <= q.to(torch.int8),
}

POSITIONS: dict[str, Callable[[int], Tensor]] = {
    "count": lambda n: torch.arange(n),
    "offset": lambda n: torch.arange(n) + 2,
    "sum": lambda n: torch.ones(n, dtype=torch.int64).cumsum(0) - 1,
    "float": lambda n: torch.arange(n).float().long(),
    "seventh": lambda n: (torch.arange(n) / 7 * 7).long(),
    "root": lambda n: (torch.arange(n).float().sqrt() ** 2).long(),
    "reversed": lambda n: torch.arange(n - 1, -1, -1),
    "clamped": lambda n: torch.arange(n).clamp(max=40),
    "half": lambda n: torch.arange(n, dtype=torch.float16).long(),
    "int16": lambda n: torch.arange(n, dtype=torch.int16).long(),
    "none": lambda n: torch.zeros(n, dtype=torch.int64),
}

STEPS: dict[str, Step] = {
    "nothing": lambda m, x: x,
    "square": lambda m, x: x + 0.1 * x * x,
    "norm": lambda m, x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(),
    "sorted features": lambda m, x: x + x.sort(-1).values * 0.1,
    "ranked features": lambda m, x: x + x.argsort(-1).argsort(-1) * 0.0,
    "gate": lambda m, x: x * m.wpe.weight[: x.shape[1]].sigmoid(),
    "gathered": lambda m, x: x + m.embed.weight[0].expand(x.shape[1], -1) * 0.1,
    "shift": lambda m, x: x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] * 0.1,
    "mean": lambda m, x: x - x.mean(1, keepdim=True),
    "running": lambda m, x: x + x.cumsum(1) * 0.01,
    "rank": lambda m, x: x * (1 + x[0, :, 0].argsort().argsort().float())[None, :, None],
    "order": lambda m, x: x + m.wpe(x[0, :, 0].argsort() % 32)[None] * 0.1,
    "length": lambda m, x: x * float(x.shape[1]),
    "short length": lambda m, x: x * torch.full((1,), x.shape[1], dtype=torch.bfloat16).float().log1p(),
    "bucket": lambda m, x: x + m.wpe(torch.full((1,), x.shape[1] // 8, dtype=torch.int16).long()),
    "features by length": lambda m, x: x + x[..., x.shape[1] // 64 : x.shape[1] // 64 + 1],
    "last": lambda m, x: x + x[:, -1:] * 0.1,
    "autocast": lambda m, x: m.cast(x),
    "bits": lambda m, x: (x.view(torch.int32) & -65536).view(torch.float32),
    "branch": lambda m, x: x * 1.5 if x.shape[1] == 1 else x,
    "long branch": lambda m, x: x * 1.5 if x.shape[1] > 100 else x,
    "counter": lambda m, x: m.counted(x),
}

SOFTMAXES = ("sdpa", "eager", "shifted", "rounded", "half weights")


@dataclass(frozen=True)
class Recipe:
    """The parts of one decoder; `str` of it names them all."""

    mask: str
    positions: str
    before: str
    after: str
    softmax: str


def recipe(rng: random.Random) -> Recipe:
    """Parts drawn at random; most are plain, so that each odd one is met alone as well."""

    def pick(kinds: list[str], plain: float) -> str:
        return kinds[0] if rng.random() < plain else rng.choice(kinds)

    return Recipe(
        pick(list(MASKS), 0.4),
        pick(list(POSITIONS), 0.6),
        pick(list(STEPS), 0.7),
        pick(list(STEPS), 0.6),
        pick(list(SOFTMAXES), 0.6),
    )


class Composed(Tiny):
    layers = 1

    def __init__(self, parts: Recipe) -> None:
        super().__init__()
        self.parts, self.calls = parts, 0

    def cast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + (x @ self.qkv[0].weight[:DIM]).float()

    def counted(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1.0 if self.calls < 6 else 2.0)

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(POSITIONS[self.parts.positions](ids.shape[1]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(q.shape[2])
        mask = MASKS[self.parts.mask](steps[:, None], steps[None, :])
        kind = self.parts.softmax
        if kind == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        bias = torch.where(mask, 0.0, -INF) if mask.dtype is torch.bool else mask
        scores = q @ k.transpose(-1, -2) / (DIM // HEADS) ** 0.5 + bias
        if kind == "shifted":
            scores = scores - scores.amax(-1, keepdim=True)
        if kind == "rounded":
            scores = scores.to(torch.bfloat16)
        weights = scores.softmax(-1)
        return weights.half().float() @ v if kind == "half weights" else weights.float() @ v

    def start(self, ids: Tensor) -> Tensor:
        return STEPS[self.parts.before](self, super().start(ids))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(STEPS[self.parts.after](self, x))


def build(parts: Recipe, seed: int) -> Composed:
    """The decoder with larger random weights than usual, so that errors show."""
    torch.manual_seed(seed)
    model = Composed(parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


__all__ = ["VOCAB", "Composed", "Recipe", "build", "recipe"]
