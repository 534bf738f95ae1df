"""What option `offload` would do with a model: what stays, what is streamed, and how long reading takes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from torch import nn

from ..capture.call import CallSpec
from ..errors import InvalidOption, NoRoomForWeights
from ..offload.rate import reading_rate
from ..options import Options
from ..passes.streaming.budget import Budget
from ..passes.streaming.plan import layers, make_plan
from ..pipeline import convert


@dataclass(frozen=True)
class OffloadSummary:
    """Bytes of weights as the program reads them. Nothing is streamed where all of them fit."""

    layers: int
    """Of the decoder, that have weights of their own."""
    streamed_layers: int
    resident_bytes: int
    ring_bytes: int
    streamed_bytes: int
    """Read in every step, whatever the tree."""
    files: str
    """The folder."""
    rate: float
    """Bytes a second that were read from there just now."""

    @property
    def seconds(self) -> float:
        """The least that a step takes: reading."""
        return self.streamed_bytes / self.rate if self.rate else 0.0


def explain_offload(model: nn.Module, call: CallSpec, options: Options) -> OffloadSummary:
    """Convert the model under `options.offload`; nothing but a sample is written.

    Raises `Unsupported`, InvalidOption for a budget that cannot be kept, and `NoRoomForWeights`.
    """
    wanted = options.offload
    if wanted is None:
        raise InvalidOption(name="offload", got=None, expected="what may stay in memory")
    state = convert(model, call, options).state
    streaming = state.streaming
    if streaming is None:
        resident = make_plan(state, Budget(wanted.bytes(), wanted.slots)).resident
        return OffloadSummary(len(layers(state)), 0, resident, 0, 0, str(wanted.path), 0.0)
    rate = reading_rate(wanted.path)
    free = shutil.disk_usage(wanted.path).free
    if streaming.bytes > free:
        raise NoRoomForWeights(folder=str(wanted.path), needed=streaming.bytes, free=free)
    streamed = len(streaming.layers)
    return OffloadSummary(
        len(layers(state)) + streamed,
        streamed,
        streaming.resident,
        streaming.slots * streaming.slot_bytes,
        streaming.bytes,
        str(wanted.path),
        rate,
    )
