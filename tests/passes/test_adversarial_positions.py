"""Positions: however they are counted, they follow the path; what depends on the length or wraps is refused."""

from __future__ import annotations

import math

import torch
from modules import CONTEXT, Tiny
from torch import Tensor
from verdicts import Verdicts

CASES = Verdicts()
converts, refused = CASES.converts, CASES.refused


@converts
class ArangePlusZero(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]) + 0)


@converts
class CountedOnes(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.ones_like(ids).cumsum(1) - 1)


@converts
class PositionBuffer(Tiny):
    def setup(self) -> None:
        self.register_buffer("position_ids", torch.arange(CONTEXT)[None])

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(self.position_ids[:, : ids.shape[1]])


@converts
class ShuffledPositionBuffer(Tiny):
    """A buffer of positions need not count: its values are read, not replaced."""

    def setup(self) -> None:
        self.register_buffer("position_ids", torch.randperm(CONTEXT)[None])

    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(self.position_ids[:, : ids.shape[1]])


@converts
class TableSlice(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe.weight[3 : 3 + ids.shape[1]]


@converts
class ScaledKeys(Tiny):
    """Keys depend on their own position, not only through rope."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(k.shape[2], dtype=torch.float32)
        return super().attend(q, k * (1 + 0.1 * steps)[:, None], v, layer)


@converts
class HalfPrecisionPositions(Tiny):
    """bfloat16 counts to 256 only: `i + 1` is rounded before and after."""

    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1]).to(torch.bfloat16) / 8 + 1
        return super().positions(ids) * steps[:, None].float()


@converts
class CountedAndThrownAway(Tiny):
    """The same row for every token, by a count of them."""

    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        return self.wpe(steps * 0) + self.wpe((steps < 0).long()) + self.wpe(steps - steps + 3)


@converts
class FirstAndFar(Tiny):
    """The first token and those from the sixth on are something else: a node's own position says which it is."""

    def finish(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])[:, None]
        first, far = at == 0, at >= 5
        return self.head(x * (1 + ~first * 0.5) + (first | ~far) * x.roll(1, -1))


@refused("number of tokens")
class LastAlone(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        last = torch.arange(x.shape[1])[:, None] == x.shape[1] - 1
        return self.head(x * (1 + ~last * 0.5))


@converts
class Clamped(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]).clamp(max=7))


@converts
class Wrapped(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]) % 8)


@refused("number of tokens")
class ClampedInTheMiddle(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]).clamp(max=ids.shape[1] // 2))


@refused("")
class Backwards(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(ids.shape[1] - 1 - torch.arange(ids.shape[1]))


@refused("")
class FromTheEnd(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(-ids.shape[1], 0) + CONTEXT)


@refused("")
class Normalised(Tiny):
    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1]).float()
        return super().positions(ids) * (steps / steps.max())[:, None]


@refused("")
class WrappedIndex(Tiny):
    """An index of -1 reads the last element, so this is a roll."""

    def positions(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        return self.wpe(steps[steps - 1])


@refused("number of tokens")
class LengthScaled(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) * x.shape[1]


@refused("number of tokens")
class RootLengthScaled(Tiny):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x) / math.sqrt(x.shape[1])


test_converts_exactly, test_is_refused = CASES.tests()
