"""What is made of a model in one state of its code: the graph, its weights and what runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..capture.call import CallSpec
from ..capture.quantized_weights import own_tensors
from ..capture.state_changes import kept_values
from ..converted import Converted
from ..ir import ops
from ..ir.registry import best_kernel
from ..offload.opened import OpenStream
from ..offload.paging import page_out, trim
from ..options import Options
from ..passes.framework.state import GraphState
from ..passes.framework.weights import PackedBytes, Weights
from .executor import Bound, Executor, Tally
from .saved.store import Entry
from .semantics import lengths_check, semantic_check
from .weights import Changes, WeightWatch

Derive: TypeAlias = Callable[[GraphState], tuple[GraphState, Mapping[str, Tensor]]]
"""Makes another graph of a program's, which it leaves as it is, and the tensors of inputs that it adds."""


class Made:
    """A model, converted as it is now. Kept when the model's code changes, so that it can be taken again when its state
    returns. Raises `Unsupported`.

    `tally` counts what making it took; `tallies` are those of variants, by their keys.
    """

    def __init__(
        self,
        model: nn.Module,
        call: CallSpec,
        options: Options,
        tally: Tally,
        tallies: dict[Hashable, Tally],
        converted: Converted | None = None,
        looked_at: Sequence[int] | None = None,
    ) -> None:
        """`converted`: what the pipeline gave for it, where somebody watched it, or what was saved. `looked_at`:
        checksums of the weights with which single lengths were looked at before, in the same state of code and Python.
        """
        started = time.perf_counter()
        self.call, self.options = call, options
        self.saved: Entry | None = None
        """The saved program that this is; None: it was converted here."""
        self._tally, self._tallies = tally, tallies
        self.converted: Converted = converted or _converted(model, call, options)
        self.state: GraphState = self.converted.state
        self.watch = WeightWatch(model, self.converted.sources, self.converted.proved_from)
        self._build_slices()
        if not self.converted.compared and self.watch.sums != looked_at:
            lengths_check(model, call, self.state)
        if self.watch.touched() or (self.converted.kept and self.otherwise(model) is not None):
            raise kept_values()
        self.dtype: torch.dtype = self.state.dtype
        self.device: torch.device = self.state.device
        self.vocab_size = self.state.vocab_size
        self.input_vocab = self.converted.input_vocab or self.vocab_size
        self.max_context, self.limits = self.converted.max_context, self.converted.limits
        self.bound = Bound({})
        self.stream = _stream(self.state, options)
        self.packed_bytes = PackedBytes.of({})
        self._beside = Weights(self.state.weights.read, {})
        """Of graphs derived from this one: weights that it streams, and they hold."""
        self.bind_weights()
        self.made_of = self.watch.sums
        """Checksums of the weights that forms were chosen for; those that come later may have narrower ones."""
        self.executor = Executor(self.state, self.bound, options, tally=tally, digest=self.converted.digest)
        self.variants: dict[Hashable, Executor] = {}
        kernel = best_kernel(ops.commit_path, self.device, self.dtype) if options.kernels == "auto" else None
        self.commit: Any = kernel.target if kernel is not None else ops.commit_path
        tally.seconds += time.perf_counter() - started

    def otherwise(self, model: nn.Module | None) -> str | None:
        """What the trace read and is another now, besides weights."""
        reads = self.converted.reads
        return reads.changed(model, self.call) if model is not None and reads else None

    def suits(self, model: nn.Module) -> bool:
        """Whether the model is again what this was made of, but for the contents of weights."""
        if self.converted.reads is None or self.watch.incompatible() or self.watch.deep_mode_changed():
            return False
        return self.otherwise(model) is None

    def bind_weights(self, changes: Changes | None = None) -> Changes:
        """The module's present weights, and what is made of those that changed."""
        weights = self.state.weights
        changes = changes or self.watch.renew()
        weights.changed(changes.any)
        self._beside.changed(changes.any)
        self._build_slices()
        tensors = {**weights.tensors, **self._beside.tensors}
        if self.stream is not None:
            tensors |= self.stream.bind(list(zip(self.converted.sources, self.watch.sums, strict=True)))
        self.bound.tensors = tensors
        self.packed_bytes = weights.own_bytes
        return changes

    def _build_slices(self) -> None:
        """Build the weights of one of several ranks now: what cutting and packing each left free is given back before
        the next, or it would add up to as much as the rank holds.
        """
        if self.state.cut is not None or self.state.stage is not None:
            for name in self.state.weights:
                self.state.weights.tensor(name)
                trim()

    def unfit(self, changes: Changes, narrower: bool = False) -> str | None:
        """What is stored in a form that does not hold its new values; None: nothing. See `passes.fuse.unfit`."""
        from ..passes.fuse import unfit

        found = unfit(self.state, self.state.weights.sources if narrower else changes.any, narrower)
        return None if found is None else f"{found} has values for which another form is right"

    def unfit_anywhere(self) -> str | None:
        """As `unfit`, of all weights, and of forms that could be narrower."""
        everything = frozenset(self.state.weights.sources)
        return self.unfit(Changes(everything, everything), narrower=True)

    def rest(self) -> None:
        """Give up packed weights, which are made again when it is needed."""
        weights = self.state.weights
        weights.changed(weights.sources)
        self._beside.changed(weights.sources)
        self.bound.tensors = {}
        if self.stream is not None:
            self.stream.rest()

    def page_out(self, model: nn.Module | None) -> None:
        """Give back pages of the module's own tensors that nothing reads: weights that are streamed, or of which this
        is one of several ranks that keep slices, or layers of other stages.
        """
        state, weights = self.state, self.state.weights
        if self.stream is None and state.cut is None and state.stage is None:
            return
        read = {weights.label(name) for name in weights} - {""}
        unread = [weights.read(name) for name in weights.sources - read]
        if state.stage is not None and model is not None:
            held = {weights.read(name).data_ptr() for name in weights.sources}
            everything = own_tensors((*model.parameters(), *model.buffers()))
            unread += [t for t in everything if t.data_ptr() not in held]
        page_out(unread)
        trim()

    def derived(self, derive: Derive, options: Options | None = None, tally: Tally | None = None) -> Executor:
        """See `TreeProgram.executor`."""
        began = time.perf_counter()
        tally = tally or Tally()
        state, own = derive(self.state)
        more = {name: state.weights[name] for name in state.weights if name not in self.state.weights}
        if more:
            for name, each in more.items():
                self._beside.add(name, each)
            self.bound.tensors = {**self.bound.tensors, **self._beside.tensors}
        made = Executor(state, self.bound, options or self.options, own, tally)
        tally.seconds += time.perf_counter() - began
        return made

    def variant(
        self, key: Hashable, derive: Derive, options: Options | None = None, tally: Tally | None = None
    ) -> Executor:
        """See `TreeProgram.variant`."""
        found = self.variants.get(key)
        if found is None:
            tally = tally or self._tallies.setdefault(key, Tally())
            found = self.variants[key] = self.derived(derive, options, tally)
        return found


def _stream(state: GraphState, options: Options) -> OpenStream | None:
    if state.streaming is None or options.offload is None:
        return None
    return OpenStream(state.streaming, options.offload, state.weights.streamed, state.weights.read)


def _converted(model: nn.Module, call: CallSpec, options: Options) -> Converted:
    from ..pipeline import convert  # NOTE its imports take a second, which a program that is found does not need

    meaning = [semantic_check(model, call)]
    return convert(
        model,
        call,
        options,
        checks=meaning if options.verify_each == "semantic" else (),
        user_checks=meaning if options.verify_each == "spec" else (),
    )
