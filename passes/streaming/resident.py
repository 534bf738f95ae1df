"""The first layers of a graph that streams, with their weights as inputs again: for a part of it that runs alone."""

from __future__ import annotations

import torch
from torch import fx

from treespec_compiler.ir.streaming import SlotPlace, StreamedLayer, fetch, release

from ..framework.state import GraphState


def make_resident(state: GraphState, layers: int) -> int:
    """Layers of the decoder up to this many read inputs of their own instead of slots; returns how many did.

    Their `fetch` and `release` have nothing to bring any more, and are gone.
    """
    streaming = state.streaming
    wanted = {} if streaming is None else {each.number: each for each in streaming.layers if each.of_model < layers}
    inside: list[tuple[StreamedLayer, dict[fx.Node, fx.Node]]] = []  # fetched, not released; its inputs by place
    for node in list(state.graph.nodes):
        if node.target in (fetch, release):
            layer = wanted.get(node.args[1])
            if layer is None:
                continue
            if node.target is fetch:
                inside.append((layer, {state.node(p.input): _input(state, name, p) for name, p in layer.weights}))
            else:
                inside = [(other, inputs) for other, inputs in inside if other is not layer]
            state.graph.erase_node(node)
            continue
        for _, inputs in inside:
            for place in [p for p in node.all_input_nodes if p in inputs]:
                node.replace_input_with(place, inputs[place])
    return len(wanted)


def _input(state: GraphState, name: str, place: SlotPlace) -> fx.Node:
    """The input of a weight that was streamed, laid out as in its slot."""
    with state.fake_mode:
        value = torch.empty_strided(place.shape, place.stride, dtype=place.dtype)
    node = state.add_fake_input(name, value)
    state.weights.add(node.name, state.weights.streamed[name])
    return node
