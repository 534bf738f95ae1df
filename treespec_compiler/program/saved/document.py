"""What was converted as one JSON document and its constants, and back: the state, its sources, limits and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ...capture.reads import Followable
from ...capture.weight_ref import WeightRef
from ...ir.registry import kernel_of
from ...ir.specs import Limit
from ...pipeline import Converted
from .state import history_of, history_text, state_of, state_text
from .values import CannotLoad


def document(converted: Converted) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON, tensors by the names it has for them). Raises CannotSave."""
    text, tensors = state_text(converted.state)
    found = {
        "state": text,
        "sources": list(converted.sources),
        "proved_from": converted.proved_from,
        "history": history_text(converted.history),
        "max_context": converted.max_context,
        "limits": [asdict(limit) for limit in converted.limits],
        "input_vocab": converted.input_vocab,
    }
    return found, tensors


def converted_of(
    found: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    sources: dict[str, WeightRef],
    reads: Followable | None = None,
) -> Converted:
    """The inverse, over tensors that are there. Raises CannotLoad, and as `GraphReader.read` does."""
    made = state_of(found["state"], tensors, lambda name: sources[name].tensor)
    for node in made.graph.nodes:
        kernel = kernel_of(node.target) if node.op == "call_function" else None
        if kernel is not None and not kernel.available():
            raise CannotLoad(f"the kernel {kernel.name}, which is not there")
    return Converted(
        made,
        sources,
        list(found["proved_from"]),
        history_of(found["history"]),
        0.0,
        found["max_context"],
        [Limit(**limit) for limit in found["limits"]],
        found["input_vocab"],
        reads,
    )
