"""CUDA graphs: calls of a tree program recorded once for each size and replayed with new inputs.

A replay launches every kernel of a step at once, but with the addresses and sizes it was recorded with. So a call is
padded to the next bucket of (nodes, requests, words), and its integers are written into the bucket's own buffer before
each replay: nothing that was recorded holds a number of a call. Padding nodes belong to no request, so they attend to
nothing, and write their K/V nowhere; their outputs are cut off.

Weights and pools are recorded by address. Recordings end with the cache whose pools they read, and all of them when the
program's weights are bound again.
"""

from __future__ import annotations

import time
import warnings
import weakref
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx

from ..codegen.gpu.grouped_linear import has_kernel
from ..codegen.gpu.sizes import power_of_two
from ..errors import CaptureFailed
from ..ir.device import profile
from ..ir.registry import kernel_of
from ..ir.states import is_over_trees
from ..logs import logger
from ..options import Options
from .batch import Batch, CallSizes, Part, lay_out, page_count, word_count
from .cache import TreeCache

log = logger(__name__)

MAX_NODES = 1024
MAX_REQUESTS = 64
# A recording takes about as long as a hundred replays: a size that comes once is not worth one.
USES_BEFORE_CAPTURE = 1
MAX_BUCKETS = 64

InputsOf: TypeAlias = Callable[[Batch, TreeCache], list[Tensor]]
"""The program's inputs for a batch on a cache, in placeholder order."""
RunInputs: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
"""Inputs in placeholder order -> outputs [rows or nodes, ...]; may empty the list."""
CallRecorder: TypeAlias = Callable[[Callable[[], Sequence[Tensor]]], tuple[Callable[[], Any], Sequence[Tensor]]]
"""Records a call: gives what replays it, and its outputs, which every replay writes again."""


aten = torch.ops.aten
INDEXING = frozenset(
    {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten._unsafe_index_put.default}
)


def bucket(parts: Sequence[Part], pages: int = 1) -> CallSizes | None:
    """The recorded size that holds this call: powers of two; None where it is larger than all of them.

    `pages` is the width of the call's page table.
    """
    nodes = sum(len(part.tree.tokens) - part.start for part in parts)
    if nodes > MAX_NODES or len(parts) > MAX_REQUESTS:
        return None
    words = word_count(parts)
    if words > MAX_NODES // 64:
        return None
    padded = power_of_two(nodes)
    return CallSizes(padded, power_of_two(len(parts)), padded, power_of_two(words), pages)


def obstacle(graph: fx.Graph, device: torch.device) -> str:
    """Why calls of a bound tree graph cannot be recorded on this device; empty: they can."""
    if not profile(device).records:
        return f"the model is on {device.type}"
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "").startswith("treespec"):
            kernel = kernel_of(node.target)
            if is_over_trees(node):
                return f"{node.target} reads rows of a stash, for which a recording has no room"
            if kernel is None or not kernel.capturable:
                return f"{node.target} ({kernel.name if kernel else 'the reference'}) waits for the device"
        elif node.op == "call_function" and _waits(node, device):
            return f"{node.target} waits for the device"
    return ""


def _waits(node: fx.Node, device: torch.device) -> bool:
    """Whether an op that is not ours reads numbers back: by its tags; grouped products, but for those of one kernel."""
    name, value = str(node.target), node.meta.get("val")
    if "grouped_mm" in name:
        own = name.startswith("aten.") and getattr(value, "dtype", None) == torch.bfloat16
        return not (own and has_kernel(device))
    if node.target in INDEXING:
        # Tagged for its boolean masks, which are counted on the host; places are not.
        places = cast(Sequence[fx.Node | None], node.args[1])
        return any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in places)
    tags = getattr(node.target, "tags", ())
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


@dataclass(frozen=True)
class GraphStats:
    """What was recorded, and how calls were run."""

    held: int = 0
    """Recordings there are now, of at most `limit`."""
    limit: int = 0
    captures: int = 0
    """Recordings ever made; `seconds` of making them."""
    seconds: float = 0.0
    replays: int = 0
    launches: int = 0
    """Calls that ran kernel by kernel: larger than every bucket, or of a size that came for the first time."""
    evicted: int = 0
    dropped: int = 0
    """Recordings that ended with their cache or weights."""
    off: str = ""
    """Why there are none; empty: they are used."""

    def __str__(self) -> str:
        if self.off:
            return f"no CUDA graphs ({self.off})"
        return f"{self.held} of at most {self.limit} CUDA graphs"


@dataclass
class _Entry:
    """A bucket of one cache: its static inputs and, from the second use on, its recording."""

    shape: CallSizes
    flat: Tensor  # int64, on the device
    inputs: list[Tensor]
    uses: int = 0
    replay: Callable[[], Any] | None = None
    outputs: Sequence[Tensor] = ()

    def fill(self, numbers: array[int]) -> None:
        # NOTE pageable memory on purpose: the copy has left it when this returns, so the next call may be laid out
        # while this one still waits. From pinned memory the device would read later, and find the next call's numbers.
        self.flat.copy_(torch.frombuffer(numbers, dtype=torch.int64), non_blocking=True)


@dataclass
class Graphs:
    """Recordings of one program's calls."""

    inputs_of: InputsOf
    launch: RunInputs
    record: CallRecorder
    device: torch.device
    limit: int = MAX_BUCKETS
    _entries: OrderedDict[tuple[int, CallSizes], _Entry] = field(default_factory=OrderedDict)
    _pools: dict[int, Sequence[Tensor]] = field(default_factory=dict)  # of the caches that are recorded, by their id
    _template: Any = None
    _counts: Counter[str] = field(default_factory=Counter)
    _seconds: float = 0.0

    def run(self, parts: Sequence[Part], cache: TreeCache, template: object) -> Sequence[Tensor] | None:
        """Outputs [nodes, ...], valid until the next call of this size; None: the call is larger than every bucket.

        `template` is the identity of the bound weights: with another one, every recording ends.
        """
        shape = bucket(parts, page_count(parts, cache))
        if shape is None:
            self._counts["launches"] += 1
            return None
        if template is not self._template:
            self.clear()
            self._template = template
        entry = self._entry(cache, shape)
        entry.fill(lay_out(parts, cache, room=shape, aligned=True)[1])
        nodes = sum(len(part.tree.tokens) - part.start for part in parts)
        entry.uses += 1
        if entry.replay is None and entry.uses <= USES_BEFORE_CAPTURE:
            self._counts["launches"] += 1
            return [output[:nodes] for output in self.launch(entry.inputs.copy())]
        if entry.replay is None:
            self._capture(entry)
        assert entry.replay is not None
        entry.replay()
        self._counts["replays"] += 1
        return [output[:nodes] for output in entry.outputs]

    def clear(self) -> None:
        """End every recording."""
        self._counts["dropped"] += self._held()
        self._entries.clear()

    def stats(self) -> GraphStats:
        n = self._counts
        return GraphStats(
            held=self._held(),
            limit=self.limit,
            captures=n["captures"],
            seconds=self._seconds,
            replays=n["replays"],
            launches=n["launches"],
            evicted=n["evicted"],
            dropped=n["dropped"],
        )

    def _entry(self, cache: TreeCache, shape: CallSizes) -> _Entry:
        key = (id(cache), shape)
        if self._pools.get(id(cache)) is not cache.pools:  # another cache, or one that has grown
            self._end(id(cache))
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            return entry
        while len(self._entries) >= self.limit:
            _, oldest = self._entries.popitem(last=False)
            self._counts["evicted"] += oldest.replay is not None
        if id(cache) not in self._pools:
            self._pools[id(cache)] = cache.pools
            weakref.finalize(cache, _forget, weakref.ref(self), id(cache))
        with torch.inference_mode(False):
            flat = torch.zeros(shape.integers, dtype=torch.int64, device=self.device)
            entry = _Entry(shape, flat, self.inputs_of(shape.split(flat, aligned=True), cache))
        self._entries[key] = entry
        return entry

    def _capture(self, entry: _Entry) -> None:
        began = time.perf_counter()
        # The outputs outlive the mode that the first caller happens to be in: they are inference tensors only if they
        # must be, because the pools that are written are.
        must = any(x.is_inference() for x in entry.inputs)
        try:
            with torch.inference_mode(must):
                entry.replay, entry.outputs = self.record(lambda: self.launch(entry.inputs.copy()))
        except RuntimeError as error:
            problem = str(error).strip().partition("\n")[0]
            raise CaptureFailed(problem=f"{type(error).__name__} ({problem})") from error
        self._counts["captures"] += 1
        self._seconds += time.perf_counter() - began
        log.info("recorded a CUDA graph of %s in %.2f s", entry.shape, time.perf_counter() - began)

    def _held(self) -> int:
        return sum(entry.replay is not None for entry in self._entries.values())

    def _end(self, cache_id: int) -> None:
        self._pools.pop(cache_id, None)
        for key in [key for key in self._entries if key[0] == cache_id]:
            self._counts["dropped"] += self._entries.pop(key).replay is not None


def run_or_explain(
    graphs: Graphs, parts: Sequence[Part], cache: TreeCache, template: object, options: Options
) -> tuple[Sequence[Tensor] | None, str]:
    """`graphs.run`; and where recording failed under `cuda_graphs="auto"`, why, with one warning."""
    try:
        return graphs.run(parts, cache, template), ""
    except CaptureFailed as error:
        if options.cuda_graphs is True:
            raise
        log.warning("%s Steps run kernel by kernel.", error)
        return None, error.problem


def _forget(graphs: weakref.ref[Graphs], cache_id: int) -> None:
    found = graphs()
    if found is not None:
        found._end(cache_id)


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`; all recordings share one pool of memory, since one runs at a time.

    They share a stream too: memory of a pool is not used again by another stream's recording, and libraries keep a
    workspace for each stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._side: Any = None
        self._anchor: Any = None

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], Any], Sequence[Tensor]]:
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._start()
            here, side = torch.cuda.current_stream(), self._side
            side.wait_stream(here)
            with torch.cuda.stream(side):
                run()  # libraries set up their workspaces for a stream at its first use, which cannot be recorded
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with self._recording(graph):
                    outputs = run()
            except BaseException:
                # NOTE leaving a recording that became invalid raises before the stream is put back, and leaves its
                # pool in use.
                torch.cuda.set_stream(here)
                self._pool = self._side = self._anchor = None
                raise
        return graph.replay, outputs

    def _start(self) -> None:
        """A pool and a stream. An empty recording keeps the pool: one whose last recording has ended takes no new ones
        as long as anybody holds a tensor in it, such as outputs."""
        self._pool, self._side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._anchor = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is empty
            with self._recording(self._anchor):
                pass

    def _recording(self, graph: Any) -> AbstractContextManager[Any]:
        # Other threads may allocate meanwhile.
        return torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local")
