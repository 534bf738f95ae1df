"""A head as it was read for a target, which it does not keep alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ....ir.outputs import PREFIX
from ....ir.verify import LOGITS
from ....program.tree_program import TreeProgram
from ...cost.latency import LatencyTable, Point
from .checkpoint import Tensors, read_config, read_tensors, unreadable
from .eagle3 import Eagle3, taps
from .own_cache import HeadCache
from .products import product_kernel

TIMED_ROWS = (1, 2, 4, 8, 16)
TIMED_CONTEXT = 128
TIMED_CALLS = 5


@dataclass(frozen=True, eq=False)
class OpenedHead:
    """A head's folder, looked at for a target."""

    folder: Path
    config: Mapping[str, Any]
    reads: tuple[str, ...]
    """Names of the target's outputs that the head reads."""
    width: int
    """Of each of them."""
    tensors: Tensors

    @classmethod
    def of(cls, folder: Path, target: TreeProgram) -> OpenedHead:
        """Raises as `LoadedHead.read`."""
        config = read_config(folder)
        reads = tuple(f"{PREFIX}{k}" for k in taps(folder, config, len(target.sites)))
        tensors = Tensors(folder, read_tensors(folder), target.dtype, target.device)
        return cls(folder, config, reads, width_of(target, *reads), tensors)


@dataclass(eq=False)
class LoadedHead:
    folder: Path
    reads: tuple[str, ...]
    """Names of the target's outputs that the head reads."""
    head: Eagle3
    _latency: LatencyTable | None = field(default=None, repr=False)

    @classmethod
    def read(cls, folder: Path, target: TreeProgram) -> LoadedHead:
        """Raises UnreadableModel where the folder holds no head for this target, `Unsupported` where the target has no
        such hidden states."""
        return cls.of(OpenedHead.of(folder, target), target)

    @classmethod
    def of(cls, opened: OpenedHead, target: TreeProgram) -> LoadedHead:
        """Of tensors that nobody else takes; raises as `read`."""
        folder, reads = opened.folder, opened.reads
        head = Eagle3(folder, opened.config, len(reads), opened.width, opened.tensors, product_kernel(target))
        if head.shape.vocab != target.vocab_size:
            got, expected = f"a head for {head.shape.vocab} ids", f"this target's {target.vocab_size}"
            raise unreadable(folder, got, expected)
        loaded = cls(folder, reads, head)
        loaded.embedding(target)
        return loaded

    def embedding(self, target: TreeProgram) -> Tensor:
        """[ids, h]: the head's own, else the target's as it is now. Raises UnreadableModel where there is none."""
        if self.head.embedding is not None:
            return self.head.embedding
        find = getattr(target._model(), "get_input_embeddings", None)
        found = getattr(find() if callable(find) else None, "weight", None)
        shape = (target.vocab_size, self.head.shape.hidden)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            expected = f"it, or a target with get_input_embeddings() of {list(shape)}"
            raise unreadable(self.folder, "no tensor embed_tokens.weight", expected)
        return found.detach()

    def latency(self) -> LatencyTable:
        """Seconds of a call by rows, measured at the first use."""
        if self._latency is None:
            with torch.inference_mode():
                points = [Point(rows, TIMED_CONTEXT, 1, self._seconds(rows)) for rows in TIMED_ROWS]
            self._latency = LatencyTable(points)
        return self._latency

    def _seconds(self, rows: int) -> float:
        """The fastest of a few calls; what they compute is not used."""
        places, shape = self.places(), self.head.shape
        hidden = self.head.fused(self.head.zeros(rows))
        places.add(*2 * (hidden.new_zeros(shape.kv_heads, TIMED_CONTEXT, shape.head_dim),))
        places.commit()
        seen, at = places.chain(rows), torch.arange(rows, device=hidden.device)
        seconds = []
        for _ in range(TIMED_CALLS):
            began = perf_counter()
            q, k, v, beside = self.head.projected(hidden, hidden, at)
            normed, _ = self.head.attended(q, *places.add(k, v), seen, beside)
            self.head.logits(normed)[0, 0].item()  # a device is waited for
            seconds.append(perf_counter() - began)
            places.drop()
        return min(seconds)

    def places(self) -> HeadCache:
        """For one request."""
        shape, like = self.head.shape, self.head.zeros(0)
        return HeadCache(shape.kv_heads, shape.head_dim, like.dtype, like.device)


def width_of(target: TreeProgram, *names: str) -> int:
    """Of the target's hidden states of these names, by the graph that gives them all. Raises `Unsupported` where there
    is no such value."""
    state = target.returning((LOGITS, *names)).state
    return int(dict(zip(state.outputs, state.output.args[0], strict=True))[names[0]].meta["val"].shape[-1])
