"""A head's own, smaller vocabulary: which ids of the target its rows stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...proposal import Proposal
from ..children import Children, Likeliest


class ReducedLikeliest:
    """The likeliest rows, as the target's ids; nothing of the target's size is made."""

    def __init__(self, needs_q: bool, ids: Tensor) -> None:
        self._ids: list[int] = ids.tolist()
        self._rows = Likeliest(needs_q, len(self._ids))

    def begin(self, proposal: Proposal) -> None:
        self._rows.begin(proposal)

    def accept(self, tokens: Sequence[int]) -> None:
        self._rows.accept(tokens)

    def append(self, proposal: Proposal, nodes: Sequence[int], counts: Sequence[int], logits: Tensor) -> None:
        first, ids = len(proposal.tokens), self._ids
        self._rows.append(proposal, nodes, counts, logits)
        proposal.tokens[first:] = [ids[row] for row in proposal.tokens[first:]]


class ReducedSampled:
    """Draws from the head's distribution over the target's ids: those without a row have no share in it."""

    def __init__(self, sampled: Children, ids: Tensor, vocab_size: int) -> None:
        self._sampled, self._ids, self._vocab_size = sampled, ids, vocab_size

    def begin(self, proposal: Proposal) -> None:
        self._sampled.begin(proposal)

    def accept(self, tokens: Sequence[int]) -> None:
        self._sampled.accept(tokens)

    def append(self, proposal: Proposal, nodes: Sequence[int], counts: Sequence[int], logits: Tensor) -> None:
        whole = logits.new_full((len(logits), self._vocab_size), -torch.inf)
        whole[:, self._ids] = logits
        self._sampled.append(proposal, nodes, counts, whole)
