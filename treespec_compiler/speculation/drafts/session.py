"""One request's drafting by a model: its tokens in the draft's cache, and the tree of the step under way."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...tree import TokenTree
from ..policies.protocol import ChoosingPolicy, Limits, TreePolicy
from ..proposal import Proposal
from ..sampling.ranking import likeliest
from . import caches
from .growth import grow
from .protocol import DraftRequest, ProgramDraft

if TYPE_CHECKING:
    from ...program.cache import TreeCache

# Accepted tokens the draft never ran join the next tree as a chain up to here; longer ones are prefilled.
MAX_CHAIN = 16
STAND_IN = 0


class ModelDraftSession:
    """Grows a tree level by level: one packed `extend` a level, the last level is proposed but never run."""

    def __init__(self, draft: ProgramDraft, request: DraftRequest) -> None:
        self.draft = draft
        self.program = draft.program
        self._shared = min(self.program.vocab_size, request.vocab_size)
        self._truncate = self.program.vocab_size > self._shared
        self._input_vocab = self.program.input_vocab
        self._needs_q = request.needs_q
        limit = self.program.max_context
        tokens = request.max_tokens if limit is None else min(request.max_tokens, limit)
        self._capacity = tokens + request.max_nodes + MAX_CHAIN
        self._max_context = self._capacity if limit is None else limit
        self._cache: TreeCache | None = None
        self._length = 0  # tokens the draft has committed
        self._pending: list[int] = []  # accepted tokens it has not run; the last one is the next root
        # The tree of the step under way: first `_chain` caught-up tokens (the last one is the root), then the nodes.
        self._chain = 0
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._run = 0  # nodes of it that were run

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal:
        root = self._pending[-1]
        proposal = Proposal.root(root, q=self._needs_q, proposer=self.draft.name)
        # The last level is never run, so the deepest position run is the root's plus `depth - 1`.
        depth_limit = min(limits.depth, self._max_context - (self._length + len(self._pending) - 1))
        self._run = 0
        if depth_limit <= 0:
            return proposal
        cache = self._cache
        if cache is None or len(self._pending) > MAX_CHAIN:
            cache = self._prefill()
        chain = self._chain = len(self._pending)
        self._tokens, self._parents = self._known(self._pending), [*range(-1, chain - 1)]
        if getattr(policy, "expand", None) is not None:
            return self._choose(cache, cast("ChoosingPolicy", policy), proposal, depth_limit, limits.nodes)
        self._grow(cache, policy, proposal, depth_limit, limits.nodes)
        return proposal

    def _choose(
        self, cache: TreeCache, policy: ChoosingPolicy, proposal: Proposal, depth_limit: int, node_limit: int
    ) -> Proposal:
        """Let the policy pick which nodes are run, and which are verified."""

        def run(tokens: list[int], parents: list[int], start: int) -> Tensor:
            logits = self.program.extend(TokenTree._trusted(tokens, parents), cache, start=start)
            self._run = len(tokens)
            return logits[:, : self._shared] if self._truncate else logits

        def candidates(logits: Tensor, k: int) -> tuple[list[int], list[float]]:
            return _candidates(logits, k, True)

        room = self._capacity - self._length
        own = (self._tokens, self._parents)
        return grow(policy, proposal, run, candidates, *own, depth_limit, room, self._shared, node_limit)

    def _grow(
        self, cache: TreeCache, policy: TreePolicy, proposal: Proposal, depth_limit: int, node_limit: int
    ) -> None:
        """Run the newest level, append its children, until the policy or a limit stops."""
        tokens, parents, chain = self._tokens, self._parents, self._chain
        extend = self.program.extend
        shift = chain - 1  # draft node = proposal node + shift
        start, frontier = 0, 1  # first node not run; nodes of the newest level
        for depth in range(depth_limit):
            widths = policy.widths(depth, proposal)
            room = node_limit - len(proposal.tokens)
            if not frontier:
                return
            if isinstance(widths, int):
                k = min(widths, self._shared, room // frontier)
                counts = None
            else:
                counts = _fit(widths, frontier, room, self._shared)
                k = max(counts, default=0)
            if k == 0:
                return
            logits = extend(TokenTree._trusted(tokens, parents), cache, start=start)  # [new, V]
            start = self._run = len(tokens)
            if logits.shape[0] != frontier:
                logits = logits[-frontier:]  # rows of caught-up tokens
            if self._truncate:
                logits = logits[:, : self._shared]
            bad: list[int] = []
            ids, q = _candidates(logits, k, self._needs_q, bad)
            first = len(proposal.tokens) - frontier
            if bad:
                proposal.unusable += len(bad)
                counts = [0 if i in bad else k if counts is None else counts[i] for i in range(frontier)]
            if counts is None:
                children = [p for p in range(first, first + frontier) for _ in range(k)]
                ranks = [*range(k)] * frontier
            else:
                picked = [(i, r) for i, n in enumerate(counts) for r in range(n)]
                children = [first + i for i, _ in picked]
                ranks = [r for _, r in picked]
                ids = [ids[i * k + r] for i, r in picked]
                q = [q[i * k + r] for i, r in picked] if q else q
            frontier = len(ids)
            proposal.tokens += ids
            proposal.parents += children
            proposal.depths += [depth + 1] * frontier
            proposal.ranks += ranks
            if proposal.q is not None:
                proposal.q += q
            tokens += ids
            parents += [p + shift for p in children] if shift else children

    def accept(self, tokens: Sequence[int]) -> None:
        if not self._run:
            self._pending.extend(tokens)
            return
        node = self._chain - 1  # the root
        path = [*range(self._chain)]
        for i, token in enumerate(tokens):
            node = self._find(node, token)
            if node < 0:
                self._pending = [*tokens[i:]]
                break
            path.append(node)
        else:
            # Every token was run: the last one must be run again, as the next tree's root.
            path.pop()
            self._pending = [tokens[-1]]
        assert self._cache is not None
        self._cache.commit(path)
        self._length += len(path)
        self._run = 0

    def _find(self, parent: int, token: int) -> int:
        """The child of `parent` with this token among the nodes that were run, or -1."""
        parents, tokens = self._parents, self._tokens
        for node in range(parent + 1, self._run):
            if parents[node] == parent:
                if tokens[node] == token:
                    return node
        return -1

    def _prefill(self) -> TreeCache:
        """Run all pending tokens but the root, which begins the tree."""
        began, compiled = perf_counter(), self.program.compile_seconds
        cache = self._cache = self._cache or caches.take(self.program, self._capacity)
        if len(self._pending) > 1:
            prompt = torch.tensor(self._known(self._pending[:-1]), dtype=torch.int64, device=self.program.device)
            self.program.prefill(prompt, cache, slot=0)
            self._length += len(self._pending) - 1
            del self._pending[:-1]
        self.draft.prefill_seconds += perf_counter() - began - (self.program.compile_seconds - compiled)
        return cache

    def _known(self, tokens: list[int]) -> list[int]:
        """A copy with a stand-in for ids the draft lacks: its guesses get worse there, the output stays exact."""
        if max(tokens) >= self._input_vocab:
            return [token if token < self._input_vocab else STAND_IN for token in tokens]
        return [*tokens]

    def close(self) -> None:
        if self._cache is not None:
            caches.give_back(self.program, self._cache)
            self._cache = None


def _fit(widths: Sequence[int], frontier: int, room: int, vocab_size: int) -> list[int]:
    """A list of widths cut to the nodes and the ids there are; the first nodes keep theirs."""
    if not len(widths):
        return []
    if len(widths) != frontier:
        expected = f"a number, an empty list or {frontier} numbers, one a node of the newest level"
        raise InvalidOption(name="policy", got=list(widths), expected=expected, fix="Correct the policy's `widths`.")
    counts = []
    for width in widths:
        counts.append(max(0, min(width, room, vocab_size)))
        room -= counts[-1]
    return counts


def _candidates(logits: Tensor, k: int, needs_q: bool, bad: list[int] | None = None) -> tuple[list[int], list[float]]:
    """The k likeliest ids of every row, flat and best first, and their probabilities if wanted.

    `bad` gets the rows that are NaN or infinite appended.
    """
    if needs_q:
        best, ids = logits.float().softmax(-1).topk(k)
        # one tensor: on a GPU every readback waits, and float64 holds both exactly
        q, found = torch.stack([best.double(), ids.double()]).flatten(1).tolist()
        if bad is not None:
            bad += [row for row, x in enumerate(q[::k]) if x != x]  # softmax makes NaN of both
        return [int(token) for token in found], q
    return likeliest(logits, k, bad), []
