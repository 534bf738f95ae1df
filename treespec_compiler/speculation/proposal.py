"""What a draft proposes: a token tree, and beside it who proposed each node, how likely and how often."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ir.acceptance import in_order
from ..tree import TokenTree
from .sampling.chance import Row


@dataclass(slots=True, eq=False)
class Draws:
    """How one proposer came by the children of one node."""

    children: list[int]
    """The node of every draw, in the order drawn; a node that was drawn twice is listed twice."""
    q: Row | Tensor | None
    """The distribution of the first draw [V], float64, where the draft is; None: chosen without chance, as one-hot
    draws."""
    replacement: bool = True
    """False: every later draw is from q without the tokens drawn before, renormalised."""
    proposer: str = "draft"

    def in_order(self, tokens: Sequence[int], replacement: bool) -> Iterator[tuple[int, Row | None]]:
        """Every drawn node and the distribution it was drawn from, given the draws before it."""
        q = self.q.cpu().numpy() if isinstance(self.q, Tensor) else self.q
        return in_order(self.children, tokens, q, replacement)


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
    """Place among the siblings of the same proposer: 0 is the likeliest of the top k, or the one drawn first."""
    q: list[float] | None = None
    """The draft's probability of each node given its path (roots: 1), or None if nobody asked for it."""
    multiplicity: list[int] | None = None
    """How many times each node was proposed; None: once."""
    proposer: str = "draft"
    parts: tuple[tuple[Proposal, list[int]], ...] = ()
    """After `merge`: every proposer's own proposal and the merged node of each of its nodes."""
    draws: dict[int, list[Draws]] | None = None
    """By node, how its children were drawn, one entry a proposer; None: all were chosen without chance."""
    unusable: int = 0
    """Rows of the draft that were NaN or infinite, and gave no children."""

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
        merged.unusable = sum(proposal.unusable for proposal in proposals)
        if any(proposal.draws is not None for proposal in proposals):
            merged.draws = _merged_draws(parts)
        return merged

    def drawn(self) -> Mapping[int, list[Draws]]:
        """`draws`, made up from the tree where nothing was drawn by chance."""
        if self.draws is not None:
            return self.draws
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                children.setdefault(parent, []).append(node)
        return {parent: [Draws(nodes, None, proposer=self.proposer)] for parent, nodes in children.items()}

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from below the root to `node`, this one included."""
        path = []
        while self.parents[node] >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def __len__(self) -> int:
        return len(self.tokens)

    def tree(self) -> TokenTree:
        return TokenTree._trusted(self.tokens, self.parents)


def _merged_draws(parts: Sequence[tuple[Proposal, list[int]]]) -> dict[int, list[Draws]]:
    """Every proposer's draws, one proposer after the other, at the nodes of the merged tree."""
    merged: dict[int, list[Draws]] = {}
    for proposal, nodes in parts:
        for parent, draws in proposal.drawn().items():
            for d in draws:
                children = [nodes[child] for child in d.children]
                merged.setdefault(nodes[parent], []).append(Draws(children, d.q, d.replacement, d.proposer))
    return merged
