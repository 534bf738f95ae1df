"""A graph's stream: the ring over the store of the model's present weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..ir.streaming import Streaming
from ..ir.weights import Expression, Read
from ..offload_options import Offload
from .paging import page_out
from .ring import Ring, StreamStats
from .store import Build, WeightStore, store_key


class OpenStream:
    """`made` are the weight expressions by name, `read` gives the model's tensors.

    Raises what `WeightStore` raises.
    """

    def __init__(self, streaming: Streaming, options: Offload, made: Mapping[str, Expression], read: Read) -> None:
        self._streaming, self._options, self._made, self._read = streaming, options, made, read
        self._ring: Ring | None = None
        self._key, self._stats = "", StreamStats()

    def bind(self, sums: Sequence[tuple[str, int]]) -> Mapping[str, Tensor]:
        """The inputs that lie in slots, once the files hold the present weights; `sums`: checksums of what they are
        made from, by name.
        """
        needed = {source for name in self._made for source in self._made[name].sources}
        key = store_key(self._streaming, self._made, [(name, total) for name, total in sums if name in needed])
        if self._ring is None or key != self._key:
            store = WeightStore(self._options.path, self._streaming, key, _build(self._made, self._read))
            if self._ring is None:
                self._ring = Ring(self._streaming, store, self._stats)
            else:
                self._ring.renew(store)
            self._key = key
        return self._ring.places

    def rest(self) -> None:
        """Give up the ring's memory, until it is bound again."""
        self._ring = None

    @property
    def stats(self) -> StreamStats:
        """What streaming took so far."""
        return replace(self._stats)


def _build(made: Mapping[str, Expression], read: Read) -> Build:
    """Makes weights for files. Pages of mapped tensors go back at once: a model may be larger than memory."""

    def build(name: str) -> Tensor:
        tensor = made[name].build(read)
        page_out(read(source) for source in made[name].sources)
        return tensor

    return build
