"""Trees from what is looked up instead of computed: all continuations are known, a policy says how many are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

from ..policies.protocol import Limits, TreePolicy
from ..proposal import Proposal

S = TypeVar("S")
Continuations: TypeAlias = Callable[[S, int], list[tuple[int, S, float]]]
"""(where a node is, k) -> up to k (token, where it leads, its share), best first."""


def grown(proposal: Proposal, root: S, following: Continuations[S], policy: TreePolicy, limits: Limits) -> Proposal:
    """`proposal`, a root, with continuations in the policy's widths, chosen without chance.

    Where the policy counts on more nodes than there are, its first widths are taken. q, which only policies read, is
    the share.
    """
    if proposal.q is None and policy.needs_q:
        proposal.q = [1.0]
    places, frontier = [root], [0]  # of each node; nodes of the newest level
    for depth in range(min(limits.depth, policy.max_depth)):
        asked = policy.widths(depth, proposal)
        widths = [asked] * len(frontier) if isinstance(asked, int) else asked
        level: list[int] = []
        for node, width in zip(frontier, widths):
            width = min(width, limits.nodes - len(proposal.tokens))
            found = following(places[node], width) if width > 0 else []
            for rank, (token, place, share) in enumerate(found):
                level.append(len(proposal.tokens))
                proposal.tokens.append(token)
                proposal.parents.append(node)
                proposal.depths.append(depth + 1)
                proposal.ranks.append(rank)
                places.append(place)
                if proposal.q is not None:
                    proposal.q.append(share)
        if not level:
            break
        frontier = level
    return proposal
