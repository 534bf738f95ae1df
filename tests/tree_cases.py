"""Random attention inputs and a dense float64 answer to check every implementation against."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treespec_compiler.ir.inputs import ATTENTION, TreeMeta


def attention_inputs(meta: TreeMeta) -> tuple[Tensor, ...]:
    """The metadata arguments of `treespec::tree_attention`, in the order of its schema."""
    return tuple(getattr(meta, name) for name in ATTENTION)


@dataclass
class Case:
    """Requests given as (committed tokens, parents of all M nodes, how many of them are new)."""

    requests: list[tuple[int, list[int], int]]
    heads: int = 4
    kv_heads: int = 2
    dk: int = 32
    dv: int = 32
    window: int = 0
    page_size: int = 64
    slot_pages: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0
    meta: TreeMeta = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        n = len(self.requests)
        pages = n * self.slot_pages + 1
        table = torch.randperm(pages, generator=random)[: n * self.slot_pages].view(n, self.slot_pages)
        words = max(1, *(-(-len(parents) // 64) for _, parents, _ in self.requests))
        positions, write, offsets, ancestors = [], [], [0], []
        for r, (prefix, parents, new) in enumerate(self.requests):
            assert prefix + len(parents) <= self.page_size * self.slot_pages
            for node in range(len(parents) - new, len(parents)):
                path = self.path(parents, node)
                positions.append(prefix + len(path) - 1)
                at = prefix + node
                write.append(int(table[r, at // self.page_size]) * self.page_size + at % self.page_size)
                row = [sum(1 << (j - 64 * w) for j in path if j // 64 == w) for w in range(words)]
                ancestors.append([w - (1 << 64) if w >> 63 else w for w in row])
            offsets.append(offsets[-1] + new)
        self.meta = TreeMeta(
            positions=torch.tensor(positions),
            write_index=torch.tensor(write),
            node_offsets=torch.tensor(offsets),
            page_table=table,
            prefix_lens=torch.tensor([p for p, _, _ in self.requests]),
            tree_lens=torch.tensor([len(parents) for _, parents, _ in self.requests]),
            ancestors=torch.tensor(ancestors),
            rows=torch.arange(offsets[-1]),
            state_slots=torch.arange(n),
            state_rows=torch.arange(sum(len(parents) for _, parents, _ in self.requests)),
        )
        t = offsets[-1]

        def projected(heads: int, dim: int) -> Tensor:  # as a model makes it: [1, T, H, D] transposed
            return torch.randn(1, t, heads, dim, generator=random, dtype=torch.float64).transpose(1, 2).to(self.dtype)

        def pool(dim: int) -> Tensor:  # one site of a larger storage
            storage = torch.randn(3, pages, self.kv_heads, self.page_size, dim, generator=random, dtype=torch.float64)
            return storage.to(self.dtype)[1]

        self.q, self.k = projected(self.heads, self.dk), projected(self.kv_heads, self.dk)
        self.v = projected(self.kv_heads, self.dv)
        self.pool_k, self.pool_v = pool(self.dk), pool(self.dv)
        self.scale = 1 / math.sqrt(self.dk)

    @staticmethod
    def path(parents: list[int], node: int) -> list[int]:
        out = []
        while node >= 0:
            out.append(node)
            node = parents[node]
        return out[::-1]

    def arguments(self) -> tuple[Tensor | float | int, ...]:
        """The op's arguments, with pools of their own."""
        pools = self.pool_k.clone(), self.pool_v.clone()
        return (self.q, self.k, self.v, *pools, *attention_inputs(self.meta), self.scale, self.window)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output and pools, by masked dense attention over each request's whole slot in float64, node by node."""
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        pool_k, pool_v = self.pool_k.double().clone(), self.pool_v.double().clone()
        out = torch.zeros(1, self.heads, q.shape[2], self.dv, dtype=torch.float64)
        row = 0
        for r, (prefix, parents, new) in enumerate(self.requests):
            pages = self.meta.page_table[r].tolist()
            for i, node in enumerate(range(len(parents) - new, len(parents))):
                page, offset = pages[(prefix + node) // self.page_size], (prefix + node) % self.page_size
                pool_k[page, :, offset], pool_v[page, :, offset] = k[0, :, row + i], v[0, :, row + i]
            keys = torch.cat([pool_k[p] for p in pages], 1)  # [Hkv, slot, Dk]
            values = torch.cat([pool_v[p] for p in pages], 1)
            for node in range(len(parents) - new, len(parents)):
                path = self.path(parents, node)
                tokens = [*range(prefix), *(prefix + j for j in path)]  # by position
                if self.window:
                    tokens = tokens[-self.window :]
                for h in range(self.heads):
                    kv = h // (self.heads // self.kv_heads)
                    weights = (keys[kv, tokens] @ q[0, h, row] * self.scale).softmax(0)
                    out[0, h, row] = weights @ values[kv, tokens]
                row += 1
        return out, pool_k, pool_v


def chain(n: int) -> list[int]:
    return list(range(-1, n - 1))


def random_tree(n: int, seed: int) -> list[int]:
    """Parents before children; several roots are likely."""
    random = torch.Generator().manual_seed(seed)
    return [int(torch.randint(-1, i, (), generator=random)) if i else -1 for i in range(n)]


CASES = {
    "decode": Case([(37, [-1], 1)]),
    "no prefix": Case([(0, [-1, 0, 0, 1], 4)]),
    "mha": Case([(20, random_tree(7, 1), 7)], heads=3, kv_heads=3, dk=64, dv=64),
    "mqa": Case([(20, random_tree(9, 2), 9)], heads=8, kv_heads=1, dk=96, dv=96),
    "gqa, head size 128": Case([(33, random_tree(9, 3), 9)], heads=8, kv_heads=2, dk=128, dv=128),
    "odd head sizes": Case([(33, random_tree(5, 4), 5)], dk=20, dv=7),
    "Dk larger than Dv": Case([(50, random_tree(12, 5), 12)], dk=48, dv=16),
    "ragged forest": Case([(5, random_tree(3, 6), 3), (0, random_tree(20, 7), 20), (60, [-1], 1)], page_size=96),
    "extend": Case([(40, random_tree(17, 8), 4), (9, random_tree(6, 9), 6)]),
    "a request without new nodes": Case([(4, random_tree(3, 30), 3), (9, random_tree(6, 9), 0), (2, [-1], 1)]),
    "more than 64 nodes": Case([(30, random_tree(100, 10), 100)], page_size=160),
    "more than 128 nodes": Case([(70, random_tree(150, 11), 30), (1, random_tree(3, 12), 3)], page_size=256),
    "window within prefix": Case([(50, random_tree(9, 13), 9)], window=10),
    "window past prefix": Case([(5, random_tree(9, 14), 9), (40, random_tree(9, 15), 2)], window=20),
    "window within tree": Case([(40, chain(20), 20)], window=3),
    "window of one": Case([(40, random_tree(5, 16), 5)], window=1),
    "window over many words": Case([(10, chain(140), 140)], window=70, page_size=256),
    "long prefix": Case([(1500, random_tree(8, 17), 8)], page_size=2048),
    "prefill": Case([(0, chain(200), 200)], page_size=256),
    "prefill chunk": Case([(100, chain(90), 90), (13, [-1], 1)], page_size=256),
    "several pages": Case([(50, random_tree(30, 18), 11), (3, random_tree(5, 19), 5)], page_size=16, slot_pages=6),
    "odd pages": Case([(150, random_tree(30, 20), 30)], page_size=37, slot_pages=5),
    "one head each": Case([(300, random_tree(4, 21), 4)], heads=1, kv_heads=1, page_size=320),
}
