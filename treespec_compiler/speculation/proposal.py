"""What a draft proposes: a token tree, and beside it who proposed each node, how likely and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tree import TokenTree


@dataclass(slots=True, eq=False)
class Proposal:
    """One list entry a node, parents before children. Node 0 is the root: the target's own last token, not a guess.

    NOTE: plain lists that the draft appends to level by level; a tensor or an object a node would cost more than the
    draft's forward pass.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    ranks: list[int]
    """Place among the siblings of the same proposer; 0 is the one the draft thought likeliest."""
    q: list[float] | None = None
    """The draft's probability of each node given its path (roots: 1), or None if nobody asked for it."""
    multiplicity: list[int] | None = None
    """How many times each node was proposed; None: once."""
    proposer: str = "draft"
    parts: tuple[tuple[Proposal, list[int]], ...] = ()
    """After `merge`: every proposer's own proposal and the merged node of each of its nodes."""

    @classmethod
    def root(cls, token: int, *, q: bool = False, proposer: str = "draft") -> Proposal:
        """The tree without any guess: plain decoding."""
        return cls([token], [-1], [0], [0], [1.0] if q else None, proposer=proposer)

    @classmethod
    def merge(cls, proposals: Sequence[Proposal]) -> Proposal:
        """One tree with every path of `proposals` (SpecInfer, Definition 3.2); equal token paths become one node.

        `multiplicity` counts the proposals of a node; each proposer's q stays in `parts`.
        """
        if len(proposals) == 1:
            return proposals[0]
        merged = cls([], [], [], [], None, [], proposer="+".join(p.proposer for p in proposals))
        assert merged.multiplicity is not None
        node_of: dict[tuple[int, int], int] = {}  # (merged parent, token) -> merged node
        parts = []
        for proposal in proposals:
            nodes: list[int] = []
            for i, (token, parent) in enumerate(zip(proposal.tokens, proposal.parents, strict=True)):
                key = (nodes[parent] if parent >= 0 else -1, token)
                node = node_of.get(key)
                if node is None:
                    node = node_of[key] = len(merged.tokens)
                    merged.tokens.append(token)
                    merged.parents.append(key[0])
                    merged.depths.append(proposal.depths[i])
                    merged.ranks.append(proposal.ranks[i])
                    merged.multiplicity.append(0)
                merged.multiplicity[node] += 1 if proposal.multiplicity is None else proposal.multiplicity[i]
                nodes.append(node)
            parts.append((proposal, nodes))
        merged.parts = tuple(parts)
        return merged

    def __len__(self) -> int:
        return len(self.tokens)

    def tree(self) -> TokenTree:
        return TokenTree._trusted(self.tokens, self.parents)
