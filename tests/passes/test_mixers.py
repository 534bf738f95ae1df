"""Refusals name the token mixer that is in the way: its class, its layer and its op."""

from __future__ import annotations

import pytest
import torch
from modules import DIM, Tiny
from oracles import EAGER
from torch import Tensor, nn

import treespec_compiler as treespec


def refusal(model: nn.Module) -> treespec.Unsupported:
    with pytest.raises(treespec.Unsupported) as caught:
        treespec.tree_program(model.eval(), options=EAGER)
    return caught.value


class ChunkedDecay(nn.Module):
    """Sums within chunks of 16 tokens, padded at the end."""

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        padded = nn.functional.pad(x, (0, 0, 0, (16 - t % 16) % 16))
        chunks = padded.view(1, -1, 16, DIM).cumsum(2)
        return chunks.reshape(1, -1, DIM)[:, :t]


class ShortConvolution(nn.Module):
    """Of a token with its two neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Indexer(nn.Module):
    """The four earlier tokens of the largest score."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        scores = (self.score(x) @ x.transpose(1, 2))[0].masked_fill(later, -torch.inf)
        chosen = torch.zeros(t, t).scatter(-1, scores.topk(2, -1).indices, 1.0)
        return (chosen > 0) & ~later


class Hybrid(Tiny):
    """Attention, and a mixer before it."""

    mixer: type[nn.Module] = ChunkedDecay

    def setup(self) -> None:
        self.mixers = nn.ModuleList(self.mixer() for _ in range(self.layers))

    def block(self, x: Tensor, layer: int) -> Tensor:
        return super().block(x + self.mixers[layer](x), layer)


class NoAttention(Hybrid):
    def block(self, x: Tensor, layer: int) -> Tensor:
        return x + self.mixers[layer](x)


class Convolved(Hybrid):
    mixer = ShortConvolution


class Indexed(Hybrid):
    mixer = Indexer

    def block(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv[layer](x).chunk(3, -1))
        seen = self.mixers[layer](x)
        return x + self.join(nn.functional.scaled_dot_product_attention(q, k, v, seen))


class IndexedBesideSinks(Indexed):
    """Attention as it is written with sinks: one more score in the softmax, which is dropped."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv[layer](x).chunk(3, -1))
        hidden = torch.zeros(x.shape[1], x.shape[1]).masked_fill(~self.mixers[layer](x), -1e30)
        scores = q @ k.transpose(2, 3) + hidden
        sinks = torch.ones(1, q.shape[1], 1, 1).expand(-1, -1, x.shape[1], -1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        return x + self.join(weights @ v)


@pytest.mark.parametrize(
    ("cls", "module", "words"),
    [
        (Hybrid, "ChunkedDecay", "cut into chunks of 16"),
        (NoAttention, "ChunkedDecay", "no attention, and another token mixer"),
        (Convolved, "ShortConvolution", "a convolution of width 3 over the tokens"),
    ],
)
def test_the_mixer_is_named(cls: type[Hybrid], module: str, words: str) -> None:
    error = refusal(cls())
    assert error.module == module and words in error.reason
    assert error.layer is not None and error.layer.startswith("mixers.0")
    assert f"({module})" in str(error) and "test_mixers.py" in str(error.source)


@pytest.mark.parametrize("kind", [Indexed, IndexedBesideSinks])
def test_an_indexer_is_named(kind: type[Hybrid]) -> None:
    error = refusal(kind())
    assert "aten.topk" in str(error.node) and "chooses which keys are seen" in error.reason
    assert error.module == "Indexer"


def test_torchs_own_classes_name_nothing() -> None:
    """The innermost module of the convolution is `nn.Conv1d`; the mixer is the class around it."""
    error = refusal(Convolved())
    assert error.layer == "mixers.0.conv" and error.module == "ShortConvolution"
