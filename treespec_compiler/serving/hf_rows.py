"""Processors and criteria of transformers are functions of a whole batch; here they are asked about one row of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class PaddedRow:
    """One sequence of a batch."""

    index: int
    batch: int
    """Rows of the batch."""
    padding: Tensor
    """[P] int64: the ids left of the prompt, which processors see as transformers shows them."""
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    """New ones."""
    scores: list[Tensor] = field(default_factory=list)
    """[V] float32 after each token's processors; kept where asked for."""
    logits: list[Tensor] = field(default_factory=list)
    """[V] float32 before them."""
    done: bool = False

    def whole(self, ids: Tensor) -> Tensor:
        """[1, L] -> [B, P + L]: this row in the place of every row, so that its own index means it."""
        return torch.cat([self.padding.to(ids.device)[None], ids], 1).expand(self.batch, -1)


class RowProcessor:
    """A batch's processors for one row, whatever path of a tree it is on: (ids [1, L], scores [1, V]) -> [1, V].

    With `keep`, the scores of all paths of a step are kept until `take` says which of them became output.
    """

    def __init__(self, row: PaddedRow, processors: Callable[[Tensor, Tensor], Tensor], keep: bool) -> None:
        self._row, self._processors, self._keep = row, processors, keep
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        row = self._row
        before = scores.clone() if self._keep else scores
        whole = scores.expand(row.batch, -1)
        # NOTE a copy where it is expanded: processors may write into the scores they are given
        processed = self._processors(row.whole(ids), whole.contiguous() if row.batch > 1 else whole)
        found = processed[row.index : row.index + 1]
        if self._keep:
            new = ids[0, len(row.prompt) :].tolist()
            self._kept[tuple(new)] = (before[0], found[0].clone())
        return found

    def take(self, tokens: Sequence[int]) -> None:
        """These tokens come next: theirs are the rows to keep."""
        if self._keep:
            path = tuple(self._row.tokens)
            for token in tokens:
                logits, scores = self._kept[path]
                self._row.logits.append(logits)
                self._row.scores.append(scores)
                path = (*path, token)
            self._kept.clear()


class RowCriteria:
    """A batch's stopping criteria for one row."""

    def __init__(self, row: PaddedRow, criteria: Callable[..., Any], device: torch.device, keep: bool) -> None:
        self._row, self._criteria, self._device, self._keep = row, criteria, device, keep

    def until(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """Those of the new tokens that come before the end, its own included, and whether that is reached."""
        row, shown = self._row, list[int]()
        for token in tokens:
            shown.append(token)
            ids = torch.tensor([[*row.prompt, *row.tokens, *shown]], device=self._device)
            scores = None
            if self._keep:
                known = row.scores[: len(row.tokens) + len(shown)]
                scores = tuple(one[None].expand(row.batch, -1) for one in known)
            stops = self._criteria(row.whole(ids), scores)
            if bool(stops if isinstance(stops, bool) else stops[row.index]):
                return shown, True
        return shown, False
