"""Token Recycling (Luo et al., arXiv 2408.08696): the target's own likeliest next tokens, remembered by token.

Verification computes logits for every node, most of which are thrown away. Here the likeliest ids after each node's
token are kept in a table [V, k] (an adjacency matrix of tokens), and a tree is read from it without running anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ...errors import InvalidOption
from ..policies.protocol import Limits, TreePolicy
from ..proposal import Proposal
from ..sampling.ranking import largest
from .protocol import DraftRequest
from .registry import DraftContext, register_draft
from .retrieval import grown

FOLLOWERS = 8
"""Ids remembered a token, as in the paper (section 4.1); a table of 50,000 tokens takes 1.6 MB."""
UNKNOWN = -1
PRIOR_TRIES = 8.0


class Followers:
    """The k ids that the target found likeliest when it last saw each token, best first [V, k], and how often each of
    these places was right."""

    def __init__(self, vocab_size: int, k: int = FOLLOWERS) -> None:
        self.table = np.full((vocab_size, k), UNKNOWN, np.int32)
        self._right = np.array([PRIOR_TRIES * 0.5 ** (rank + 1) for rank in range(k)])
        self._tried = PRIOR_TRIES

    def fresh(self) -> Followers:
        """Of the same size, with nothing known."""
        return Followers(*self.table.shape)

    @property
    def shares(self) -> list[float]:
        """How often the target's next choice was at each place."""
        shares: list[float] = (self._right / self._tried).tolist()
        return shares

    def learn(self, tokens: Sequence[int], logits: Tensor) -> None:
        """`logits` [n, V] are the target's after each of `tokens`; rows that are NaN or infinite teach nothing."""
        ids, finite = largest(logits, self.table.shape[1])
        rows = np.asarray(tokens)
        usable = finite & (rows < len(self.table))  # a model may take more ids than it says
        rows, ids = rows[usable], ids[usable]
        before = self.table[rows]
        known = before[:, 0] != UNKNOWN
        self._right += (before[known] == ids[known, :1]).sum(0)
        self._tried += int(known.sum())
        self.table[rows] = ids  # of a token that occurs twice, the later node's

    def after(self, token: int, k: int) -> list[tuple[int, int, float]]:
        """Up to k (id, id, share), best first: where a node is, is its token."""
        if token >= len(self.table):
            return []
        ids = self.table[token, :k].tolist()
        return [(i, i, share) for i, share in zip(ids, self.shares) if i != UNKNOWN]


class RecycleDraft:
    """Proposes what the target found likeliest after each token when it last saw it."""

    name = "recycle"
    prefill_seconds = 0.0
    compile_seconds = 0.0

    def __init__(self, followers: Followers) -> None:
        self.followers = followers

    def open(self, request: DraftRequest) -> RecycleSession:
        return RecycleSession(self, request)


class RecycleSession:
    """One request's newest token; what is learned is shared by all."""

    def __init__(self, draft: RecycleDraft, request: DraftRequest) -> None:
        self._name, self._needs_q, self._root = draft.name, request.needs_q, -1
        self._followers = draft.followers if request.remember else draft.followers.fresh()

    def accept(self, tokens: Sequence[int]) -> None:
        self._root = tokens[-1]

    def learn(self, tokens: Sequence[int], logits: Tensor) -> None:
        self._followers.learn(tokens, logits)

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal:
        proposal = Proposal.root(self._root, q=self._needs_q, proposer=self._name)
        return grown(proposal, self._root, self._followers.after, policy, limits)

    def close(self) -> None:
        """Nothing is held."""


_FOLLOWERS: weakref.WeakKeyDictionary[object, Followers] = weakref.WeakKeyDictionary()


def _named(argument: str, context: DraftContext) -> RecycleDraft:
    if argument:
        raise InvalidOption(name="draft", got=f"recycle:{argument}", expected='"recycle"')
    target = context.target
    known = _FOLLOWERS.get(target)
    if known is None or len(known.table) != target.vocab_size:
        known = _FOLLOWERS[target] = Followers(target.vocab_size)
    return RecycleDraft(known)


register_draft("recycle", _named)
