"""A small stream without a model: layers of known bytes, and what reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from treespec_compiler.ir.streaming import SlotPlace, StreamedLayer, Streaming, new_handle
from treespec_compiler.offload.ring import Ring
from treespec_compiler.offload.store import WeightStore

SHAPES = ((40, 30), (7,), (30, 5))


def streaming(layers: int = 5, slots: int = 2) -> Streaming:
    """Layers of three weights each, one of them transposed in memory and one in bfloat16."""
    made = []
    for number in range(layers):
        slot, offset, weights = number % slots, 0, []
        for i, shape in enumerate(SHAPES):
            dtype = torch.bfloat16 if i == 1 else torch.float32
            stride = (1, shape[0]) if i == 2 else torch.empty(shape).stride()
            place = SlotPlace(f"stream_{slot}_{i}", offset, shape, tuple(stride), dtype)
            weights.append((f"w{number}_{i}", place))
            offset += -(-place.bytes // 64) * 64
        made.append(StreamedLayer(number, number, tuple(weights)))
    return Streaming(new_handle(), slots, tuple(made), 0)


def weight(name: str) -> Tensor:
    """The weight of this name: random, and the same whenever it is asked for."""
    layer, index = map(int, name.removeprefix("w").split("_"))
    made = torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(100 * layer + index))
    return made.to(torch.bfloat16) if index == 1 else made


def opened(folder: Path, layers: int = 5, slots: int = 2) -> Ring:
    found = streaming(layers, slots)
    return Ring(found, WeightStore(folder, found, "key", weight))


def assert_there(ring: Ring, layer: int) -> None:
    """Every weight of a layer, bit by bit, is in its slot."""
    for name, place in ring.streaming.layers[layer].weights:
        assert torch.equal(ring.places[place.input], weight(name)), name
