"""From a draft's logits to the children of its newest nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from .chance import Chance, Row
from .samplers import ChildSampler
from .settings import Processor, Sampling


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The children of one node."""

    tokens: list[int]
    """In the order drawn; a token drawn twice is there twice."""
    probabilities: list[float]
    """Of each token, under the distribution of the first draw."""
    q: Row | Tensor
    """That distribution over the target's ids [V]; float64, where the rows are."""


class RowSampler(Protocol):
    needs_paths: bool

    def draw(self, logits: Tensor, counts: Sequence[int], paths: Sequence[Sequence[int]] | None) -> list[Drawn | None]:
        """Up to `counts[i]` children of row i of logits [n, V]; None for a row that is unusable and was asked for.

        `paths`: each row's tokens beyond the accepted ones, if `needs_paths`.
        """
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens are part of every path from now on."""
        ...


class HostRows:
    """Row by row on the CPU."""

    def __init__(self, sampling: Sampling, sampler: ChildSampler, chance: Chance, vocab_size: int) -> None:
        self._processor = Processor(sampling)
        self._sampler, self._chance, self._vocab_size = sampler, chance, vocab_size
        self.needs_paths = self._processor.needs_paths

    def accept(self, tokens: Sequence[int]) -> None:
        self._processor.accept(tokens)

    def draw(self, logits: Tensor, counts: Sequence[int], paths: Sequence[Sequence[int]] | None) -> list[Drawn | None]:
        rows = logits.float().cpu().numpy()
        return [
            self._children(rows[i], count, () if paths is None else paths[i]) if count else NONE
            for i, count in enumerate(counts)
        ]

    def _children(self, logits: Row, count: int, path: Sequence[int]) -> Drawn | None:
        q = self._processor.row(logits, path)
        if q is None:
            return None
        tokens = self._sampler.draw(q, count, self._chance)
        # ids the draft lacks have q = 0
        padded = q if len(q) == self._vocab_size else np.pad(q, (0, self._vocab_size - len(q)))
        return Drawn(tokens, q[tokens].tolist(), padded)


NONE = Drawn([], [], np.zeros(0))
"""A row that nothing was asked of."""
