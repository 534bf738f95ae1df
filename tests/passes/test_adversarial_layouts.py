"""Layouts of tokens, heads and outputs: read as they are, or refused where they mix tokens."""

from __future__ import annotations

import torch
from modules import DIM, HEADS, VOCAB, Tiny
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from verdicts import Verdicts

CASES = Verdicts()
converts, refused = CASES.converts, CASES.refused


@converts
class TokensFirst(Tiny):
    """[T, 1, C] inside."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.transpose(0, 1)).transpose(0, 1)


@converts
class FlatTokens(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.view(-1, DIM)).view(x.shape[0], -1, VOCAB)


@converts
class Squeezed(Tiny):
    """A tree of one node must not lose its token dimension."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.squeeze()).unsqueeze(0)


@converts
class BatchNormEval(Tiny):
    def setup(self) -> None:
        self.norm = nn.BatchNorm1d(DIM)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


@converts
class TwoCalls(Tiny):
    """One attention module, two sites: each needs K/V of its own."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        return super().block(super().block(x, 0), 0)


@converts
class SwappedQueryAndKey(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(k, q, v, layer)


@converts
class SharedKeys(Tiny):
    """The second layer attends to the first one's keys and values."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        q, k, v = (self.split(p) for p in self.qkv[0](x).chunk(3, -1))
        x = x + self.join(super().attend(q, k, v, 0))
        q = self.split(self.qkv[1](x)[..., :DIM])
        return self.finish(x + self.join(super().attend(q, k, v, 1)))


@converts
class TiledHeads(Tiny):
    """`repeat` orders heads 0 1 0 1, `repeat_interleave` 0 0 1 1."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat(1, 2, 1, 1), layer)


@converts
class InterleavedHeads(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1), layer)


@converts
class ExpandedHeads(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        def wide(x: Tensor) -> Tensor:
            return x[:, :2, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)

        return super().attend(q, wide(k), wide(v), layer)


@converts
class OnlyKeysRepeated(Tiny):
    """Keys are shared by two heads in one way, values in the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat(1, 2, 1, 1), layer)


@converts
class OneKeyHead(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)


@converts
class DictOutput(Tiny):
    def finish(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x, "logits": self.head(x)}


@converts
class Double(Tiny):
    def setup(self) -> None:
        self.double()


@converts
class TableByProduct(Tiny):
    """Rope-like angles from an outer product, computed in the graph."""

    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1], dtype=torch.float32)
        return torch.outer(steps, 0.3 ** torch.arange(DIM)).cos()


@converts
class SoftmaxOverFeatures(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * x.softmax(-1)).log_softmax(-1)


@refused("aten.reshape mixes tokens")
class ViewedHeads(Tiny):
    """[1, T, C].view(1, H, T, D) without a transpose mixes tokens into heads."""

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], HEADS, x.shape[1], -1)


@refused("aten.reshape mixes tokens")
class JoinedWithoutTranspose(Tiny):
    def join(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[2], -1)


test_converts_exactly, test_is_refused = CASES.tests()
