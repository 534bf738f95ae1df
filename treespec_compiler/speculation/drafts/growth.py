"""Trees grown by choice: only the nodes that a policy picks are run, and the result may be pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..policies.protocol import ChoosingPolicy
from ..proposal import Proposal

Run = Callable[[list[int], list[int], int], Tensor]
"""(tokens, parents, start) of the draft's own tree -> logits of the nodes from `start` on."""
Candidates = Callable[[Tensor, int], tuple[list[int], list[float]]]
"""(logits, k) -> the k likeliest ids of every row, flat and best first, and their probabilities."""


def grow(
    policy: ChoosingPolicy,
    proposal: Proposal,
    run: Run,
    candidates: Candidates,
    tokens: list[int],
    parents: list[int],
    calls: int,
    room: int,
    widest: int,
    most: int,
) -> Proposal:
    """Expand `proposal` (its root only) and return what is to be verified.

    `tokens`, `parents`: the draft's own tree, whose last node is the root; nodes that are run are appended to it.
    `calls`, `room`: draft calls and nodes of the draft's tree at most; `widest`: ids of its vocabulary that may be
    proposed; `most`: nodes to verify at most.
    """
    assert proposal.q is not None, "a policy that chooses needs q"
    value = [1.0]
    own = {0: len(tokens) - 1}  # proposal node -> node of the draft's tree
    start = 0
    for call in range(calls):
        wanted = policy.expand(call, proposal, value)
        wanted = [(node, min(k, widest)) for node, k in wanted if k > 0]
        if call:
            wanted = [(node, k) for node, k in wanted if node not in own]  # run before, without usable logits
            wanted = wanted[: max(0, room - len(tokens))]
            for node, _ in wanted:
                own[node] = len(tokens)
                tokens.append(proposal.tokens[node])
                parents.append(own[proposal.parents[node]])
        if not wanted:
            break
        logits = run(tokens, parents, start)
        start = len(tokens)
        k = max(k for _, k in wanted)
        ids, q = candidates(logits[-len(wanted) :], k)
        for row, (node, count) in enumerate(wanted):
            if q[row * k] != q[row * k]:  # NaN: the draft has no opinion here
                proposal.unusable += 1
                continue
            for rank in range(count):
                proposal.tokens.append(ids[row * k + rank])
                proposal.parents.append(node)
                proposal.depths.append(proposal.depths[node] + 1)
                proposal.ranks.append(rank)
                chance = q[row * k + rank]
                proposal.q.append(chance)
                value.append(value[node] * chance)
    kept = policy.select(proposal, value)
    if len(kept) > most:
        kept = sorted(sorted(kept, key=lambda node: (-value[node], node))[:most])
    return pruned(proposal, kept)


def pruned(proposal: Proposal, kept: Sequence[int]) -> Proposal:
    """The proposal with these nodes only; parents are kept with their children."""
    if len(kept) == len(proposal.tokens):
        return proposal
    place = {node: i for i, node in enumerate(kept)}
    place[-1] = -1

    def pick(values: list[int]) -> list[int]:
        return [values[node] for node in kept]

    return Proposal(
        pick(proposal.tokens),
        [place[proposal.parents[node]] for node in kept],
        pick(proposal.depths),
        pick(proposal.ranks),
        None if proposal.q is None else [proposal.q[node] for node in kept],
        None if proposal.multiplicity is None else pick(proposal.multiplicity),
        proposal.proposer,
        unusable=proposal.unusable,
    )
