"""A converted program as one JSON document and its constants, and back: graph, specs, limits, weights, records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, fx

from ...ir.inputs import input_of
from ...ir.specs import AttentionSpec, Limit, LogitsSpec, MaskSpec, PositionSpec, StateSpec
from ...passes.framework.manager import History, PassRecord
from ...passes.framework.state import GraphState
from ...passes.framework.weights import Weights
from .graph import GraphReader, GraphWriter
from .values import CannotLoad, CannotSave, SizeTexts, named, of_name
from .weights import read as read_weight
from .weights import written as weight_text

# Of a state, what is written as it is. `tests/program/test_saved.py` knows the rest by name.
PLAIN = (
    *("tokens", "position_inputs", "level", "inputs", "lone_lengths", "written", "caches", "max_context"),
    *("portable", "storage", "outputs", "padding"),
)


def state_text(state: GraphState, others: frozenset[str] = frozenset()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON, tensors by the names it has for them); `others`: as of `target_text`. Raises CannotSave."""
    if state.streaming is not None:
        raise CannotSave("a graph whose weights are streamed")
    of_ranks = state.cut is not None or state.stage is not None
    if of_ranks or state.level != "bound" or state.notes:
        raise CannotSave("a graph of one of several ranks, before its last pass, or with notes of a user's pass")
    if state.states:
        raise CannotSave("layers that keep a state beside attention")
    graphs = GraphWriter(SizeTexts(state.length), others)
    found: dict[str, Any] = {name: getattr(state, name) for name in PLAIN}
    found |= {
        "graph": graphs.write(state.gm),
        "graph_digest": state.graph_digest,
        "weights": {name: weight_text(made, graphs) for name, made in state.weights.items()},
        "sites": [asdict(site) | {"dtype": named(site.dtype)} for site in state.sites],
        "states": [asdict(site) | {"dtype": named(site.dtype)} for site in state.states],
        "positions": [asdict(position) for position in state.positions],
        "limits": [asdict(limit) for limit in state.limits],
        "proved_from": sorted(state.proved_from),
        "model_logits": asdict(state.model_logits),
        "logits_given": asdict(state.logits_given),
    }
    return found | {"texts": graphs.texts}, graphs.tensors


def state_of(text: Mapping[str, Any], tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> GraphState:
    """The inverse; `read` gives the model's tensors by their names. Raises as `GraphReader.read` does."""
    graphs, length, mode = _reader(text, tensors)
    gm = graphs.read(text["graph"])
    weights = Weights(read, {name: read_weight(made, graphs) for name, made in text["weights"].items()})
    state = GraphState(gm=gm, weights=weights, length=length, fake_mode=mode, **parts_of(text))
    check_filled(state.placeholders, state)
    return state


def read_graph(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[fx.GraphModule, Any, Any]:
    """The graph alone, the symbol of its length, and the mode of its fake tensors."""
    graphs, length, mode = _reader(text, tensors)
    return graphs.read(text["graph"]), length, mode


def weights_of(text: Mapping[str, Any], read: Callable[[str], Tensor]) -> Weights | None:
    """The weights by themselves; None: a table of theirs is a graph."""
    if any(made[0] == "scores" for made in text["weights"].values()):
        return None
    graphs = GraphReader([], {}, None, None)  # type: ignore[arg-type]
    return Weights(read, {name: read_weight(made, graphs) for name, made in text["weights"].items()})


def parts_of(text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a state besides its graph and weights."""
    return {
        "guards": [],
        "sites": [_site(site) for site in text["sites"]],
        "states": [_state_site(site) for site in text["states"]],
        "positions": [PositionSpec(**position) for position in text["positions"]],
        "limits": [Limit(**limit) for limit in text["limits"]],
        "proved_from": set(text["proved_from"]),
        "model_logits": LogitsSpec(**text["model_logits"]),
        "logits_given": LogitsSpec(**text["logits_given"]),
        **{name: text[name] for name in PLAIN},
    }


def check_filled(placeholders: Iterable[str], state: GraphState) -> None:
    """Raises CannotLoad for inputs that nothing fills."""
    filled = {state.tokens, *filter(input_of, state.inputs), *state.weights, *state.position_inputs}
    unknown = set(placeholders) - filled
    if unknown:
        raise CannotLoad(f"the inputs {', '.join(sorted(unknown))[:80]}, which nothing fills")


def _reader(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[GraphReader, Any, Any]:
    from .fresh_length import fresh_length  # NOTE it imports sympy, which programs that only run do without

    length, mode = fresh_length()
    return GraphReader(text["texts"], tensors, mode, length), length.node.expr, mode


def _site(text: dict[str, Any]) -> AttentionSpec:
    own = {"dtype": of_name("dtype", text["dtype"]), "mask": MaskSpec(**text["mask"])}
    return AttentionSpec(**(text | own))


def _state_site(text: dict[str, Any]) -> StateSpec:
    own = {"dtype": of_name("dtype", text["dtype"]), "shape": tuple(text["shape"]), "sizes": tuple(text["sizes"])}
    return StateSpec(**(text | own))


def history_text(history: History) -> list[dict[str, Any]]:
    return [asdict(record) for record in history]


def history_of(text: list[dict[str, Any]]) -> History:
    return History([PassRecord(**record) for record in text])
