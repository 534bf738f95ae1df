"""Small decoders in the ways that people write experts and per-token layers. Each returns [1, T, V] logits."""

from __future__ import annotations

import torch
from modules import DIM, VOCAB, Tiny
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS, CHOICES = 4, 2


class Mixture(Tiny):
    """Two experts of four a token; x [T, C]."""

    layers = 1

    def setup(self) -> None:
        self.gate = nn.Linear(DIM, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 24), nn.GELU(), nn.Linear(24, DIM)) for _ in range(EXPERTS)
        )

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = super().block(x, layer)
        return x + self.mixture(x.view(-1, DIM)).view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.gate(x).softmax(-1).topk(CHOICES, -1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def mixture(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class WhereAndWrite(Mixture):
    """torch.where over choices, rows written back (mistral's reference)."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, nth = torch.where(chosen == i)
            out[rows] += weights[rows, nth, None] * expert(x[rows])
        return out


class OneHotIndexAdd(Mixture):
    """one_hot, a mask [choice, token] an expert, and index_add_."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        marks = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for i, expert in enumerate(self.experts):
            nth, rows = torch.where(marks[i])
            picked = x[None, rows].reshape(-1, DIM)
            out.index_add_(0, rows, (expert(picked) * weights[rows, nth, None]).to(x.dtype))
        return out


class BooleanRows(Mixture):
    """Rows by a boolean mask of the tokens, weights from a dense matrix."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        dense = torch.zeros(x.shape[0], EXPERTS).scatter(1, chosen, weights)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            asked = (chosen == i).any(-1)
            out[asked] += dense[asked, i].unsqueeze(-1) * expert(x[asked])
        return out


class RepeatedRows(Mixture):
    """Every token once a choice, rows chosen by a mask over all of them, results written into an empty tensor."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        flat, rows = chosen.view(-1), x.repeat_interleave(CHOICES, dim=0)
        out = torch.empty_like(rows)
        for i, expert in enumerate(self.experts):
            out[flat == i] = expert(rows[flat == i])
        return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


class HitModules(Mixture):
    """A loop over the experts that were hit, whose numbers are tensors [1] (Mixtral's for a long time)."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        marks = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        hit = torch.greater(marks.sum(dim=(-1, -2)), 0).nonzero()
        for number in hit:
            layer = self.experts[number]
            nth, rows = torch.where(marks[number].squeeze(0))
            picked = x[None, rows].reshape(-1, DIM)
            out.index_add_(0, rows, (layer(picked) * weights[rows, nth, None]).to(x.dtype))
        return out


class HitNumbers(Mixture):
    """Python's numbers of those that were hit, one of which gives its tokens back, and a turn that may be skipped."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        marks = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for number in torch.where(marks.sum((1, 2)) > 0)[0].tolist():
            with torch.no_grad():
                nth, rows = torch.where(marks[number])
            if rows.numel() == 0:
                continue
            if number >= EXPERTS - 1:
                y = x[rows]
            else:
                y = self.experts[number](x[rows])
            out[rows] += y * weights[rows, nth, None]
        return out


class NonzeroScatterAdd(Mixture):
    """nonzero, squeezed, and scatter_add with an index spread over the channels."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).any(-1).nonzero().squeeze(-1)
            share = (weights * (chosen == i)).sum(-1)
            y = expert(x.index_select(0, rows)) * share[rows].unsqueeze(-1)
            out = out.scatter_add(0, rows.unsqueeze(-1).expand(-1, DIM), y)
        return out


class ThreeDimensions(Mixture):
    """The batch is kept: the mask is [1, T, k], and rows are picked by pairs."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = Tiny.block(self, x, layer)
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            batch, token, nth = torch.where(chosen == i)
            out[batch, token] += expert(x[batch, token]) * weights[batch, token, nth].unsqueeze(-1)
        return x + out


class AllExpertsEinsum(Mixture):
    """Every expert for every token, mixed by an einsum with gates that topk left."""

    def setup(self) -> None:
        super().setup()
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, *s) * 0.2) for s in ((DIM, 24), (24, DIM)))

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        gates = torch.zeros(x.shape[0], EXPERTS).scatter(-1, chosen, weights)
        y = torch.einsum("td,edf->tef", x, self.up).relu()
        return torch.einsum("tef,efd,te->td", y, self.down, gates)


class OneHotCombine(Mixture):
    """Experts stacked, one_hot of the choices, gates summed over them."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        gates = (F.one_hot(chosen, EXPERTS).to(x.dtype) * weights.unsqueeze(-1)).sum(1)
        return (torch.stack([e(x) for e in self.experts], 1) * gates.unsqueeze(-1)).sum(1)


class GatherExperts(Mixture):
    """All experts' results, of which each token gathers its own."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        every = torch.stack([e(x) for e in self.experts], 1)
        own = every.gather(1, chosen.unsqueeze(-1).expand(-1, -1, DIM))
        return (own * weights.unsqueeze(-1)).sum(1)


class PerToken(Tiny):
    """One op more a token, on x [1, T, C]."""

    layers = 1

    def block(self, x: Tensor, layer: int) -> Tensor:
        return super().block(x + self.change(x), layer)

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class NarrowConvolution(PerToken):
    """nn.Conv1d of width 1 as a linear layer (GPT-1 style feed-forward)."""

    def setup(self) -> None:
        self.up, self.down = nn.Conv1d(DIM, 24, 1), nn.Conv1d(24, DIM, 1, groups=2)

    def change(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class GroupedRows(PerToken):
    """GroupNorm on rows, PReLU by channel, GLU."""

    def setup(self) -> None:
        self.norm, self.slopes, self.wide = nn.GroupNorm(4, DIM), nn.PReLU(DIM), nn.Linear(DIM, 2 * DIM)

    def change(self, x: Tensor) -> Tensor:
        rows = self.slopes(self.norm(x.reshape(-1, DIM)))
        return F.glu(self.wide(rows), -1).view(x.shape)


class MeanAndVariance(PerToken):
    """A layer norm from torch.var_mean, soft signs and clipped tails."""

    def change(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        y = (x - mean) / (var + 1e-5).sqrt()
        return torch.hypot(F.softsign(y), y.frac()) * torch.atan2(y, x + 3) + F.hardshrink(y, 0.3)


class HashedIds(PerToken):
    """Embeddings of hashed ids: xor, shifts and remainders."""

    def setup(self) -> None:
        self.buckets = nn.Embedding(32, DIM)

    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids) + self.buckets(((ids ^ 5) * 7 + (ids >> 1)) % 32)

    def change(self, x: Tensor) -> Tensor:
        return torch.where((x > 0) ^ (x.roll(1, -1) > 0), x, -x)


class OneHotEmbedding(PerToken):
    """A table by a product with one-hot rows."""

    def start(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, VOCAB).float() @ self.embed.weight + self.positions(ids)

    def change(self, x: Tensor) -> Tensor:
        return torch.tensordot(x, self.head.weight, dims=([2], [1])) @ self.head.weight


class BilinearGate(PerToken):
    """nn.Bilinear of two views of a token, and torch.inner with a table."""

    def setup(self) -> None:
        self.pair, self.table = nn.Bilinear(8, 8, DIM), nn.Parameter(torch.randn(6, DIM) * 0.2)

    def change(self, x: Tensor) -> Tensor:
        return self.pair(x[..., :8].contiguous(), x[..., 8:].contiguous()) + torch.inner(x, self.table) @ self.table


class WideConvolution(PerToken):
    """A causal convolution of all channels keeps its last inputs as a state."""

    def setup(self) -> None:
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=2)

    def change(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., :-2].transpose(1, 2)


CONVERTED: tuple[type[nn.Module], ...] = (
    WideConvolution,
    WhereAndWrite,
    OneHotIndexAdd,
    BooleanRows,
    RepeatedRows,
    HitModules,
    HitNumbers,
    NonzeroScatterAdd,
    ThreeDimensions,
    AllExpertsEinsum,
    OneHotCombine,
    GatherExperts,
    NarrowConvolution,
    GroupedRows,
    MeanAndVariance,
    HashedIds,
    OneHotEmbedding,
    BilinearGate,
)


class LastWriteWins(Mixture):
    """Choices that may be equal: which of two rows is written last is not known."""

    def mixture(self, x: Tensor) -> Tensor:
        chosen = (x[:, :CHOICES] * 7).long() % EXPERTS
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, nth = torch.where(chosen == i)
            out[rows] = expert(x[rows]) * (nth[:, None] + 1)
        return out


class RowNumbers(Mixture):
    """The picked rows' own numbers are used as values."""

    def mixture(self, x: Tensor) -> Tensor:
        _, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, _ = torch.where(chosen == i)
            out.index_add_(0, rows, expert(x[rows]) * rows[:, None])
        return out


class OthersRows(Mixture):
    """Rows that another expert's tokens pick."""

    def mixture(self, x: Tensor) -> Tensor:
        _, chosen = self.route(x)
        out = torch.zeros_like(x)
        asked = (chosen == 0).any(-1)
        out[asked] = x[asked].mean(0)
        return out


class HitByMany(Mixture):
    """Only experts that more than one token chose."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        marks = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for number in (marks.sum((1, 2)) > 1).nonzero().flatten():
            nth, rows = torch.where(marks[number])
            out.index_add_(0, rows, self.experts[number](x[rows]) * weights[rows, nth, None])
        return out


class LeftByTheLastOne(Mixture):
    """What an expert that was hit before left is used for the next."""

    def mixture(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        marks = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        before = 0
        for number in (marks.sum((1, 2)) > 0).nonzero().flatten().tolist():
            nth, rows = torch.where(marks[number])
            out.index_add_(0, rows, self.experts[before](x[rows]) * weights[rows, nth, None])
            before = number
        return out


class PickedMean(Mixture):
    """How many tokens asked for an expert scales its results."""

    def mixture(self, x: Tensor) -> Tensor:
        _, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            asked = (chosen == i).any(-1)
            y = expert(x[asked])
            out[asked] += y / (y.shape[0] + 1)
        return out


class GroupNormOfTokens(PerToken):
    """GroupNorm on [1, C, T] averages over the tokens."""

    def setup(self) -> None:
        self.norm = nn.GroupNorm(4, DIM)

    def change(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class GateOfNeighbours(PerToken):
    """GLU along the tokens."""

    def change(self, x: Tensor) -> Tensor:
        return F.glu(torch.cat([x, x], 1), 1)


REFUSED: tuple[type[nn.Module], ...] = (
    LastWriteWins,
    RowNumbers,
    OthersRows,
    HitByMany,
    LeftByTheLastOne,
    PickedMean,
    GroupNormOfTokens,
    GateOfNeighbours,
)
