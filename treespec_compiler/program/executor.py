"""Executor: one place that lowers a tree graph, binds its inputs, records its calls and launches them.

A program, its early exits and its graphs with further outputs are each an executor over a graph of their own; they
share weights, packed weights and caches.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.alone import alone
from ..capture.surroundings import outside_autocast
from ..errors import InvalidOption
from ..ir.device import profile
from ..ir.inputs import BY_NAME, STREAM, TOKENS, pool_names, state_names
from ..ir.streaming import is_place
from ..options import Options
from ..passes.framework.state import GraphState
from ..stages import stage
from .batch import Batch, Buffer, CallSizes, Part, lay_out, pack
from .cache import TreeCache
from .cuda_graphs import CudaRecorder, Graphs, GraphStats, obstacle, run_or_explain
from .kept_code import find
from .links import Link
from .lowering import Lowered, lower_eager, lower_inductor
from .machine import code_name

# Shapes of calls whose inputs a cache keeps: a loop has a few, and each is a few hundred bytes.
MAX_PREPARED = 256


@dataclass
class Bound:
    """The tensors of inputs that stay from call to call, by input name."""

    tensors: Mapping[str, Tensor]
    """Another mapping as soon as one of them is another tensor."""


@dataclass
class Tally:
    """What making and compiling graphs took so far."""

    count: int = 0
    """Calls of the compiler."""
    seconds: float = 0.0


Announce = Callable[[TreeCache, Sequence[int], array], AbstractContextManager[None]]
"""What takes a call as `lay_out` gives it, and is open while it runs."""


class Executor:
    """Runs one tree graph on tree caches. Outputs are valid until the next call.

    `bound` has the tensors of the graph's weights; `own` are those of inputs that this graph alone has. Raises
    `InvalidOption` where `options.cuda_graphs` is True and calls of the graph cannot be recorded.
    """

    def __init__(
        self,
        state: GraphState,
        bound: Bound,
        options: Options,
        own: Mapping[str, Tensor] | None = None,
        tally: Tally | None = None,
        digest: str | None = None,
    ) -> None:
        """`digest`: tells the graph from all others, where it was read from a disk."""
        self.state, self.options, self.digest = state, options, digest
        self.tally = tally or Tally()
        self.device: torch.device = state.device
        self._profile, self._device_type = profile(self.device), self.device.type
        self._weights, self._own = bound, dict(own or {})
        self._placeholders = state.placeholders
        added = {name: name for name in state.inputs} | {state.tokens: TOKENS}
        # NOTE a weight may have the name of an input.
        self.roles = [added.get(name, "") for name in self._placeholders]
        """What each input is, in placeholder order: its name in `ir.inputs`, or another one for weights."""
        places = {role: i for i, role in enumerate(self.roles)}
        self._given = [(place, role) for place, role in enumerate(self.roles) if role in BY_NAME]
        self._pools = [
            (places[name], at)
            for at, name in enumerate(n for site in state.sites for n in pool_names(site.index, bool(site.index_dim)))
        ]
        self._states = [
            (places[name], 2 * site.index + at)
            for site in state.states
            for at, name in enumerate(state_names(site.index))
        ]
        self._tokens, self._stream = places[TOKENS], places.get(STREAM.name)
        self._link = Link.of(state)
        self.announce: Announce | None = None
        """Told of every call before it runs, where other ranks run it too."""
        self._lowered: Lowered | None = None
        self._is_kept = False
        self._bound: Mapping[str, Tensor] | None = None
        self._template: list[Any] = []
        self._graphs, self._no_graphs = self._recording()

    def _recording(self) -> tuple[Graphs | None, str]:
        """What records calls as CUDA graphs, or why nothing does."""
        wanted = self.options.cuda_graphs
        # NOTE the graph of a folder is read when it is asked for
        graph = self.state.graph if self._profile.records else fx.Graph()
        reason = "option cuda_graphs=False" if wanted is False else obstacle(graph, self.device)
        if (self.state.cut is not None or self.state.stage is not None) and not reason:
            reason = "several ranks run it together"
        if self.state.streaming is not None and not reason:
            reason = "weights are streamed"
        if not reason:
            return Graphs(self._inputs_of, self._launch, CudaRecorder(self.device), self.device), ""
        if wanted is True:
            fix = f"This one cannot: {reason}."
            raise InvalidOption(name="cuda_graphs", got=True, expected="a program that can be recorded", fix=fix)
        return None, reason

    @property
    def graph_stats(self) -> GraphStats:
        """What was recorded as CUDA graphs, or why nothing is."""
        return self._graphs.stats() if self._graphs is not None else GraphStats(off=self._no_graphs)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads, streamed ones included."""
        fixed = zip(self._placeholders, self._fixed(), strict=True)
        stays = sum(x.numel() * x.element_size() for name, x in fixed if x is not None and not is_place(name))
        return stays + (self.state.streaming.bytes if self.state.streaming is not None else 0)

    def op_by_op(self) -> Executor:
        """The same graph on the same tensors, neither compiled nor recorded."""
        options = replace(self.options, lowering="eager", cuda_graphs=False)
        return Executor(self.state, self._weights, options, self._own)

    def run(self, parts: Sequence[Part], cache: TreeCache, rows: Sequence[int] | None = None) -> Sequence[Tensor]:
        """The outputs, as in `state.outputs`: logits [rows, V], whose `rows` default to every new node, others [T, D].

        Writes the nodes' K/V, and nothing else of the cache. Of pipeline stages, which all ranks run alike unless one
        announces calls, all give the last one's outputs.
        """
        if self.announce is not None:
            with self.announce(cache, *lay_out(parts, cache, rows, aligned=not self._profile.synchronous)):
                return self._run(parts, cache, rows)
        outputs = self._run(parts, cache, rows)
        if self._link is None:
            return outputs
        return self._link.shared(
            outputs, sum(len(part.tree) - part.start for part in parts) if rows is None else len(rows)
        )

    def _run(self, parts: Sequence[Part], cache: TreeCache, rows: Sequence[int] | None) -> Sequence[Tensor]:
        template = self._fixed()
        if self._graphs is not None and rows is None:
            outputs, self._no_graphs = run_or_explain(self._graphs, parts, cache, template, self.options)
            if outputs is not None:
                return outputs
            if self._no_graphs:
                self._graphs = None
        return self._launch(self._inputs(parts, cache, rows))

    def run_laid_out(self, shape: Sequence[int], numbers: bytes, cache: TreeCache) -> Sequence[Tensor]:
        """As `run`, of a call that was laid out elsewhere, on pools of the same pages."""
        flat = torch.frombuffer(bytearray(numbers), dtype=torch.int64).to(self.device)
        self._fixed()
        batch = CallSizes(*shape).split(flat, aligned=not self._profile.synchronous)
        return self._launch(self._inputs_of(batch, cache))

    def examples(self) -> list[Tensor]:
        """A tensor for every input, in placeholder order: the weights themselves, and zeros of any size."""
        nodes = [n for n in self.state.graph.nodes if n.op == "placeholder"]
        pairs = zip(nodes, self._fixed(), strict=True)
        return [_zeros_like(node) if fixed is None else fixed for node, fixed in pairs]

    def _fixed(self) -> list[Any]:
        """The inputs in placeholder order, None for those of a call; another list when weights were bound again."""
        bound = self._weights.tensors
        if bound is not self._bound:
            self._bound = bound
            self._template = [self._own.get(name, bound.get(name)) for name in self._placeholders]
        return self._template

    def _inputs(self, parts: Sequence[Part], cache: TreeCache, rows: Sequence[int] | None) -> list[Tensor]:
        if not self._profile.synchronous:
            return self._inputs_of(pack(parts, cache, self.device, rows), cache)
        shape, numbers = lay_out(parts, cache, rows)
        # NOTE an id may be that of a graph that is gone; its template cannot be this one's.
        key = (id(self), shape)
        held = cache.prepared.get(key)
        if held is None or held[0] is not self._template:
            if len(cache.prepared) >= MAX_PREPARED:
                cache.prepared.clear()
            buffer = Buffer(CallSizes(*shape), len(numbers))
            held = cache.prepared[key] = (self._template, buffer, self._inputs_of(buffer.batch, cache))
        held[1].fill(numbers)
        return held[2].copy()  # compiled code empties the list it is given

    def _inputs_of(self, batch: Batch, cache: TreeCache) -> list[Tensor]:
        inputs = list(self._template)
        named = batch.named()
        for place, name in self._given:
            inputs[place] = named[name]
        for place, pool in self._pools:
            inputs[place] = cache.pools[pool]
        if cache.states is not None:
            for place, tensor in self._states:
                inputs[place] = cache.states.tensors[tensor]
        return inputs

    def _launch(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if self._link is None:
            return self._launch_here(inputs)

        def here(stream: Tensor | None) -> Sequence[Tensor]:
            if self._stream is not None and stream is not None:
                inputs[self._stream] = stream
            return self._launch_here(inputs)

        return self._link.run(inputs[self._tokens].shape[1], here)

    def _launch_here(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Of this process's graph alone."""
        lowered = self._lowered or self._lower()
        if torch.is_autocast_enabled(self._device_type):
            with outside_autocast():
                return self._launch_here(inputs)
        if not torch.is_grad_enabled():  # entering no_grad again would cost 1 us
            return [output[0] for output in lowered.run(inputs)]
        with torch.no_grad():
            return [output[0] for output in lowered.run(inputs)]

    def _lower(self) -> Lowered:
        with alone():  # another thread may have lowered it while this one waited
            return self._lowered or self._lower_now()

    def _lower_now(self) -> Lowered:
        if self.options.lowering == "eager":
            self._lowered = lower_eager(self.state.gm)
            return self._lowered
        kept = find(code_name(self.digest, self.device)) if self.digest is not None else None
        if kept is not None:
            self._lowered, self._is_kept = Lowered(kept, 0.0), True
            return self._lowered
        with stage("compiling"):
            self._lowered = lower_inductor(self.state.gm, self.roles, self.examples())
        self.tally.count += 1
        self.tally.seconds += self._lowered.seconds
        return self._lowered

    def keep_code(self, digest: str | None) -> None:
        """Keep what was compiled for the graph of this name; it was compared with the model since."""
        if digest is not None and self._lowered is not None and self.options.lowering != "eager" and not self._is_kept:
            self._lowered.keep(code_name(digest, self.device))
            self._is_kept = True


def _zeros_like(node: Any) -> Tensor:
    value = node.meta["val"]
    sizes = [s if isinstance(s, int) else 2 for s in value.shape]
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)
