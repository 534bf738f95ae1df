"""Sampled distributions where the logits are: rows of a vocabulary stay there, and only what was drawn is read.

The same distributions as `Processor`'s and, from the same numbers, the same children as `HostRows`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...ir.device import profile
from .chance import REPEATS, Chance, SeededChance, without_repeats
from .rows import NONE, Drawn, HostRows, RowSampler
from .samplers import SAMPLERS, ChildSampler, SamplerKind
from .settings import TINY, Sampling

if TYPE_CHECKING:
    from ...program.tree_program import TreeProgram


class DeviceProcessor:
    """`sampling.Processor` for all rows at once."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling, self.device = sampling, device
        self.needs_paths = sampling.repetition_penalty != 1.0
        self._accepted: list[int] = []  # not yet in `_seen`
        self._seen = torch.zeros(0, dtype=torch.bool, device=device)
        self._bias_ids = torch.tensor([token for token, _ in sampling._bias], dtype=torch.int64, device=device)
        self._bias_values = torch.tensor([v for _, v in sampling._bias], dtype=torch.float64, device=device)

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens are part of every path from now on."""
        if self.needs_paths:
            self._accepted += tokens

    def rows(self, logits: Tensor, paths: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, Tensor]:
        """Of logits [n, V]: the distributions [n, V] float64, and whether each row is usable [n] (see `Processor.row`).

        An unusable row becomes a distribution all the same. Nothing is read back.
        """
        sampling = self.sampling
        scores = torch.empty(logits.shape, dtype=torch.float64, device=logits.device).copy_(logits)
        if sampling._bias:
            known = sum(token < scores.shape[1] for token, _ in sampling._bias)  # they are sorted
            scores.index_add_(1, self._bias_ids[:known], self._bias_values[:known].expand(len(scores), -1))
        if self.needs_paths:
            penalty = sampling.repetition_penalty
            scores = scores.where(
                ~self._mask(scores, paths), torch.where(scores < 0, scores * penalty, scores / penalty)
            )
        usable = scores.amax(1).isfinite()
        scores.masked_fill_(~usable[:, None], 0.0)
        if sampling.greedy:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0), usable
        if sampling.temperature != 1.0:
            if sampling.temperature < TINY:
                scores -= scores.amax(1, keepdim=True)
            scores /= sampling.temperature
        if sampling.top_k is not None and sampling.top_k < scores.shape[1]:
            scores.masked_fill_(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
        if sampling.top_p is not None and sampling.top_p < 1.0:
            _keep_top_p(scores, sampling.top_p)
        if sampling.min_p:
            shares = scores.softmax(1)
            scores.masked_fill_(shares < sampling.min_p * shares.amax(1, keepdim=True), -torch.inf)
        return scores.softmax(1), usable

    def _mask(self, scores: Tensor, paths: Sequence[Sequence[int]] | None) -> Tensor:
        """Which ids occur in the accepted tokens or in each row's path [n, V]."""
        count, vocab_size = scores.shape
        if len(self._seen) < vocab_size:
            self._seen = torch.nn.functional.pad(self._seen, (0, vocab_size - len(self._seen)))
        new = [token for token in self._accepted if token < vocab_size]
        self._accepted = []
        self._seen[torch.tensor(new, dtype=torch.int64, device=self.device)] = True
        mask = self._seen[:vocab_size].repeat(count, 1)
        places = [(row, t) for row, path in enumerate(paths or ()) for t in path if t < vocab_size]
        if places:
            at = torch.tensor(places, device=self.device)
            mask[at[:, 0], at[:, 1]] = True
        return mask


def _keep_top_p(scores: Tensor, top_p: float) -> None:
    """As `sampling._keep_top_p`, of equal scores the later id first. Changes `scores` [n, V]."""
    order = scores.sort(dim=1, stable=True).indices.flip(1)
    total = scores.softmax(1).gather(1, order).cumsum(1)
    kept = 1 + (total < top_p).sum(1, keepdim=True)
    banned = torch.arange(scores.shape[1], device=scores.device) >= kept
    scores.masked_fill_(torch.zeros_like(banned).scatter_(1, order, banned), -torch.inf)


class DeviceRows:
    """All rows of a level at once; the numbers come from the request's `chance`."""

    def __init__(
        self, sampling: Sampling, kind: SamplerKind, chance: SeededChance, vocab_size: int, device: torch.device
    ) -> None:
        self._processor = DeviceProcessor(sampling, device)
        self._kind, self._chance, self._vocab_size = kind, chance, vocab_size
        self.needs_paths = self._processor.needs_paths

    def accept(self, tokens: Sequence[int]) -> None:
        self._processor.accept(tokens)

    def draw(self, logits: Tensor, counts: Sequence[int], paths: Sequence[Sequence[int]] | None) -> list[Drawn | None]:
        q, usable = self._processor.rows(logits, paths)
        found: list[Drawn | None] = [NONE] * len(counts)
        waiting = [i for i, count in enumerate(counts) if count]
        while waiting:
            waiting = self._draw(q, usable, counts, waiting, found)
        return found

    def _draw(
        self, q: Tensor, usable: Tensor, counts: Sequence[int], rows: list[int], found: list[Drawn | None]
    ) -> list[int]:
        """Children of the rows, in one readback; returns the rows that must be drawn again.

        Those are the ones behind a row that took fewer numbers than was thought (it was unusable) or more (a race).
        """
        widths = [self._width(counts[i]) for i in rows]
        here, good = (q, usable) if len(rows) == len(q) else (q[rows], usable[rows])
        indices = self._indices(here, widths)
        # float64 holds every id exactly, so that one tensor tells everything
        read = torch.cat([good[:, None].double(), indices.double(), here.gather(1, indices)], 1).tolist()
        most = indices.shape[1]
        for n, (row, width) in enumerate(zip(rows, widths, strict=True)):
            ok, numbers = read[n][0], read[n][1:]
            if not ok:
                found[row] = None
                return rows[n + 1 :]
            tokens = [int(index) for index in numbers[:width]]
            probability = dict(zip(tokens, numbers[most:], strict=False))
            raced = False
            if self._kind == "top-k":
                tokens = [token for token in tokens if probability[token] > 0.0]
            else:
                self._chance.skip(width)
            if self._kind == "without-replacement":
                tokens = without_repeats(tokens, counts[row])
                raced = len(tokens) < counts[row]
                if raced:
                    whole = q[row].cpu().numpy()
                    tokens = self._chance.more_of(whole, tokens, counts[row])
                    probability = {token: float(whole[token]) for token in tokens}
            found[row] = Drawn(tokens, [probability[token] for token in tokens], self._padded(q[row]))
            if raced:
                return rows[n + 1 :]
        return []

    def _width(self, count: int) -> int:
        """Numbers, and indices, that a row's children take."""
        return count + REPEATS if self._kind == "without-replacement" else count

    def _indices(self, q: Tensor, widths: list[int]) -> Tensor:
        """[n, widest] ids: of the largest q, or where the next numbers fall."""
        widest = max(widths)
        if self._kind == "top-k":
            return q.sort(dim=1, descending=True, stable=True).indices[:, :widest]
        given, numbers = self._chance.peek(sum(widths)), np.zeros((len(widths), widest))
        numbers[np.arange(widest) < np.array(widths)[:, None]] = given
        cumulative = q.cumsum(1)
        aims = torch.from_numpy(numbers).to(q.device) * cumulative[:, -1:]
        last = torch.where(q > 0, torch.arange(q.shape[1], device=q.device), 0).amax(1, keepdim=True)
        return torch.searchsorted(cumulative, aims, right=True).minimum(last)

    def _padded(self, q: Tensor) -> Tensor:
        return torch.nn.functional.pad(q, (0, self._vocab_size - len(q))) if len(q) < self._vocab_size else q


def stays_on_device(program: TreeProgram) -> bool:
    """Whether rows of the program's logits are used where they are: on a CPU, reading them costs nothing."""
    return not profile(program.device).host_memory


def row_sampler(
    program: TreeProgram, sampling: Sampling, sampler: ChildSampler, chance: Chance, vocab_size: int
) -> RowSampler:
    """On the program's device, for samplers that are known there and numbers that can be looked at beforehand."""
    if stays_on_device(program) and isinstance(chance, SeededChance) and sampler == SAMPLERS.get(sampler.kind):
        return DeviceRows(sampling, sampler.kind, chance, vocab_size, program.device)
    return HostRows(sampling, sampler, chance, vocab_size)
