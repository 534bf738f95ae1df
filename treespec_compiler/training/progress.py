"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Milestone:
    """So much of a stage is done."""

    stage: str
    done: int
    total: int
    note: str = ""


Tell: TypeAlias = Callable[[Milestone], None]
"""An exception that it raises ends the run, which goes on from there when it is started again."""


def nobody(told: Milestone) -> None:
    """Nobody watches."""
