"""What was converted as one JSON document and its constants, and back: the state, its sources, limits and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...capture.weight_ref import WeightRef
from ...converted import Converted
from ...ir.specs import Limit
from ...passes.framework.state import GraphState
from .deferred import Broken, DeferredState, check_kernels
from .state import history_of, history_text, state_of, state_text

if TYPE_CHECKING:
    from ...capture.reads import Followable


def document(converted: Converted, others: frozenset[str] = frozenset()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON, tensors by the names it has for them); `others`: as of `target_text`. Raises CannotSave."""
    text, tensors = state_text(converted.state, others)
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
    digest: str | None = None,
    deferred: Broken | None = None,
) -> Converted:
    """The inverse, over tensors that are there; `digest` is that of the file; `deferred`: the graph is read later,
    and what is raised then where it is none.

    Raises CannotLoad, and as `GraphReader.read` does.
    """
    made: GraphState | None = None
    if deferred is not None:
        made = DeferredState.of(found["state"], tensors, lambda name: sources[name].tensor, deferred)
    if made is None:
        made = state_of(found["state"], tensors, lambda name: sources[name].tensor)
        check_kernels(node.target for node in made.graph.nodes if node.op == "call_function")
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
        digest=digest,
    )
