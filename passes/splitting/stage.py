"""Which stage a graph is for, how layers are dealt out to stages, and what only the whole model knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treespec_compiler.mesh import Mesh


@dataclass(frozen=True)
class StageShare:
    """One rank's stage of a mesh."""

    mesh: Mesh
    rank: int

    @property
    def stage(self) -> int:
        return self.mesh.stage(self.rank)

    @property
    def first(self) -> bool:
        """Whether it reads tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether it gives logits."""
        return self.stage == self.mesh.pp - 1


@dataclass(frozen=True)
class StageLayers:
    """Attention layers `start` .. `stop - 1` of the model, the names of the outer ones, and bytes of their weights.

    `bytes`: on one rank, of weights as they are before kernels pack them. What several stages read counts in each.
    """

    start: int
    stop: int
    names: tuple[str, str]
    bytes: int


@dataclass(frozen=True)
class Unsplit:
    """What a stage's graph does not say of the model that it is cut from."""

    logits: Any
    """A fake value like the logits [1, rows, V]."""
    input_vocab: int | None
    stages: tuple[StageLayers, ...]
