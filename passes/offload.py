"""offload: weights of layers that do not fit into memory come from a stream, layer by layer, and make room again.

Off without option offload. Between the cut before a layer and the one behind it (`residual.stream`) its weights are
inputs that lie in a slot: `treespec::fetch` brings them there, `treespec::release` gives the slot up. What is resident,
and the logits, are what they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from treespec_compiler.errors import InvalidOption
from treespec_compiler.ir.streaming import SlotPlace, StreamedLayer, Streaming, fetch, new_handle, place_name, release

from .framework.manager import Pass
from .framework.state import GraphState
from .streaming.plan import Layer, make_plan


def offload(state: GraphState) -> int:
    """Returns how many layers are streamed."""
    if state.budget is None:
        return 0
    if state.device.type != "cpu":
        fix = "Streaming to a GPU is not built yet: leave the option out there."
        raise InvalidOption(name="offload", got=f"a model on {state.device}", expected="one on a CPU", fix=fix)
    plan = make_plan(state, state.budget)
    if not plan.streamed:
        return 0
    handle, slots = new_handle(), plan.slots
    inputs = _Inputs(state)
    made = []
    for number, layer in enumerate(plan.streamed):
        places = [inputs.at(number % slots, place) for place in layer.places()]
        weights = [(node.name, place) for node, (_, place) in zip(layer.weights, places, strict=True)]
        made.append(StreamedLayer(number, layer.number, tuple(weights)))
        _stream(state, layer, [node for node, _ in places], handle, number)
    state.streaming = Streaming(handle, slots, tuple(made), plan.resident)
    return len(made)


class _Inputs:
    """The inputs that lie in slots: one for each place of each slot."""

    def __init__(self, state: GraphState) -> None:
        self._state = state
        self._known: dict[tuple[int, SlotPlace], tuple[fx.Node, SlotPlace]] = {}
        self._counts: dict[int, int] = {}

    def at(self, slot: int, place: SlotPlace) -> tuple[fx.Node, SlotPlace]:
        """The input of a place without a name, and the place with it."""
        if (slot, place) not in self._known:
            number = self._counts.get(slot, 0)
            self._counts[slot] = number + 1
            with self._state.fake_mode:
                value = torch.empty_strided(place.shape, place.stride, dtype=place.dtype)
            node = self._state.add_fake_input(place_name(slot, number), value)
            named = SlotPlace(node.name, place.offset, place.shape, place.stride, place.dtype)
            self._known[slot, place] = node, named
        return self._known[slot, place]


def _stream(state: GraphState, layer: Layer, places: Sequence[fx.Node], handle: int, number: int) -> None:
    for node, place in zip(layer.weights, places, strict=True):
        node.replace_all_uses_with(place)
        state.stream(node.name)
    arguments = (handle, number, list(dict.fromkeys(places)))
    state.call(release, arguments, like=layer.last.next)
    state.call(fetch, arguments, like=_behind(layer.first))


def _behind(cut: fx.Node) -> fx.Node:
    """What follows a cut, and the release of the layer that ends there."""
    node = cut.next
    while node.target is release:
        node = node.next
    return node


PASS = Pass(
    "offload",
    offload,
    before="rows are selected",
    after="same level; each streamed layer's weights are fetched before it and released behind it",
    optional=True,
    needs=("select rows",),
    place_after=("bind kernels",),
    standard=False,
    wanted=lambda state, options: state.budget is not None,
)
