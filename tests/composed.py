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
    "first and near": lambda q, k: (k <= q) & ((k < 2) | (q - k < 6)),
    "xor": lambda q, k: (k <= q) & ((q ^ k) < 8),
    "floored": lambda q, k: (q - k) // 3 >= 0,
    "product": lambda q, k: (k <= q).float() * (q - k < 7).float() > 0.5,
    "sign": lambda q, k: torch.sign(q - k + 0.5) > 0,
    "of half": lambda q, k: k.half() <= q.half(),
    "overcome": lambda q, k: (k > q) * -1e4 + (k % 3) * 9e3,
    "kink": lambda q, k: ((q - k - 20).abs() * -0.37).masked_fill(k > q, -INF),
    "in turn": lambda q, k: (k <= q) & ((q % 2 == 0) | (q - k < 4)),
    "of keys": lambda q, k: k.float().sin().expand(len(q), -1).masked_fill(k > q, -INF),
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
    "int8": lambda n: torch.arange(n).to(torch.int8).long() % 32,
    "bfloat16": lambda n: torch.arange(n, dtype=torch.bfloat16).long(),
    "turns": lambda n: torch.arange(n) % 32,
    "logarithm": lambda n: torch.arange(1, n + 1).float().log2().long(),
    "from the end": lambda n: n - 1 - torch.arange(n),
    "triangle": lambda n: torch.ones(n, n, dtype=torch.int64).tril().sum(-1) - 1,
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
    "unsorted": lambda m, x: x + m.unsorted(x, cut=False),
    "capacity": lambda m, x: x + m.unsorted(x, cut=True),
    "gathered by place": lambda m, x: x + m.wpe.weight.gather(0, _places(x).expand(-1, DIM))[None],
    "last row": lambda m, x: x + m.wpe.weight[x.shape[1] - 1],
    "logarithm": lambda m, x: x * torch.arange(1, x.shape[1] + 1).float().log1p()[:, None],
    "median": lambda m, x: x - x.median(1, keepdim=True).values,
    "filled": lambda m, x: x * m.filled(x.shape[1], grown=False),
    "grown": lambda m, x: x * m.filled(x.shape[1], grown=True),
    "kept": lambda m, x: m.keeps(x),
    "experts": lambda m, x: m.experts(x),
    "flipped twice": lambda m, x: (x.flip(1) * 1.5).flip(1),
    "picked": lambda m, x: x.masked_fill((x[..., :1] > 0) & (_places(x) > 20), 0.5),
    "transposed norm": lambda m, x: nn.functional.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2),
    "scattered": lambda m, x: torch.zeros_like(x).scatter_(1, _places(x).expand(-1, DIM)[None], x),
}


def _places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None]  # [T, 1]


SOFTMAXES = (
    "sdpa",
    "eager",
    "shifted",
    "rounded",
    "half weights",
    "written out",
    "by all",
    "scaled by n",
    "thrown out",
)


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
        self.table: Tensor | None = None
        self.last: Tensor | None = None
        self.odd = parts.positions == "count"

    def cast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + (x @ self.qkv[0].weight[:DIM]).float()

    def counted(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1.0 if self.calls < 6 else 2.0)

    def unsorted(self, x: Tensor, cut: bool) -> Tensor:
        """Rows in the order of a feature, changed, and put back; `cut`: only the first of them."""
        order = x[0, :, 0].argsort()
        rows = x[0, order] * self.wpe.weight[1]
        if cut:
            rows = rows * (_places(x) < 30)
        return rows[order.argsort()][None] * 0.1

    def filled(self, tokens: int, grown: bool) -> Tensor:
        """A table made once, for all or for the longest text so far; the latter of what it grew for."""
        if self.table is None or (grown and self.table.shape[0] < tokens):
            size = tokens if grown else 512
            self.table = (torch.arange(size)[:, None] / (size if grown and self.odd else 512)).cos()
        return self.table[:tokens]

    def keeps(self, x: Tensor) -> Tensor:
        """What an earlier call left is seen by the next one."""
        before, self.last = self.last, x.detach().mean()
        return x if before is None else x * (1 + before)

    def experts(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x[0])
        for i, expert in enumerate(self.qkv[0].weight.chunk(3)):
            rows = (x[0, :, :3].argmax(-1) == i).nonzero()[:, 0]
            out.index_add_(0, rows, x[0, rows] @ expert)
        return x + out[None] * 0.3

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
        if kind == "scaled by n":
            scores = scores * (torch.arange(q.shape[2]) + 2.0).log()[:, None]
        if kind == "written out":
            powers = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = powers / powers.sum(-1, keepdim=True)
        elif kind == "by all":
            powers = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = powers / powers.sum((-2, -1), keepdim=True)
        else:
            weights = scores.softmax(-1)
        if kind == "thrown out":
            weights = weights.masked_fill(weights < 0.05, 0.0)
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
