"""Exact or refused: decoders of kinds that the grammar does not have, written to be converted wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from composed import VOCAB
from modules import CONTEXT, DIM, Tiny
from oracles import EAGER, assert_decodes
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec

INF = float("inf")
Index = Callable[[Tensor, Tensor], Tensor]

MASKS: dict[str, Index] = {
    "floor of a negative gap": lambda q, k: (q - k) // 3 >= 0,
    "floored on both sides": lambda q, k: (q + 1) // 2 >= (k + 1) // 2,
    "a window in blocks": lambda q, k: (k <= q) & ((q - k) // 4 < 2),
    "blocks by xor": lambda q, k: (k <= q) & ((q ^ k) < 8),
    "a late prefix": lambda q, k: (k <= q) | ((k < 45) & (q >= 40) & (q < 45)),
    "first tokens and a window": lambda q, k: (k <= q) & ((k < 4) | (q - k < 8)),
    "from the end": lambda q, k: ((k - q.shape[0] + 1) * 0.3).expand(len(q), -1).masked_fill(k > q, -INF),
    "an odd offset": lambda q, k: ((k - q - 3).abs() * -0.37).masked_fill(k > q, -INF),
    "a kink of the distance": lambda q, k: ((q - k - 20).abs() * -0.37).masked_fill(k > q, -INF),
    "a bias of the key": lambda q, k: k.float().sin().expand(len(q), -1).masked_fill(k > q, -INF),
}


class Masked(Tiny):
    layers = 1

    def __init__(self, index: Index) -> None:
        super().__init__()
        self.index = index

    def mask(self, tokens: int) -> Tensor:
        steps = torch.arange(tokens)
        return self.index(steps[:, None], steps[None])


class Holed(Tiny):
    """A causal mask in a buffer, but for one place."""

    def setup(self) -> None:
        self.register_buffer("seen", torch.ones(CONTEXT, CONTEXT).tril().bool())
        self.seen[50, 20] = False

    def mask(self, tokens: int) -> Tensor:
        return self.seen[:tokens, :tokens]


class OddPosition(Tiny):
    """Positions in a buffer, of which one is out of order."""

    def setup(self) -> None:
        self.register_buffer("places", torch.arange(CONTEXT))
        self.places[40] = 3

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(self.places[: ids.shape[1]])


class Stretched(Tiny):
    """Positions are stretched once a long prompt was seen."""

    def setup(self) -> None:
        self.longest, self.step = 20, 0.01

    def positions(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.longest:
            self.longest, self.step = ids.shape[1], 0.02
        return torch.arange(ids.shape[1])[:, None] * torch.ones(DIM) * self.step


class Hashed(Tiny):
    def start(self, ids: Tensor) -> Tensor:
        return self.embed((ids * 1000003 + torch.arange(ids.shape[1]) * 7) % VOCAB)


class FirstDoubled(Tiny):
    def finish(self, x: Tensor) -> Any:
        x = x.clone()
        x[:, 0] *= 2
        return self.head(x)


class ByStride(Tiny):
    def finish(self, x: Tensor) -> Any:
        return self.head(x * (1 + x.stride(0) * 1e-3))


class HalfPositions(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return (torch.arange(ids.shape[1]).to(torch.bfloat16) * 1.01).float()[:, None] * self.wpe.weight[0]


class Counted(Tiny):
    """A default argument that remembers."""

    def finish(self, x: Tensor, calls: list[int] = [0]) -> Any:  # noqa: B006
        calls[0] += 1
        return self.head(x) * (1 if calls[0] < 9 else 2)


class CutAfterSoftmax(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights * torch.ones_like(weights).tril() @ v


DECODERS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda index=index: Masked(index) for name, index in MASKS.items()},  # type: ignore[misc]
    **{
        cls.__name__: cls
        for cls in (
            Holed,
            OddPosition,
            Stretched,
            Hashed,
            FirstDoubled,
            ByStride,
            HalfPositions,
            Counted,
            CutAfterSoftmax,
        )
    },
}


@pytest.mark.family
@pytest.mark.parametrize("name", DECODERS)
def test_exact_or_refused(name: str) -> None:
    torch.manual_seed(0)
    model = spread(DECODERS[name]()).eval()
    try:
        program = treespec.tree_program(model, options=EAGER)
        for prompt in (7, 48):
            assert_decodes(
                model, program, VOCAB, rounds=1, size=6, prompt=min(prompt, (program.max_context or 64) - 12)
            )
    except treespec.Unsupported:
        pass
