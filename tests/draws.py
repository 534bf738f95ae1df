"""Random proposals with their draws, as tensors of `treespec::stochastic_accept` and as `Proposal`s."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treespec_compiler.speculation.proposal import Draws, Proposal
from treespec_compiler.speculation.sampling.chance import Row


class Listed:
    """A `Chance` of given numbers, one a question."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.numbers, self.used = list(numbers), 0

    def _next(self) -> float:
        self.used += 1
        return self.numbers[self.used - 1]

    def accept(self, probability: float) -> bool:
        return self._next() < probability

    def choose(self, weights: Row) -> int:
        cumulative = weights.cumsum()
        return int(cumulative.searchsorted(self._next() * cumulative[-1], side="right"))

    def repeated(self, weights: Row, count: int) -> list[int]:
        raise NotImplementedError

    def distinct(self, weights: Row, count: int) -> list[int]:
        raise NotImplementedError


def distribution(rng: np.random.Generator, vocab_size: int) -> Row:
    """Sharp or flat, often with zeros, sometimes one-hot."""
    row = rng.random(vocab_size) ** rng.choice([0.5, 2.0, 8.0])
    row[rng.random(vocab_size) < rng.choice([0.0, 0.5])] = 0.0
    if rng.random() < 0.1 or not row.any():
        row[:] = 0.0
        row[rng.integers(vocab_size)] = 1.0
    return row / row.sum()


def random_proposal(rng: np.random.Generator, p: Sequence[Row], sampler: str, *, proposers: int = 1) -> Proposal:
    """A tree of len(p) nodes or fewer; q is near p, equal to it or unrelated."""
    vocab_size, limit = len(p[0]), len(p)
    proposal = Proposal([int(rng.integers(vocab_size))], [-1], [0], [0], draws={})
    assert isinstance(proposal.draws, dict)
    for node in range(limit):
        if node >= len(proposal.tokens) or len(proposal.tokens) >= limit or rng.random() < 0.2:
            continue
        below: dict[int, int] = {}
        for which in range(proposers):
            q = [p[node], distribution(rng, vocab_size), 0.7 * p[node] + 0.3 * distribution(rng, vocab_size)][
                int(rng.integers(3))
            ]
            count = int(rng.integers(1, 4))
            support = int((q > 0).sum())
            if sampler == "top-k":
                drawn, q = rng.choice(vocab_size, min(count, vocab_size), replace=False).tolist(), None
            else:
                replace = sampler == "iid"
                drawn = rng.choice(vocab_size, count if replace else min(count, support), replace=replace, p=q).tolist()
            children = []
            for token in drawn:
                if token not in below:
                    if len(proposal.tokens) >= limit:
                        break
                    below[token] = len(proposal.tokens)
                    proposal.tokens.append(int(token))
                    proposal.parents.append(node)
                    proposal.depths.append(proposal.depths[node] + 1)
                    proposal.ranks.append(len(below) - 1)
                children.append(below[token])
            if children:
                draws = Draws(children, q, sampler != "without-replacement", f"draft{which}")
                proposal.draws.setdefault(node, []).append(draws)
    return proposal


def levels(proposals: Sequence[Proposal]) -> int:
    return 1 + max(depth for proposal in proposals for depth in proposal.depths)


def as_tensors(proposals: Sequence[Proposal], vocab_size: int) -> tuple[Tensor, ...]:
    """q, tokens, parents, node_offsets, draw_offsets, draw_rows, draw_q of several requests."""
    rows: list[Row] = []
    offsets, draw_rows, draw_q, node_offsets = [0], [], [], [0]
    for proposal in proposals:
        first = node_offsets[-1]
        for node in range(len(proposal.tokens)):
            for draws in proposal.drawn().get(node, ()):
                draw_rows += [first + child for child in draws.children]
                draw_q += [len(rows) if draws.q is not None else -1] * len(draws.children)
                if draws.q is not None:
                    rows.append(draws.q)
            offsets.append(len(draw_rows))
        node_offsets.append(first + len(proposal.tokens))
    q = torch.from_numpy(np.array(rows).reshape(len(rows), vocab_size))
    lists = (
        [token for proposal in proposals for token in proposal.tokens],
        [parent for proposal in proposals for parent in proposal.parents],
        node_offsets,
        offsets,
        draw_rows,
        draw_q,
    )
    return q, *(torch.tensor(numbers, dtype=torch.int64) for numbers in lists)
