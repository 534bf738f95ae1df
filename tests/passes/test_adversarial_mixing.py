"""Values that mix tokens outside of attention, or attend over something else than tokens, and must be refused."""

from __future__ import annotations

import torch
from modules import CONTEXT, DIM, HEADS, Tiny
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from verdicts import Verdicts

CASES = Verdicts()
converts, refused = CASES.converts, CASES.refused


@refused("not the tokens")
class AttentionOverHeads(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


@refused("")
class SoftmaxOverTokens(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.softmax(1))


@refused("")
class PooledByVector(Tiny):
    """matmul with a vector drops a dimension; the softmax that follows runs over the tokens."""

    def setup(self) -> None:
        self.vector = nn.Parameter(torch.randn(DIM))

    def finish(self, x: Tensor) -> Tensor:
        weights = (x @ self.vector).softmax(-1)
        return self.head(x * weights.view(1, -1, 1))


@refused("aten.mean")
class Centred(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(1, keepdim=True))


@refused("aten.slice")
class FirstToken(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x + x[:, :1])


@converts
class LastTokenOnly(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1:])


@refused("")
class LearnedPrefix(Tiny):
    def setup(self) -> None:
        self.prefix = nn.Parameter(torch.randn(1, 2, DIM))

    def start(self, ids: Tensor) -> Tensor:
        return torch.cat([self.prefix, super().start(ids)], 1)


@refused("aten.flip")
class Flipped(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.flip(1))


@refused("")
class NormOverTokens(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head((x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True))


@refused("aten.roll")
class RolledValues(Tiny):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return super().attend(q, k, v.roll(1, 2), layer)


@refused("")
class ShiftedTokens(Tiny):
    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids) + self.embed(pad(ids, (1, 0))[:, :-1])


@refused("")
class ConstantQueries(Tiny):
    """Queries are learned, keys are tokens: perceiver-like."""

    def setup(self) -> None:
        self.latents = nn.Parameter(torch.randn(1, HEADS, 5, DIM // HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        pooled = scaled_dot_product_attention(self.latents, k, v)
        return super().attend(q, k, v, layer) + pooled.mean(2, keepdim=True)


@refused("")
class MixingMatrix(Tiny):
    """MLP-mixer: a causal matrix over tokens."""

    def setup(self) -> None:
        self.mix = nn.Parameter(torch.randn(CONTEXT, CONTEXT).tril())

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.mix[: x.shape[1], : x.shape[1]] @ x)


@refused("")
class GramMatrix(Tiny):
    """Linear attention: every token's outer product, summed."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x @ (x.transpose(1, 2) @ x))


@refused("")
class NamelessOutput(Tiny):
    def finish(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x, "scores": self.head(x)}


test_converts_exactly, test_is_refused = CASES.tests()
