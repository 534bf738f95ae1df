"""Small decoders in the styles of well-known repositories, written from their descriptions. [1, T, V] of ids [1, T]."""

from __future__ import annotations

import math
from typing import Any

import torch
from decoders import HEAD, Style
from modules import CONTEXT, DIM, HEADS, VOCAB
from torch import Tensor, nn
from torch.nn import functional as F


class ComplexRope(Style):
    """llama: rope by complex numbers, no table of positions."""

    def setup(self) -> None:
        angles = torch.outer(torch.arange(CONTEXT), 1e4 ** -(torch.arange(0, HEAD, 2) / HEAD))
        self.freqs = torch.polar(torch.ones_like(angles), angles)

    def positions(self, ids: Tensor) -> Tensor:
        return torch.zeros(())

    def turn(self, x: Tensor) -> Tensor:
        y = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(y * self.freqs[: x.shape[2]]).flatten(3).type_as(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(self.turn(q), self.turn(k), v, layer)


class PartialRopeInterleaved(ComplexRope):
    """GPT-J: pairs side by side, half of a head alone, parallel blocks."""

    def turn(self, x: Tensor) -> Tensor:
        turned, kept = x[..., : HEAD // 2], x[..., HEAD // 2 :]
        steps = torch.arange(x.shape[2], device=x.device)[:, None] * torch.ones(1) * 0.3
        cos, sin = (f(steps).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        return torch.cat([turned * cos + other * sin, kept], -1)

    def block(self, x: Tensor, layer: int) -> Tensor:
        y = self.norms[layer](x)
        return super().block(x, layer) + F.gelu(y, approximate="tanh")


class XPos(ComplexRope):
    """xPos: rotated queries and keys that grow and shrink with their places."""

    def turn(self, x: Tensor, sign: int = 1) -> Tensor:
        place = torch.arange(x.shape[2])
        scale = torch.tensor([0.9, 0.95]).repeat(2) ** (sign * place[:, None] / 8)
        angle = (place[:, None] * torch.tensor([0.4, 0.1])).repeat(1, 2)
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return (x * angle.cos() + half * angle.sin()) * scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return Style.attend(self, self.turn(q), self.turn(k, -1), v, layer)


class ClippedPositions(ComplexRope):
    """ChatGLM: a place that ends with the prompt, and one that counts what follows it, each turns a half of a head."""

    def turn(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[2]).clamp(max=x.shape[2] - 1)
        return torch.cat([self.by(x[..., :2], place.clamp(max=5)), self.by(x[..., 2:], (place - 5).clamp(min=0))], -1)

    def by(self, x: Tensor, place: Tensor) -> Tensor:
        angle = place[:, None] * torch.tensor([0.7, 0.7])
        return x * angle.cos() + torch.cat([-x[..., 1:], x[..., :1]], -1) * angle.sin()


class ClippedTable(Style):
    """Learned positions of which the last one goes on, and another table that begins anew."""

    def setup(self) -> None:
        self.rounds = nn.Embedding(7, DIM)

    def positions(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        return self.wpe(place.clamp(max=6)) + self.rounds(place % 7)


class DeepNorm(Style):
    """Post-norm with a factor on the residual; GLU feed-forward."""

    def setup(self) -> None:
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(2 * DIM, DIM)

    def block(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = (self.split(p) for p in self.qkv[layer](x).chunk(3, -1))
        x = self.norms[layer](1.3 * x + self.out[layer](self.join(self.attend(q, k, v, layer))))
        return F.layer_norm(1.3 * x + self.down(F.glu(self.up(x), -1)), (DIM,))


class Universal(Style):
    """One layer three times, with an embedding of the round."""

    def setup(self) -> None:
        self.rounds = nn.Embedding(3, DIM)

    def block(self, x: Tensor, layer: int) -> Tensor:
        for i in range(3):
            x = super().block(x + self.rounds(torch.tensor(i)), layer)
        return x


class ValueResidual(Style):
    """Values of the first layer are mixed into later ones; logits capped; weights tied by F.linear."""

    layers = 2

    def forward(self, ids: Tensor) -> Any:
        x, first = self.start(ids), None
        for layer in range(self.layers):
            q, k, v = (self.split(p) for p in self.qkv[layer](self.norms[layer](x)).chunk(3, -1))
            first = v if first is None else first
            x = x + self.out[layer](
                self.join(self.attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), 0.7 * v + 0.3 * first, layer))
            )
        return 8 * torch.tanh(F.linear(x, self.embed.weight) / 8)


class SkipsOverLayers(Style):
    """A U-net of layers: a stack of earlier states."""

    layers = 4

    def forward(self, ids: Tensor) -> Any:
        x, stack = self.start(ids), []
        for layer in range(self.layers):
            if layer < 2:
                stack.append(x)
            else:
                x = x + 0.5 * stack.pop()
            x = self.block(x, layer)
        return self.head(x)


class LowRank(ComplexRope):
    """Latent keys and values of low rank, with a shared rotated part."""

    def setup(self) -> None:
        super().setup()
        self.down, self.up, self.rope_key = nn.Linear(DIM, 6), nn.Linear(6, 2 * DIM), nn.Linear(DIM, HEAD)

    def block(self, x: Tensor, layer: int) -> Tensor:
        y = self.norms[layer](x)
        q = self.split(self.qkv[layer](y)[..., :DIM])
        k, v = (self.split(p) for p in self.up(F.rms_norm(self.down(y), (6,))).chunk(2, -1))
        shared = self.turn(self.rope_key(y).unsqueeze(1)).expand(-1, HEADS, -1, -1)
        q, k = torch.cat([q, self.turn(q)], -1), torch.cat([k, shared], -1)
        return x + self.out[layer](self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Clones(nn.Module):
    """The annotated transformer: an encoder-like stack with a subsequent mask of bytes, -1e9, log_softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.lut, self.heads = nn.Embedding(VOCAB, DIM), nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        place, scale = torch.arange(CONTEXT)[:, None], torch.exp(torch.arange(0, DIM, 2) * -(math.log(1e4) / DIM))
        table = torch.zeros(CONTEXT, DIM)
        table[:, 0::2], table[:, 1::2] = (place * scale).sin(), (place * scale).cos()
        self.register_buffer("pe", table.unsqueeze(0))
        self.a, self.b = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))
        self.proj = nn.Linear(DIM, VOCAB)
        self.eval()

    def norm(self, x: Tensor) -> Tensor:
        return self.a * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.triu(torch.ones((1, ids.shape[1], ids.shape[1])), diagonal=1).type(torch.uint8) == 0
        x = self.lut(ids) * math.sqrt(DIM)
        x = x + self.pe[:, : x.size(1)].requires_grad_(False)
        y, batch = self.norm(x), ids.shape[0]
        q, k, v = (f(y).view(batch, -1, HEADS, HEAD).transpose(1, 2) for f in list(self.heads)[:3])
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HEAD)
        p = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9).softmax(dim=-1)
        y = torch.matmul(p, v).transpose(1, 2).contiguous().view(batch, -1, HEADS * HEAD)
        return F.log_softmax(self.proj(self.norm(x + self.heads[3](y))), dim=-1)


class TopOne(Style):
    """Switch: the best expert of a token, by one_hot and einsum."""

    def setup(self) -> None:
        self.gate, self.experts = nn.Linear(DIM, 3), nn.Parameter(torch.randn(3, DIM, DIM))

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = super().block(x, layer)
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        hot = F.one_hot(chosen, 3).to(x.dtype) * weight[..., None]
        return x + torch.einsum("bte,btd,edf->btf", hot, x, self.experts)


class HashRouted(Style):
    """Experts chosen by the token id."""

    def setup(self) -> None:
        self.experts = nn.Parameter(torch.randn(4, DIM, DIM))

    def forward(self, ids: Tensor) -> Any:
        x = self.block(self.start(ids), 0)
        return self.head(x + torch.einsum("btd,btdf->btf", x, self.experts[ids % 4]))


class Adapters(Style):
    """LoRA beside a linear, and a gate that starts at zero; layers in a ModuleDict."""

    def setup(self) -> None:
        self.parts = nn.ModuleDict({"a": nn.Linear(DIM, 2, bias=False), "b": nn.Linear(2, DIM, bias=False)})
        self.gate = nn.Parameter(torch.tensor([0.4]))

    def block(self, x: Tensor, layer: int) -> Tensor:
        return super().block(x, layer) + self.gate.tanh() * self.parts["b"](self.parts["a"](x)) * (16 / 2)


CONVERTED: tuple[type[nn.Module], ...] = (
    ComplexRope,
    PartialRopeInterleaved,
    XPos,
    ClippedPositions,
    ClippedTable,
    DeepNorm,
    Universal,
    ValueResidual,
    SkipsOverLayers,
    LowRank,
    Clones,
    TopOne,
    HashRouted,
    Adapters,
)


class ExpertChoice(Style):
    """Experts choose tokens: who is chosen depends on later ones."""

    def setup(self) -> None:
        self.gate, self.expert = nn.Linear(DIM, 1), nn.Linear(DIM, DIM)

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = super().block(x, layer)
        weight, chosen = self.gate(x).squeeze(-1).topk(2, dim=1)
        rows = chosen[..., None].expand(-1, -1, DIM)
        return x.scatter_add(1, rows, self.expert(x.gather(1, rows)) * weight[..., None])


class MixtureOfDepths(ExpertChoice):
    """Tokens above a quantile of all."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        score = self.gate(x)
        return x + torch.where(
            score > score.mean(1, keepdim=True), Style.block(self, x, layer) - x, torch.zeros_like(x)
        )


REFUSED: tuple[type[nn.Module], ...] = (ExpertChoice, MixtureOfDepths)
