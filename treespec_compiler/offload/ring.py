"""The ring: a few slots of memory, filled by threads with the layers that come next.

Layer i lies in slot i % slots. When a layer is released, the next one of its slot is read, past the end of the pass
the first ones of the next pass, so that the disk works while a draft runs. Which layer comes next is a guess: `fetch`
waits for what it asks for, and reads it then where the guess was wrong.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightsUnreadable
from ..ir.streaming import Streaming, enter, view
from ..logs import logger
from .reading import THREADS, read_file
from .store import WeightStore, padded
from .timeline import note

log = logger(__name__)


@dataclass
class StreamStats:
    """What streaming took so far."""

    bytes: int = 0
    """Read from files."""
    waited: float = 0.0
    """Seconds that computing stood still for weights."""
    read: float = 0.0
    """Seconds during which anything was read, from the first piece of a layer to its last."""


class Ring:
    """Brings a store's layers into memory; the `WeightStream` of a graph's ops.

    `places` are the inputs of the graph that lie in its slots. Raises `WeightsUnreadable` in `fetch`; nothing
    hangs, and the next `fetch` tries again.
    """

    def __init__(self, streaming: Streaming, store: WeightStore, stats: StreamStats | None = None) -> None:
        """`stats`: to add to."""
        self.streaming, self.store = streaming, store
        self.stats = stats or StreamStats()
        self._lock = threading.RLock()
        size = padded(streaming.slot_bytes)
        self._memory = [mmap.mmap(-1, size) for _ in range(streaming.slots)]
        self._slots = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._memory]
        self.places: dict[str, Tensor] = {
            place.input: view(self._slots[slot], place)
            for slot in range(streaming.slots)
            for place in streaming.places(slot)
        }
        self._reads: list[tuple[int, Future[None]] | None] = [None] * streaming.slots
        self._good: set[int] = set()  # layers whose blob was compared with its checksum
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="treespec weights")
        self._layers = ThreadPoolExecutor(streaming.slots, thread_name_prefix="treespec layer")
        for pool in (self._pool, self._layers):
            weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        enter(streaming.handle, self)
        for number in range(min(streaming.slots, len(streaming.layers))):
            self._begin(number)

    def fetch(self, layer: int) -> None:
        """Return when the layer's weights are in its slot."""
        began = time.perf_counter()
        slot = layer % self.streaming.slots
        held = self._reads[slot]
        if held is None or held[0] != layer or (held[1].done() and held[1].exception() is not None):
            if held is not None:
                held[1].exception()  # until nobody writes to the slot any more
            held = self._begin(layer)
        try:
            held[1].result()
        finally:
            self.stats.waited += time.perf_counter() - began
            note("wait", began)

    def release(self, layer: int) -> None:
        """Read what comes into the layer's slot next."""
        slots, count = self.streaming.slots, len(self.streaming.layers)
        following = layer + slots if layer + slots < count else layer % slots
        if following != layer:
            self._begin(following)

    def renew(self, store: WeightStore) -> None:
        """Go on with the blobs of another store of the same layout."""
        for held in self._reads:
            if held is not None:
                held[1].exception()
        self.store = store
        self._reads = [None] * self.streaming.slots
        self._good.clear()
        for number in range(min(self.streaming.slots, len(self.streaming.layers))):
            self._begin(number)

    def _begin(self, layer: int) -> tuple[int, Future[None]]:
        held = (layer, self._layers.submit(_fill, weakref.ref(self), layer))
        self._reads[layer % self.streaming.slots] = held
        return held

    def _fill_slot(self, layer: int) -> None:
        began = time.perf_counter()
        slot = self._slots[layer % self.streaming.slots]
        blob = self.store.blob(layer)
        read_file(blob.path, blob.bytes, slot, self._pool)
        if layer not in self._good:
            if zlib.crc32(slot[: blob.bytes].numpy().data) != blob.crc:
                log.warning("%s is damaged: the weights of layer %d are written anew", blob.path, layer)
                with self._lock:
                    blob = self.store.rewrite(layer)
                read_file(blob.path, blob.bytes, slot, self._pool)
                if zlib.crc32(slot[: blob.bytes].numpy().data) != blob.crc:
                    raise WeightsUnreadable(path=str(blob.path), offset=0, problem="bytes that were not written")
            self._good.add(layer)
        with self._lock:
            self.stats.bytes += blob.bytes
            self.stats.read += time.perf_counter() - began
        note("read", began, str(self.streaming.layers[layer].of_model))


def _fill(ring: weakref.ref[Ring], layer: int) -> None:
    # NOTE a thread that held the ring would keep it alive, and be its own reason to run.
    alive = ring()
    if alive is not None:
        alive._fill_slot(layer)
