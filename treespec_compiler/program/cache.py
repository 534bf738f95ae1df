"""The tree KV cache: committed tokens of every slot, and one uncommitted tree behind each.

A slot is one page of the pools. Tokens 0 .. length-1 are committed; the uncommitted tree's node j lies at length + j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheOverflow, InvalidPath, StaleCache, UnknownSlot
from ..ir.specs import AttentionSpec
from ..tree import TokenTree


class TreeCache:
    """K/V pools of a tree program and what lies in them. Made by `TreeProgram.new_cache`.

    Bytes: `slots * max_tokens * sum(site.bytes_per_token())`.
    """

    def __init__(
        self,
        sites: Sequence[AttentionSpec],
        max_tokens: int,
        slots: int,
        device: torch.device,
        commit_kernel: Callable[[Sequence[Tensor], Tensor, Tensor], Any],
    ) -> None:
        self.max_tokens, self.slots = max_tokens, slots
        self.stale: str | None = None
        self.prepared: dict[Any, Any] = {}
        """Inputs of calls of a shape, kept by executors."""
        self._commit = commit_kernel
        self._lengths = [0] * slots
        self._trees: list[TokenTree | None] = [None] * slots
        self._outdated: dict[int, str] = {}  # slot -> why its K/V are not what the model would compute now
        self.storages, self.pools = _allocate(sites, max_tokens, slots, device)

    def length(self, slot: int = 0) -> int:
        """Committed tokens of the slot."""
        return self._lengths[self._check_slot(slot)]

    def uncommitted(self, slot: int = 0) -> TokenTree | None:
        """The tree behind the committed tokens, if any."""
        return self._trees[self._check_slot(slot)]

    @property
    def bytes(self) -> int:
        return sum(s.numel() * s.element_size() for s in self.storages)

    def commit(self, path: Sequence[int] | Mapping[int, Sequence[int]]) -> None:
        """Keep the K/V of these nodes and drop every other uncommitted node.

        `path`: node indices of slot 0's tree, root first; or {slot: path}, where slots that are not named keep their
        trees. `[]` keeps nothing. A path may be an integer tensor [n]. Raises InvalidPath, before anything is changed.
        """
        given = path if isinstance(path, Mapping) else {0: path}
        paths = {self._check_slot(slot): _nodes(nodes) for slot, nodes in given.items()}
        self._check_fresh(paths)
        for slot, nodes in paths.items():
            self._check_path(slot, nodes)
        src: list[int] = []
        dst: list[int] = []
        for slot in sorted(paths):
            base = slot * self.max_tokens + self._lengths[slot]
            for target, node in enumerate(paths[slot]):
                if node != target:
                    src.append(base + node)
                    dst.append(base + target)
        if src:
            moves = torch.tensor([src, dst]).to(self.storages[0].device, non_blocking=True)
            self._commit(self.storages, moves[0], moves[1])
        for slot, nodes in paths.items():
            self._lengths[slot] += len(nodes)
            self._trees[slot] = None

    def free(self, slot: int = 0) -> None:
        """Forget the slot's tokens; its memory is used again."""
        self._check_slot(slot)
        self._lengths[slot] = 0
        self._trees[slot] = None
        self._outdated.pop(slot, None)

    def _outdate(self, reason: str) -> None:
        """What lies in the slots was computed by other weights; a freed slot is as good as new."""
        for slot in range(self.slots):
            if self._lengths[slot] or self._trees[slot] is not None:
                self._outdated[slot] = reason

    def _check_slot(self, slot: int) -> int:
        if not isinstance(slot, int) or not 0 <= slot < self.slots:
            raise UnknownSlot(slot=slot, slots=self.slots)
        return slot

    def _check_fresh(self, slots: Iterable[int]) -> None:
        if self.stale is not None:
            raise StaleCache(reason=self.stale)
        if self._outdated:
            for slot in slots:
                if slot in self._outdated:
                    raise StaleCache(reason=self._outdated[slot])

    def _check_path(self, slot: int, path: Sequence[int]) -> None:
        tree = self._trees[slot]
        if not path:
            return
        if tree is None:
            raise InvalidPath(got=f"path {list(path)} for slot {slot}", expected="[]: the slot has no uncommitted tree")
        parent = -1
        for node in path:
            if not isinstance(node, int) or not 0 <= node < len(tree):
                raise InvalidPath(got=f"node {node!r}", expected=f"indices from 0 to {len(tree) - 1}")
            if tree.parents[node] != parent:
                raise InvalidPath(
                    got=f"node {node} after {parent if parent >= 0 else 'the prefix'} in {list(path)}",
                    expected=f"its parent, {tree.parents[node]}, before it",
                )
            parent = node

    def _reserve(self, slot: int, nodes: int) -> None:
        if self._lengths[slot] + nodes > self.max_tokens:
            raise CacheOverflow(slot=slot, length=self._lengths[slot], new=nodes, capacity=self.max_tokens)


def _nodes(path: Sequence[int] | Tensor) -> list[int]:
    """NOTE the truth of a tensor is that of its number: an unconverted `tensor([0])` would pass for an empty path."""
    if not isinstance(path, Tensor):
        return list(path)
    if path.dim() != 1 or path.is_floating_point() or path.is_complex() or path.dtype is torch.bool:
        got = f"a {str(path.dtype).removeprefix('torch.')} tensor {list(path.shape)}"
        raise InvalidPath(got=got, expected="node indices: integers, or an integer tensor [n]")
    return path.tolist()


def _allocate(
    sites: Sequence[AttentionSpec], max_tokens: int, slots: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """One storage [pools, slots, kv_heads, max_tokens, dim] per distinct shape, and each site's K and V views of it."""
    shapes: dict[tuple[int, int, torch.dtype], list[tuple[int, int]]] = {}
    for site in sites:
        for kind, dim in enumerate((site.key_dim, site.value_dim)):
            shapes.setdefault((site.kv_heads, dim, site.dtype), []).append((site.index, kind))
    pools: dict[tuple[int, int], Tensor] = {}
    storages = []
    for (heads, dim, dtype), users in shapes.items():
        # NOTE zeros, not empty: a masked key with a NaN in it would still poison a product with weight 0.
        storage = torch.zeros(len(users), slots, heads, max_tokens, dim, dtype=dtype, device=device)
        storages.append(storage)
        pools.update(zip(users, storage.unbind(0), strict=True))
    return storages, [pools[site.index, kind] for site in sites for kind in (0, 1)]
