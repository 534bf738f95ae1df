"""What a parallel head has beside a layer: inputs for places behind the root, and what a token changes behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import Tensors, unreadable

KIND = "treespec_head"
DEPTH, RANK = "depth", "follow_rank"
EMBEDDING, STATE = "slots.embedding", "slots.state"
DOWN, UP = "follow.down.weight", "follow.up.weight"


@dataclass(frozen=True, eq=False)
class HeadSlots:
    """Of a head of width h that says D levels at once."""

    embedding: Tensor
    """[D - 1, h]: what stands for the embeddings of tokens that nobody knows yet."""
    state: Tensor
    """[D - 1, h]: what stands for the fused hidden states there."""
    down: Tensor
    """[r, h], of embeddings."""
    up: Tensor
    """[draft vocabulary, r]."""

    @property
    def depth(self) -> int:
        return len(self.embedding) + 1

    @classmethod
    def take(cls, folder: Path, config: Mapping[str, Any], tensors: Tensors) -> HeadSlots:
        """Raises UnreadableModel where there are none."""
        if config.get(KIND) != "parallel":
            raise unreadable(folder, f"{KIND} {config.get(KIND)!r}", "a parallel head")
        try:
            depth, rank = int(config[DEPTH]), int(config[RANK])
            h, rows = int(config["hidden_size"]), int(config["draft_vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(folder, f"config.json with {error!r}", f"{DEPTH} and {RANK}") from error
        if depth < 1 or rank < 1:
            raise unreadable(folder, f"{depth} levels and rank {rank}", "one or more of both")
        return cls(
            tensors.take(EMBEDDING, depth - 1, h),
            tensors.take(STATE, depth - 1, h),
            tensors.take(DOWN, rank, h),
            tensors.take(UP, rows, rank),
        )

    def behind(self, embedded: Tensor) -> Tensor:
        """What tokens of these embeddings [n, h] add to the logits of what follows them [n, draft vocabulary]."""
        return F.linear(F.linear(embedded, self.down), self.up)

    def inputs(self, embedded: Tensor, states: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings and states [T, h] and places [T] of tokens, with those of the D - 1 levels behind the last one."""
        more = torch.arange(1, self.depth, device=places.device)
        return (
            torch.cat([embedded, self.embedding.to(embedded.dtype)]),
            torch.cat([states, self.state]),
            torch.cat([places, places[-1] + more]),
        )
