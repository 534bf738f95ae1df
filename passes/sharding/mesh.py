"""The ranks that a graph is cut for, and what they are called in it."""

from __future__ import annotations

from dataclasses import dataclass

from treespec_compiler.mesh import GROUP


@dataclass(frozen=True)
class RankShare:
    """One rank's share of a graph: that of `rank` among `ranks`."""

    ranks: int
    rank: int = 0
    group: str = GROUP
