"""From a draft's logits to children of the nodes that were run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor, stack

from ..proposal import Draws, Proposal
from ..sampling.device_rows import row_sampler
from ..sampling.ranking import likeliest
from ..sampling.rows import Drawn
from ..sampling.settings import Sampling
from .protocol import DraftRequest, ProgramDraft


class Children(Protocol):
    def begin(self, proposal: Proposal) -> None:
        """A new tree, of which there is the root."""
        ...

    def append(self, proposal: Proposal, nodes: Sequence[int], counts: Sequence[int], logits: Tensor) -> None:
        """Up to `counts[i]` children of `nodes[i]`, by row i of logits [nodes, V]."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens are part of every path from now on."""
        ...


class Likeliest:
    """The largest logits of ids below `shared`. Rows that are NaN or infinite give no children."""

    def __init__(self, needs_q: bool, shared: int) -> None:
        self._needs_q, self._shared = needs_q, shared

    def begin(self, proposal: Proposal) -> None:
        """Nothing but the root is known."""

    def accept(self, tokens: Sequence[int]) -> None:
        """The logits know it."""

    def append(self, proposal: Proposal, nodes: Sequence[int], counts: Sequence[int], logits: Tensor) -> None:
        if logits.shape[1] > self._shared:
            logits = logits[:, : self._shared]
        bad: list[int] = []
        k = max(counts)
        ids, q = _candidates(logits, k, self._needs_q, bad)
        if bad:
            proposal.unusable += len(bad)
            counts = [0 if row in bad else count for row, count in enumerate(counts)]
        if counts.count(k) == len(counts):
            parents = [node for node in nodes for _ in range(k)] if k > 1 else nodes
            ranks = [*range(k)] * len(counts)
        else:
            picked = [(row, rank) for row, count in enumerate(counts) for rank in range(count)]
            parents = [nodes[row] for row, _ in picked]
            ranks = [rank for _, rank in picked]
            ids = [ids[row * k + rank] for row, rank in picked]
            q = [q[row * k + rank] for row, rank in picked] if q else q
        depths = proposal.depths
        proposal.tokens += ids
        proposal.parents += parents
        depths += [depths[parent] + 1 for parent in parents]
        proposal.ranks += ranks
        if proposal.q is not None:
            proposal.q += q


def _candidates(logits: Tensor, k: int, needs_q: bool, bad: list[int]) -> tuple[list[int], list[float]]:
    """The k likeliest ids of every row, flat and best first, and their probabilities if wanted.

    `bad` gets the rows that are NaN or infinite appended.
    """
    if needs_q:
        best, ids = logits.float().softmax(-1).topk(k)
        # one tensor: on a GPU every readback waits, and float64 holds both exactly
        q, found = stack([best.double(), ids.double()]).flatten(1).tolist()
        bad += [row for row, x in enumerate(q[::k]) if x != x]  # softmax makes NaN of both
        return [int(token) for token in found], q
    return likeliest(logits, k, bad), []


class Sampled:
    """Children from the request's sampler on the draft's processed distributions, which are kept.

    NOTE: how many there are must be chosen before they are drawn, as `TreePolicy.widths` does. Dropping some of them
    afterwards would leave children that are no longer draws from q.
    """

    def __init__(self, draft: ProgramDraft, request: DraftRequest) -> None:
        assert request.sampler is not None and request.chance is not None and request.sampling is not None
        self._rows = row_sampler(
            draft.program, _draft_sampling(request.sampling), request.sampler, request.chance, request.vocab_size
        )
        self._kind, self._name, self._shared = request.sampler.kind, draft.name, request.vocab_size

    def begin(self, proposal: Proposal) -> None:
        if self._kind != "top-k":
            proposal.draws = {}
            proposal.multiplicity = [1]

    def accept(self, tokens: Sequence[int]) -> None:
        self._rows.accept(tokens)

    def append(self, proposal: Proposal, nodes: Sequence[int], counts: Sequence[int], logits: Tensor) -> None:
        paths = [proposal.path_tokens(node) for node in nodes] if self._rows.needs_paths else None
        for node, count, drawn in zip(
            nodes, counts, self._rows.draw(logits[:, : self._shared], counts, paths), strict=True
        ):
            if drawn is None:
                proposal.unusable += 1
            elif count:
                children = _append(drawn, node, proposal)
                if proposal.draws is not None:
                    proposal.draws[node] = [Draws(children, drawn.q, self._kind == "iid", self._name)]


def _append(drawn: Drawn, parent: int, proposal: Proposal) -> list[int]:
    """Append the drawn children of `parent`; the node of every draw."""
    node_of: dict[int, int] = {}
    nodes = []
    for token, probability in zip(drawn.tokens, drawn.probabilities, strict=True):
        node = node_of.get(token)
        if node is None:
            node = node_of[token] = len(proposal.tokens)
            proposal.tokens.append(token)
            proposal.parents.append(parent)
            proposal.depths.append(proposal.depths[parent] + 1)
            proposal.ranks.append(len(node_of) - 1)
            if proposal.q is not None:
                proposal.q.append(probability)
            if proposal.multiplicity is not None:
                proposal.multiplicity.append(1)
        elif proposal.multiplicity is not None:
            proposal.multiplicity[node] += 1
        nodes.append(node)
    return nodes


def _draft_sampling(sampling: Sampling) -> Sampling:
    """Greedy decoding still ranks several children, by the logits after bias and penalty.

    Processors of scores are the target's: they may know its vocabulary only.
    """
    if sampling.greedy:
        return replace(sampling, temperature=1.0, top_k=None, top_p=None, min_p=None, processors=())
    return replace(sampling, processors=()) if sampling.processors else sampling
