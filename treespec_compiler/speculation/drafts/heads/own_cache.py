"""A head's own keys and values: committed places first, behind them the nodes of the step under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRANULE = 256


class HeadCache:
    """K and V [key heads, places, E]; they take memory as they grow."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._k = torch.empty(kv_heads, 0, head_dim, dtype=dtype, device=device)
        self._v = torch.empty_like(self._k)
        self.committed = 0
        self.count = 0
        """Committed places and nodes together."""
        self._paths: list[tuple[int, ...]] = []  # of each node: the places on its path, its own last

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Behind what there is; everything there is then, K and V [key heads, count, E]."""
        end = self.count + k.shape[1]
        if end > self._k.shape[1]:
            more = -(-max(end, 2 * self._k.shape[1]) // GRANULE) * GRANULE - self._k.shape[1]
            self._k, self._v = (torch.cat([x, x.new_empty(len(x), more, x.shape[2])], 1) for x in (self._k, self._v))
        self._k[:, self.count : end], self._v[:, self.count : end] = k, v
        self.count = end
        return self._k[:, :end], self._v[:, :end]

    def chain(self, count: int) -> Tensor:
        """What `count` new places see that follow the committed ones: all before, and themselves [count, places]."""
        total = self.committed + count
        return torch.ones(count, total, dtype=torch.bool, device=self._k.device).tril(self.committed)

    def commit(self, count: int | None = None) -> None:
        """The places that were added are committed, or the first `count` of them; the others are gone."""
        self.committed = self.count = self.count if count is None else self.committed + count

    def grow(self, parents: Sequence[int]) -> Tensor:
        """What new nodes see: committed places, the path to their parent (-1: the last committed place), themselves."""
        first = self.count - self.committed
        self._paths += [
            (*(self._paths[parent] if parent >= 0 else ()), self.count + i) for i, parent in enumerate(parents)
        ]
        seen = torch.zeros(len(parents), self.count + len(parents), dtype=torch.bool)
        seen[:, : self.committed] = True
        for row, path in enumerate(self._paths[first:]):
            seen[row, list(path)] = True
        return seen.to(self._k.device)

    def drop(self) -> None:
        """The nodes are gone."""
        self.count = self.committed
        self._paths.clear()
