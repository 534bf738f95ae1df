"""What a conversion gives. Apart from the conversion itself, whose imports a program found on a disk does not need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .ir.specs import Limit
from .passes.framework.manager import History
from .passes.framework.state import GraphState

if TYPE_CHECKING:
    from .capture.reads import Followable, Traced
    from .capture.weight_ref import WeightRef


@dataclass
class Converted:
    """A tree program before lowering: the graph, what was proved, and its history."""

    state: GraphState
    sources: dict[str, WeightRef]
    """The model's tensors that the program depends on, by their names."""
    proved_from: list[str]
    """Those of them whose values a proof used."""
    history: History
    capture_seconds: float
    max_context: int | None
    limits: list[Limit]
    input_vocab: int | None
    reads: Followable | None = None
    """What the capture read besides weights."""
    kept: int = 0
    """Values of the tokens that forward sets as attributes."""
    traced: Traced | None = None
    """The code that captures, those of other lengths too, went through; None: it was not captured here."""
    digest: str | None = None
    """Tells the graph from all others, where it was read from a disk."""
    compared: bool = False
    """Whether it was compared with its model before, which is not here any more."""
