"""`treespec::fetch` and `treespec::release`: a layer's weights come into a slot of a ring, and make room for others.

A slot is some inputs of the graph, which lie over one piece of memory: the weights of whichever layer is in it. Both
ops say that they write all of them. So data dependence orders them by themselves: what reads a weight of the layer
stands behind its `fetch`, its `release` behind all of that, and the next `fetch` of the slot behind the `release`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .library import define
from .private_torch import OpOverload

_PLACE = re.compile(r"stream_\d+_\d+")


class WeightStream(Protocol):
    """What brings layers into slots."""

    def fetch(self, layer: int) -> None:
        """Return when the layer's weights are in its slot."""

    def release(self, layer: int) -> None:
        """The layer's slot may be filled with another layer."""


@dataclass(frozen=True)
class SlotPlace:
    """Where a weight lies in a slot, as an input of the graph. `offset` is in bytes, `stride` in elements."""

    input: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of a tensor whose elements lie side by side in some order of its dimensions."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StreamedLayer:
    """Layer `number` of those that are streamed, which is layer `of_model` of the decoder; slot `number % slots`."""

    number: int
    of_model: int
    weights: tuple[tuple[str, SlotPlace], ...]
    """Names of weight expressions, each with where it lies."""

    @property
    def bytes(self) -> int:
        return max(place.offset + place.bytes for _, place in self.weights)


@dataclass(frozen=True)
class Streaming:
    """What a graph streams: `handle` names the `WeightStream` that its ops ask."""

    handle: int
    slots: int
    layers: tuple[StreamedLayer, ...]
    resident: int
    """Bytes of the weights that stay."""

    @property
    def slot_bytes(self) -> int:
        return max(layer.bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Read in one pass."""
        return sum(layer.bytes for layer in self.layers)

    def places(self, slot: int) -> list[SlotPlace]:
        """Of all layers that come into a slot, each once."""
        found = {place.input: place for layer in self.layers[slot :: self.slots] for _, place in layer.weights}
        return list(found.values())


def place_name(slot: int, number: int) -> str:
    """The input for a place of a slot."""
    return f"stream_{slot}_{number}"


def is_place(name: str) -> bool:
    """Whether an input of this name lies in a slot."""
    return _PLACE.fullmatch(name) is not None


@dataclass
class _Streams:
    """Streams by handle, held weakly."""

    entered: weakref.WeakValueDictionary[int, WeightStream] = field(default_factory=weakref.WeakValueDictionary)
    numbers: itertools.count[int] = field(default_factory=itertools.count)


_STREAMS = _Streams()


def new_handle() -> int:
    """A number for a graph's ops to name their stream by."""
    return next(_STREAMS.numbers)


def enter(handle: int, stream: WeightStream) -> None:
    """From now on ops with this handle ask this stream. It lives as long as the caller keeps it."""
    _STREAMS.entered[handle] = stream


@contextlib.contextmanager
def entered(handle: int, stream: WeightStream) -> Iterator[None]:
    """Ops with this handle ask this stream inside, and then the one that they asked before."""
    before = _STREAMS.entered.get(handle)
    _STREAMS.entered[handle] = stream
    try:
        yield
    finally:
        if before is not None:
            _STREAMS.entered[handle] = before


def view(memory: Tensor, place: SlotPlace) -> Tensor:
    """The weight that lies at a place of a slot; `memory`: uint8 [bytes], contiguous."""
    flat = memory[place.offset : place.offset + place.bytes].view(place.dtype)
    return flat.as_strided(place.shape, place.stride)


class FromModel:
    """A stream that makes the weights of a layer whenever it is asked for it: for a graph that is run once.

    `build`: the tensor of a weight expression by its name. `places` are the inputs that lie in slots.
    """

    def __init__(self, streaming: Streaming, build: Callable[[str], Tensor]) -> None:
        self._layers, self._build = streaming.layers, build
        slots = [torch.empty(streaming.slot_bytes, dtype=torch.uint8) for _ in range(streaming.slots)]
        self.places = {p.input: view(slot, p) for i, slot in enumerate(slots) for p in streaming.places(i)}

    def fetch(self, layer: int) -> None:
        """Copy them."""
        for name, place in self._layers[layer].weights:
            self.places[place.input].copy_(self._build(name))

    def release(self, layer: int) -> None:
        """Nothing is read ahead."""


def _fetch(stream: int, layer: int, slot: Sequence[Tensor]) -> None:
    _STREAMS.entered[stream].fetch(layer)


def _release(stream: int, layer: int, slot: Sequence[Tensor]) -> None:
    _STREAMS.entered[stream].release(layer)


def _fake(stream: int, layer: int, slot: Sequence[Tensor]) -> None:
    return None


SCHEMA = "(int stream, int layer, Tensor(a!)[] slot) -> ()"
fetch: OpOverload = define("fetch", SCHEMA, _fetch, _fake)
release: OpOverload = define("release", SCHEMA, _release, _fake)
