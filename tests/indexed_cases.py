"""Tiny decoders with an indexer: each token attends to the keys that score best for it, and variants of how."""

from __future__ import annotations

import math

import torch
from modules import DIM, Tiny
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

CHOSEN, INDEX_HEADS, INDEX_DIM = 4, 5, 6


class Indexed(Tiny):
    """As DeepSeek V3.2 writes it; variants override one part."""

    def setup(self) -> None:
        widths = {"index_q": INDEX_HEADS * INDEX_DIM, "index_k": INDEX_DIM, "weights": INDEX_HEADS}
        self.index = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(DIM, width) for name, width in widths.items()}) for _ in range(self.layers)
        )
        with torch.no_grad():
            for made in self.index.parameters():
                made.copy_(torch.randn(made.shape, generator=torch.Generator().manual_seed(made.numel())))

    def seen(self, tokens: int) -> Tensor:
        return torch.ones(1, tokens, tokens, dtype=torch.bool).tril()

    def index_seen(self, tokens: int) -> Tensor:
        """[1, T, T]: among which keys a token chooses."""
        return self.seen(tokens)

    def rectified(self, scores: Tensor) -> Tensor:
        return scores.relu()

    def hidden(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.index_seen(scores.shape[1]), -math.inf)

    def scores(self, h: Tensor, layer: int) -> Tensor:
        """[1, T, T]."""
        made = self.index[layer]
        q = made["index_q"](h).view(1, h.shape[1], INDEX_HEADS, INDEX_DIM)
        k = made["index_k"](h)
        products = torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * INDEX_DIM**-0.5
        weights = made["weights"](h).float() * INDEX_HEADS**-0.5
        return torch.matmul(weights.unsqueeze(-2), self.rectified(products)).squeeze(-2)

    def chosen(self, scores: Tensor) -> Tensor:
        return scores.topk(min(CHOSEN, scores.shape[-1]), dim=-1).indices

    def kept(self, scores: Tensor) -> Tensor:
        hidden = torch.ones_like(scores, dtype=torch.bool).scatter(
            -1, self.chosen(scores).to(torch.int32).long(), False
        )
        return ~hidden

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask.unsqueeze(1))

    def block(self, x: Tensor, layer: int) -> Tensor:
        h = self.norms[layer](x)
        q, k, v = (self.split(part) for part in self.qkv[layer](h).chunk(3, -1))
        mask = self.seen(x.shape[1]) & self.kept(self.hidden(self.scores(h, layer)))
        return x + self.out[layer](self.join(self.attended(q, k, v, mask)))


class Marked(Indexed):
    """What is chosen is marked, not what is hidden."""

    def kept(self, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, self.chosen(scores), True)


class OneHead(Indexed):
    """With one index head half of all scores are exactly 0: ties wherever one looks."""

    def scores(self, h: Tensor, layer: int) -> Tensor:
        made = self.index[layer]
        q, weights = made["index_q"](h).view(1, -1, INDEX_HEADS, INDEX_DIM)[:, :, :1], made["weights"](h)[..., :1]
        products = torch.matmul(q, made["index_k"](h).transpose(-1, -2).unsqueeze(1))
        return torch.matmul(weights.unsqueeze(-2), products.relu()).squeeze(-2)


class Blocks(Indexed):
    """As MiniMax M3 writes it: each group of heads chooses blocks of keys, and sees its own one besides."""

    size, best, local, groups = 4, 2, 1, 2

    def block_scores(self, h: Tensor, layer: int) -> Tensor:
        """[1, groups, T, blocks]."""
        made, tokens = self.index[layer], h.shape[1]
        q = made["index_q"](h).view(1, tokens, INDEX_HEADS, INDEX_DIM)[:, :, : self.groups].transpose(1, 2)
        k = made["index_k"](h).view(1, tokens, 1, INDEX_DIM).transpose(1, 2)
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2))
        scores = scores.masked_fill(self.later(tokens), -math.inf)
        count = -(-tokens // self.size)
        if count * self.size - tokens:
            scores = nn.functional.pad(scores, (0, count * self.size - tokens), value=self.filling)
        return self.pooled(scores.view(1, self.groups, tokens, count, self.size))

    filling = -math.inf

    def later(self, tokens: int) -> Tensor:
        place = torch.arange(tokens)
        return place[None, None, None, :] > place[None, None, :, None]

    def pooled(self, scores: Tensor) -> Tensor:
        return scores.amax(-1)

    def own(self, tokens: int) -> Tensor:
        """[1, T, local]: blocks that a token sees in any case."""
        return (torch.arange(tokens)[None, :, None] // self.size - torch.arange(self.local)).clamp(min=0)

    def chosen_blocks(self, best: Tensor) -> Tensor:
        """[1, groups, T, n]; -1 where there are fewer."""
        values, places = best.topk(min(self.best, best.shape[-1]), dim=-1)
        return places.masked_fill(values == -math.inf, -1)

    def block(self, x: Tensor, layer: int) -> Tensor:
        h, tokens = self.norms[layer](x), x.shape[1]
        q, k, v = (self.split(part) for part in self.qkv[layer](h).chunk(3, -1))
        best = self.block_scores(h, layer)
        if self.local:
            best = best.scatter(-1, self.own(tokens).unsqueeze(1).expand(-1, self.groups, -1, -1), math.inf)
        places = self.chosen_blocks(best)
        count = best.shape[-1]
        marks = places.new_full((1, self.groups, tokens, count + 1), -math.inf, dtype=q.dtype)
        marks = marks.scatter(-1, places.masked_fill(places < 0, count), 0.0)[..., :count]
        kept = (marks == 0.0).repeat_interleave(self.size, dim=-1)[..., :tokens]
        keep = kept.repeat_interleave(q.shape[1] // self.groups, dim=1) & self.seen(tokens)
        bias = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(q.dtype).min)
        return x + self.out[layer](self.join(scaled_dot_product_attention(q, k, v, bias)))


class LocalBlocks(Blocks):
    """More blocks are seen in any case than are chosen: their infinite scores tie."""

    local = 3


# -- no choice of a path's own tokens, or none that is proved --------------------------------------------------------


class SeesTheFuture(Indexed):
    """The best of all tokens, those behind included, of which those behind are hidden then."""

    def hidden(self, scores: Tensor) -> Tensor:
        return scores


class HidesOther(Indexed):
    """What is hidden from the indexer is not what lies behind."""

    def index_seen(self, tokens: int) -> Tensor:
        return self.seen(tokens).transpose(-1, -2)


class HidesLittle(Indexed):
    """A hidden key keeps a score that may win."""

    def hidden(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.index_seen(scores.shape[1]), -1.0)


class Worst(Indexed):
    def chosen(self, scores: Tensor) -> Tensor:
        return scores.topk(min(CHOSEN, scores.shape[-1]), dim=-1, largest=False).indices


class ByLength(Indexed):
    """As many keys as half of the text has."""

    def chosen(self, scores: Tensor) -> Tensor:
        return scores.topk((scores.shape[-1] + 1) // 2, dim=-1).indices


class NotChosen(Indexed):
    def kept(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool).scatter(-1, self.chosen(scores), False)


class Places(Indexed):
    """The places in the order of their scores are taken for keys."""

    def chosen(self, scores: Tensor) -> Tensor:
        return scores.topk(min(CHOSEN, scores.shape[-1]), dim=-1).values.long().clamp(0, 1)


class OtherActivation(Indexed):
    def rectified(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()


class Normed(Indexed):
    """The best of scores that were divided by the largest of all tokens'."""

    def scores(self, h: Tensor, layer: int) -> Tensor:
        scores = super().scores(h, layer)
        return scores / scores.amax(1, keepdim=True)


class Windowed(Indexed):
    """Chosen among all tokens, attended to within a window."""

    def seen(self, tokens: int) -> Tensor:
        return super().seen(tokens).triu(-9)

    def index_seen(self, tokens: int) -> Tensor:
        return Indexed.seen(self, tokens)


class WindowedIndex(Indexed):
    def index_seen(self, tokens: int) -> Tensor:
        return self.seen(tokens).triu(-9)


class Biased(Indexed):
    """What is not chosen is less seen, but seen."""

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        bias = torch.zeros(mask.shape).masked_fill(~mask, -1.0).masked_fill(~self.seen(mask.shape[1]), -math.inf)
        return scaled_dot_product_attention(q, k, v, bias.unsqueeze(1))


class Sigmoid(Indexed):
    """Weights that are no softmax."""

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = (q @ k.transpose(2, 3)).sigmoid().masked_fill(~mask.unsqueeze(1), 0.0)
        return s @ v


# -- blocks that are not those of a path -----------------------------------------------------------------------------


class BlocksAhead(Blocks):
    """The best blocks of all tokens, those behind included."""

    def later(self, tokens: int) -> Tensor:
        return super().later(tokens) & False


class FilledBlocks(Blocks):
    """What fills the last block up has a score."""

    filling = 0.0


class MeanBlocks(Blocks):
    """A block's mean, of which tokens that are not there are a part."""

    def pooled(self, scores: Tensor) -> Tensor:
        return scores.clamp(min=-9).mean(-1)


class NextBlock(Blocks):
    """The block behind a token's own is seen in any case, once it is there."""

    def own(self, tokens: int) -> Tensor:
        last = (tokens - 1) // self.size
        return (torch.arange(tokens)[None, :, None] // self.size + 1).clamp(max=last)


class OtherBlocks(Blocks):
    """Sees the block in front of the one that was chosen."""

    def chosen_blocks(self, best: Tensor) -> Tensor:
        return super().chosen_blocks(best) - 1


class HalfOfTheBlocks(Blocks):
    def chosen_blocks(self, best: Tensor) -> Tensor:
        return best.topk((best.shape[-1] + 1) // 2, dim=-1).indices
