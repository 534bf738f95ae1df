"""What a tree policy is asked, and what it may answer: how wide and how deep a draft's tree grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..proposal import Proposal


@dataclass(frozen=True, slots=True)
class Limits:
    """What the tree of one step may have at most: the cache and the tokens still wanted decide."""

    depth: int
    """Levels below the root; 0 means plain decoding."""
    nodes: int
    """Nodes in all, the root included."""


@runtime_checkable
class TreePolicy(Protocol):
    """Decides, level by level, how many children the newest nodes get."""

    @property
    def max_nodes(self) -> int:
        """Upper bound on the nodes of one tree, the root included; caches are sized by it."""
        ...

    @property
    def max_depth(self) -> int:
        """Upper bound on the levels below the root."""
        ...

    @property
    def needs_q(self) -> bool:
        """Whether `widths` reads `proposal.q`."""
        ...

    def widths(self, depth: int, proposal: Proposal) -> int | Sequence[int]:
        """Children of the nodes at `depth`: one number for all, or one each in node order; 0 or an empty list stops."""
        ...


class Control(Protocol):
    """Who chooses one request's trees by what was measured, where `policy.control` gives one."""

    def plan(self, context: int, remaining: int) -> Sequence[TreePolicy | None]:
        """Each draft's tree; None: it is not asked. `context` tokens are committed, `remaining` wanted."""
        ...

    def observe(
        self, proposal: Proposal, path: Sequence[int], tokens: int, verify: float, draft: float, rest: float
    ) -> None:
        """A step's outcome: new tokens, and the seconds of the target's pass, of the drafts and of everything else."""
        ...


@runtime_checkable
class ChoosingPolicy(TreePolicy, Protocol):
    """A policy that picks which nodes to run, at any depth, and which to verify."""

    def expand(self, depth: int, proposal: Proposal, value: Sequence[float]) -> list[tuple[int, int]]:
        """(node, children) to run in call number `depth`, in index order; empty: the tree is ready."""
        ...

    def select(self, proposal: Proposal, value: Sequence[float]) -> list[int]:
        """Nodes to verify: in index order, the root first, parents with their children."""
        ...
