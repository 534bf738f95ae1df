"""Masks: causal ones in disguise are exact; what is not causal, or another function of the length, is refused."""

from __future__ import annotations

import torch
from modules import CONTEXT, DIM, VOCAB, Tiny
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from verdicts import Verdicts

CASES = Verdicts()
converts, refused = CASES.converts, CASES.refused


def _indices(tokens: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(tokens)
    return steps[:, None], steps[None, :]


@converts
class Difference(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return q - k >= 0


@converts
class NotLater(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return ~(k > q)


@converts
class Additive(Tiny):
    def mask(self, tokens: int) -> Tensor:
        return (1 - torch.tril(torch.ones(tokens, tokens))) * -1e9


@converts
class TriuInfinity(Tiny):
    def mask(self, tokens: int) -> Tensor:
        return torch.triu(torch.full((tokens, tokens), float("-inf")), 1)[None, None]


@converts
class WhereInfinity(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return torch.where(k <= q, 0.0, float("-inf"))


@converts
class FloatBuffer(Tiny):
    def setup(self) -> None:
        self.register_buffer("bias", torch.triu(torch.full((1, 1, CONTEXT, CONTEXT), -1e30), 1))

    def mask(self, tokens: int) -> Tensor:
        return self.bias[:, :, :tokens, :tokens]


@converts
class WindowOfTheWholeBuffer(Tiny):
    """The window is as wide as the buffer: within the buffer it is causal, and the context ends with it."""

    def setup(self) -> None:
        seen = torch.tril(torch.ones(48, 48)) * torch.triu(torch.ones(48, 48), -47)
        self.register_buffer("seen", seen.bool())

    def mask(self, tokens: int) -> Tensor:
        return self.seen[:tokens, :tokens]


@converts
class BandBuffer(Tiny):
    """Wider than the trace is long: the window shows only in the buffer's far corner."""

    def setup(self) -> None:
        seen = torch.tril(torch.ones(CONTEXT, CONTEXT)) * torch.triu(torch.ones(CONTEXT, CONTEXT), -19)
        self.register_buffer("seen", seen.bool())

    def mask(self, tokens: int) -> Tensor:
        return self.seen[:tokens, :tokens]


@converts
class TwoMasks(Tiny):
    """A window in the first layer, causal in the second."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        i, j = _indices(q.shape[2])
        seen = (j <= i) & (i - j < 3) if layer == 0 else j <= i
        return scaled_dot_product_attention(q, k, v, seen)


@converts
class WindowAsTwoLines(Tiny):
    def mask(self, tokens: int) -> Tensor:
        ones = torch.ones(tokens, tokens, dtype=torch.bool)
        return ones.tril() & ~ones.tril(-5)


@refused("off-by-one")
class Strict(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k < q) | ((q == 0) & (k == 0)) if False else k < q


@refused("1 later token")
class OneFuture(Tiny):
    def mask(self, tokens: int) -> Tensor:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril(1)


@converts
class FirstTokenAlwaysSeen(Tiny):
    """An attention sink: a window plus token 0."""

    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & ((q - k < 3) | (k == 0))


@converts
class Dilated(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & (q - k != 2)


@refused("later token")
class Reversed(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return k >= q


@refused("")
class PrefixLM(Tiny):
    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) | (k < 4)


@refused("content of the tokens")
class HiddenByContent(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        self_mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen = self_mask & (self.embed(ids)[..., 0] > 0)[:, None, :]
        x = self.start(ids)
        q, k, v = (self.split(p) for p in self.qkv[0](x).chunk(3, -1))
        return self.finish(x + self.join(scaled_dot_product_attention(q, k, v, seen[:, None])))


@refused("")
class FlippedBuffer(Tiny):
    """The lower right corner of a buffer, anchored at its end."""

    def setup(self) -> None:
        self.register_buffer("seen", torch.ones(CONTEXT, CONTEXT).triu().flip(1).bool())

    def mask(self, tokens: int) -> Tensor:
        return self.seen[CONTEXT - tokens :, :tokens]


@refused("")
class BranchOnLength(Tiny):
    """Windowed only for prompts longer than the trace."""

    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        return (k <= q) & (q - k < 6) if tokens > 30 else k <= q


@refused("")
class BranchBeyondABranch(Tiny):
    """The first other side is the same program; the one behind it is not."""

    def mask(self, tokens: int) -> Tensor:
        q, k = _indices(tokens)
        if tokens < 20:
            return k <= q
        if tokens < 50:
            return k <= q
        return (k <= q) & (q - k < 6)


@refused("does something else")
class OtherWeights(Tiny):
    """Both sides are op for op the same; the weights differ."""

    def setup(self) -> None:
        self.long = nn.Linear(DIM, VOCAB, bias=False)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) if x.shape[1] < 24 else self.long(x)


@refused("one token")
class OneTokenBranch(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) * 2 if x.shape[1] == 1 else self.head(x)


test_converts_exactly, test_is_refused = CASES.tests()
