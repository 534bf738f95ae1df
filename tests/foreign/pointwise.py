"""Small decoders without a softmax: each weight is made of its own score. Each returns [1, T, V] logits."""

from __future__ import annotations

import torch
from decoders import HEAD, Style, future
from modules import DIM, HEADS
from torch import Tensor, nn
from torch.nn import functional as F


def near(tokens: int) -> Tensor:
    """The last four keys, the query's own among them."""
    gap = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (gap >= 0) & (gap < 4)


def together(tokens: int) -> Tensor:
    """Earlier keys of the query's own five."""
    place = torch.arange(tokens)
    return (place[:, None] >= place) & (place[:, None] // 5 == place // 5)


class ByLayer(Style):
    """One way of weighing in each layer."""

    layers = 7

    def setup(self) -> None:
        self.lift = nn.Parameter(torch.randn(HEADS, 1, 1) - 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        weigh = (
            self.sigmoid,
            self.sigmoid_of_slopes,
            self.relu_by_seen,
            self.relu_in_chunks,
            self.squared_by_sum,
            self.relu_by_norm,
            self.linear,
        )[layer]
        if layer == 6:  # three dimensions
            return (weigh(q[0] @ k[0].mT) @ v[0])[None]
        return weigh(q @ k.mT) @ v

    def sigmoid(self, s: Tensor) -> Tensor:
        """A learned lift for each head; minus infinity hides."""
        return (s / HEAD**0.5 + self.lift).masked_fill(future(s.shape[-1]), -torch.inf).sigmoid()

    def sigmoid_of_slopes(self, s: Tensor) -> Tensor:
        place = torch.arange(s.shape[-1])
        slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])[:, None, None]
        return torch.tril(torch.sigmoid(s / 2 + slopes * (place - place[:, None]) - 1.5))

    def relu_by_seen(self, s: Tensor) -> Tensor:
        """Scores that are 0 weigh 0; the number of keys is the mask's row sum."""
        seen = near(s.shape[-1]).float()
        return F.relu(s * seen) / seen.sum(-1, keepdim=True)

    def relu_in_chunks(self, s: Tensor) -> Tensor:
        seen = together(s.shape[-1])
        return s.clamp(min=0).masked_fill(~seen, 0) / seen.sum(-1, keepdim=True)

    def squared_by_sum(self, s: Tensor) -> Tensor:
        w = F.relu(s / 3 - 0.1).pow(2).masked_fill(future(s.shape[-1]), 0.0)
        return w / (w.sum(-1, keepdim=True) + 1e-3)

    def relu_by_norm(self, s: Tensor) -> Tensor:
        return F.normalize(F.relu(s).tril(), p=1, dim=-1)

    def linear(self, s: Tensor) -> Tensor:
        return s.tril() * 0.1


class GatedUnit(Style):
    """One head of squared ReLU, queries and keys being scaled copies, and a bias by distance (arXiv 2202.10447)."""

    def setup(self) -> None:
        self.scales = nn.Parameter(torch.randn(2, DIM))
        self.by_distance = nn.Parameter(torch.randn(64))
        self.values = nn.Linear(DIM, DIM)

    def block(self, x: Tensor, layer: int) -> Tensor:
        h, n = self.norms[layer](x), x.shape[1]
        place = torch.arange(n)
        q, k = (h * scale for scale in self.scales)
        s = torch.einsum("bid,bjd->bij", q, k) / 64 + self.by_distance[(place[:, None] - place).abs()]
        return x + torch.einsum("bij,bjd->bid", F.relu(s).square().tril(), F.silu(self.values(h)))


class ZeroScoreIsHalf(Style):
    """The sigmoid of a score that is set to 0 is no 0."""

    def weights(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores * ~future(scores.shape[-1]))


class OneTooFar(Style):
    def weights(self, scores: Tensor) -> Tensor:
        return F.relu(scores).tril(1)


class AddedBehindTheMask(Style):
    def weights(self, scores: Tensor) -> Tensor:
        return F.relu(scores.tril() + 1.0)


class LargeNumbersDoNotHide(Style):
    """Nothing makes 0 of what a mask adds."""

    def weights(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(future(scores.shape[-1]), -1e9)


class SumOfHiddenWeights(Style):
    """The sum that divides was taken before the mask."""

    def weights(self, scores: Tensor) -> Tensor:
        w = F.relu(scores)
        return w.tril() / w.sum(-1, keepdim=True)


class LessTheMean(Style):
    """Of all scores, those of later keys among them."""

    def weights(self, scores: Tensor) -> Tensor:
        return F.relu(scores - scores.mean(-1, keepdim=True)).tril()


class ByLength(Style):
    """Divided by the number of tokens in the text."""

    def weights(self, scores: Tensor) -> Tensor:
        return F.relu(scores).tril() / scores.shape[-1]


class BySeenKeys(ByLength):
    def weights(self, scores: Tensor) -> Tensor:
        return F.relu(scores).tril() / torch.arange(1, scores.shape[-1] + 1)[:, None]


CONVERTED: list[type[Style]] = [ByLayer, GatedUnit]
REFUSED: list[type[Style]] = [
    ZeroScoreIsHalf,
    OneTooFar,
    AddedBehindTheMask,
    LargeNumbersDoNotHide,
    SumOfHiddenWeights,
    LessTheMean,
]
