"""What steps take on this machine: measured tables of forward passes, and the speed that a tree promises.

    speedup = tokens per step / (verify(N) / decode + draft calls x draft / decode + overhead / decode)

A table holds seconds of one tree-program call for some numbers of nodes and context lengths; between them it is
interpolated. Tables are files in the user's cache directory, one for each model shape, device, thread count and set of
versions; `treespec tune --latency` measures them thoroughly, `generate(policy="auto")` roughly when there is none.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ... import user_cache
from ...errors import CorruptTable
from ...ir.device import profile
from ...logs import logger
from ...tree import Forest, TokenTree
from ...versions import versions
from ..sampling.chance import SeededChance
from ..sampling.device_rows import row_sampler, stays_on_device
from ..sampling.samplers import SAMPLERS
from ..sampling.settings import Sampling

if TYPE_CHECKING:
    from ...program.tree_program import TreeProgram

log = logger(__name__)

SCHEMA = 2
QUICK_NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
QUICK_CONTEXTS = (128, 1024)
STREAMED_NODES, STREAMED_CONTEXTS = (1, 16, 64, 256), (512,)
"""Where weights are streamed: calls take seconds, and hardly more behind longer contexts."""
FULL_NODES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64)
FULL_CONTEXTS = (32, 128, 512, 1024, 2048)
FULL_BATCHES = (1, 4)
CONTEXT_GRAIN = 256
SLOW = 0.05
ROUNDS = 3
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Point:
    """`seconds` of a call that runs a chain of `nodes` nodes behind `context` tokens in each of `batch` slots."""

    nodes: int
    context: int
    batch: int
    seconds: float

    def no_less_than(self, other: Point) -> bool:
        """Whether this call does at least the other's work."""
        return self.nodes >= other.nodes and self.context >= other.context and self.batch >= other.batch


@dataclass
class LatencyTable:
    """Measured calls of one tree program."""

    points: list[Point]
    measured: bool = True
    sampled_row: float = 0.0
    """Seconds to turn a row of logits into a distribution and to draw three children from it."""
    _curves: dict[tuple[int, int], list[float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # NOTE a call that did no less work in less time shows that the rest was noise. The other way round (nothing is
        # faster than a smaller call) one stalled call would spoil all larger ones.
        self.points = [
            replace(point, seconds=min(p.seconds for p in self.points if p.no_less_than(point)))
            for point in self.points
        ]

    @classmethod
    def assumed(cls, call: float = 1.0, node: float = 0.02) -> LatencyTable:
        """For programs that cannot be measured: a call and a little for every further node, in arbitrary units."""
        return cls([Point(1, 0, 1, call), Point(2, 0, 1, call + node)], measured=False)

    def scaled(self, factor: float) -> LatencyTable:
        """The same calls, `factor` times as long."""
        points = [replace(point, seconds=factor * point.seconds) for point in self.points]
        return LatencyTable(points, self.measured, self.sampled_row)

    def seconds(self, nodes: int, context: int = 0, batch: int = 1) -> float:
        """Interpolated in nodes and context. A batch that was not measured is taken for its nodes in one slot."""
        if batch > 1 and not any(point.batch == batch for point in self.points):
            nodes, batch = nodes * batch, 1
        curve = self.curve(context, batch)
        if nodes < len(curve):
            return curve[nodes]
        return curve[-1] + (nodes - len(curve) + 1) * max(0.0, curve[-1] - curve[-2])

    def curve(self, context: int, batch: int = 1) -> list[float]:
        """Seconds by number of nodes (entry 0: none) at this context, to the next multiple of `CONTEXT_GRAIN`."""
        key = (-(-context // CONTEXT_GRAIN), batch)
        if key not in self._curves:
            self._curves[key] = self._curve(key[0] * CONTEXT_GRAIN, batch)
        return self._curves[key]

    def _curve(self, context: int, batch: int) -> list[float]:
        rows: dict[int, dict[int, float]] = {}
        for point in self.points:
            if point.batch == batch:
                rows.setdefault(point.context, {})[point.nodes] = point.seconds
        largest = max(nodes for row in rows.values() for nodes in row)
        contexts = sorted(rows)
        curves = {c: [_interpolate(sorted(rows[c].items()), n) for n in range(1, largest + 2)] for c in contexts}
        return [0.0, *(_interpolate([(c, curves[c][i]) for c in contexts], context) for i in range(largest + 1))]


def _interpolate(known: Sequence[tuple[int, float]], at: int) -> float:
    """Through the points, beyond the last one with the last slope; before the first one its value."""
    if len(known) == 1 or at <= known[0][0]:
        return known[0][1]
    i = min(bisect_right(known, (at, float("inf"))), len(known) - 1)
    (x0, y0), (x1, y1) = known[i - 1], known[i]
    return max(0.0, y0 + (y1 - y0) * (at - x0) / (x1 - x0))


@dataclass
class CostModel:
    """What a step takes: a pass of the target, the draft's calls, and the rest."""

    target: LatencyTable
    drafts: list[LatencyTable | None]
    """One a draft; None: its proposals take no noticeable time."""
    overhead: float = 0.0
    """Of a step, beyond plain decoding's: proposing, choosing the path, committing."""
    sampled_row: float = 0.0
    """Of every row that sampling works on beyond plain decoding's one: the draft's, and the target's below the root."""

    @property
    def measured(self) -> bool:
        return self.target.measured and all(table is None or table.measured for table in self.drafts)

    def verify(self, nodes: int, context: int = 0, batch: int = 1) -> float:
        return self.target.seconds(nodes, context, batch)

    def draft(self, index: int, rows: Sequence[int], context: int = 0) -> float:
        """Of calls that run `rows` nodes each."""
        table = self.drafts[index]
        if table is None:
            return 0.0
        curve = table.curve(context)
        return sum(curve[n] if n < len(curve) else table.seconds(n, context) for n in rows)

    def step(self, index: int, nodes: int, rows: Sequence[int], context: int = 0) -> float:
        """A whole step with draft `index`; without rows it is plain decoding."""
        seconds = self.verify(nodes, context) + self.draft(index, rows, context)
        if nodes == 1:
            return seconds
        drawn = sum(rows) if self.drafts[index] is not None else 0
        return seconds + self.overhead + self.sampled_row * (drawn + nodes - 1)


def fingerprint(program: Any) -> str | None:
    """What a program's speed depends on: its graph, sizes and dtypes (not values), device, threads and versions."""
    graph = getattr(program, "graph_digest", None)
    if graph is None:
        return None
    options = program.options
    how = [options.lowering, options.kernels, *([options.cuda_graphs] if profile(program.device).records else [])]
    if options.offload is not None:
        how += [str(options.offload.path), program.weight_bytes]
    parts = [SCHEMA, graph, repr(how), *meta(program).values()]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def meta(program: TreeProgram) -> dict[str, Any]:
    """What a table is valid for, readable."""
    device = program.device
    name = profile(device).describe(device)
    return {"device": name, "threads": torch.get_num_threads(), **versions("torch")}


def table_path(key: str) -> Path:
    return user_cache.cache_dir() / "latency" / f"{key}.json"


def read_table(path: Path) -> LatencyTable:
    """A table from its file; raises `CorruptTable`."""
    data, expected = user_cache.read_table(path, SCHEMA), "a JSON object with schema, meta and entries"
    try:
        sampled_row = float(data["sampled_row"])
        points = [
            Point(int(e["nodes"]), int(e["context"]), int(e["batch"]), float(e["seconds"])) for e in data["entries"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptTable(path=str(path), problem=f"an entry without {error}", expected=expected) from error
    good = all(p.nodes > 0 and p.context >= 0 and p.batch > 0 and 0 < p.seconds < 1e6 for p in points)
    if not good or not 0 <= sampled_row < 1 or len({p.nodes for p in points if p.batch == 1}) < 2:
        raise CorruptTable(path=str(path), problem="entries that are no measurements", expected="two or more, above 0")
    return LatencyTable(points, sampled_row=sampled_row)


def write_table(path: Path, table: LatencyTable, about: dict[str, Any]) -> None:
    """Whole or not at all, also when several processes write."""
    entries = [asdict(point) for point in table.points]
    data = {"schema": SCHEMA, "meta": about, "sampled_row": table.sampled_row, "entries": entries}
    user_cache.write_whole(path, json.dumps(data, indent=1))


def measure(
    program: Any,
    nodes: Sequence[int] = QUICK_NODES,
    contexts: Sequence[int] = QUICK_CONTEXTS,
    batches: Sequence[int] = (1,),
    budget: float = 0.01,
    clock: Clock = perf_counter,
) -> LatencyTable:
    """Time calls of a program, `budget` seconds or six calls a point (slow ones: two), whichever is more.

    The fastest call counts: what else the machine was busy with is no property of the program. Points are timed in
    `ROUNDS` rounds, as a busy moment spoils all calls that follow each other.
    """
    limit = program.max_context or max(contexts) + max(nodes)
    fitting = [c for c in contexts if c + max(nodes) <= limit] or [max(0, limit - max(nodes))]
    calls: dict[tuple[int, int, int], Callable[[], Any]] = {}
    for batch in batches:
        cache = program.new_cache(max_tokens=max(fitting) + max(nodes), slots=batch)
        for context in fitting:
            for n in nodes:
                chain = TokenTree._trusted([1] * n, range(-1, n - 1))
                tree = Forest((slot, chain) for slot in range(batch)) if batch > 1 else chain
                calls[n, context, batch] = partial(_call, program, tree, cache, [context] * batch)
    best = {point: _time(call, budget / ROUNDS, clock) for point, call in calls.items()}
    for _ in range(ROUNDS - 1):
        for point, call in calls.items():
            if best[point] < SLOW:
                best[point] = min(best[point], _time(call, budget / ROUNDS, clock))
    points = [Point(*point, seconds) for point, seconds in best.items()]
    rows = 8 if stays_on_device(program) else 1  # a device takes a level at once
    return LatencyTable(points, sampled_row=_time(_sampled_rows(program, rows), budget, clock) / rows)


def _sampled_rows(program: Any, rows: int) -> Callable[[], Any]:
    """What sampling does for the nodes of a draft's tree."""
    logits = torch.randn(rows, program.vocab_size, generator=torch.Generator().manual_seed(0)).to(program.device)
    sampler = row_sampler(
        program, Sampling(temperature=1.0), SAMPLERS["without-replacement"], SeededChance(0), program.vocab_size
    )

    def work() -> None:
        sampler.draw(logits, [3] * rows, None)

    return work


def _call(program: Any, tree: Any, cache: Any, lengths: list[int]) -> Any:
    # NOTE the speed does not depend on what the K/V are, so nothing is prefilled.
    cache._lengths = lengths
    return program.verify(tree, cache)


def _time(call: Callable[[], Any], budget: float, clock: Clock) -> float:
    with torch.inference_mode():
        call()
        seconds: list[float] = []
        while len(seconds) < 2 or (sum(seconds) < budget and len(seconds) < 1000):
            began = clock()
            out = call()
            if out is not None:
                profile(out.device).synchronize()
            seconds.append(clock() - began)
    return min(seconds)


_KEPT: weakref.WeakKeyDictionary[Any, LatencyTable] = weakref.WeakKeyDictionary()


def latency(program: Any, thorough: bool = False) -> LatencyTable:
    """The program's table: kept with it, from the user's cache, or measured now and stored."""
    kept = _KEPT.get(program)
    if kept is not None and not thorough:
        return kept
    key = fingerprint(program)
    if key is None:
        return LatencyTable.assumed()
    path = table_path(key)
    table = None
    if path.is_file() and not thorough:
        try:
            table = read_table(path)
        except CorruptTable as error:
            log.warning("%s It is ignored.", error)
    if table is None:
        settings: dict[str, Any] = {}
        if getattr(program, "stream_stats", None) is not None:
            settings = {"nodes": STREAMED_NODES, "contexts": STREAMED_CONTEXTS}
        elif thorough:
            settings = {"nodes": FULL_NODES, "contexts": FULL_CONTEXTS, "batches": FULL_BATCHES, "budget": 0.1}
        table = measure(program, **settings)
        try:
            write_table(path, table, meta(program))
        except OSError as error:
            log.warning("the latency table %s cannot be written (%s)", path, error)
    _KEPT[program] = table
    return table
