"""What a program says of itself: sizes, limits, proofs, times. All of the model as it is now."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ir.specs import AttentionSpec, Limit, StateSpec
from ..offload.ring import StreamStats
from ..passes.framework.state import GraphState
from ..passes.framework.weights import PackedBytes
from .compared import Compared
from .cuda_graphs import GraphStats
from .executor import Executor, Tally
from .followed import Followed
from .made import Made
from .memory import Memory
from .net import Comparison
from .shown import as_html, as_text
from .weights import glance


class ProgramFacts:
    """The properties of a `TreeProgram`; nothing here runs it or changes it."""

    _followed: Followed
    _tally: Tally
    _compared: Compared
    _memory: Memory

    @property
    def _made(self) -> Made:
        """Of the model as it is now."""
        return self._followed.made

    @property
    def _executor(self) -> Executor:
        return self._followed.made.executor

    def _model(self) -> nn.Module | None:
        return self._followed.model

    @property
    def dtype(self) -> torch.dtype:
        """Of logits."""
        return self._made.dtype

    @property
    def device(self) -> torch.device:
        return self._made.device

    @property
    def vocab_size(self) -> int:
        """Of logits."""
        return self._made.vocab_size

    @property
    def packed_bytes(self) -> PackedBytes:
        """Of weights that the program keeps beside the module's; `.forms` says how many each form takes."""
        return self._made.packed_bytes

    @property
    def memory(self) -> Memory:
        """What converting took at most, beside the model and what the program keeps of its own; of the last build."""
        return self._memory

    @property
    def stream_stats(self) -> StreamStats | None:
        """What bringing streamed weights took; None: all of them stay in memory (option `offload`)."""
        stream = self._made.stream
        return None if stream is None else stream.stats

    @property
    def compile_seconds(self) -> float:
        """Spent on capture, passes and compilation so far."""
        return self._tally.seconds

    @property
    def from_cache(self) -> bool:
        """Whether it was saved by another process, or earlier, and found again (option `program_cache`)."""
        return self._made.saved is not None

    @property
    def compile_count(self) -> int:
        """How often a graph was compiled."""
        return self._tally.count

    @property
    def verify_seconds(self) -> float:
        """Spent on comparing the program with the model, its lowering included; part of `compile_seconds`."""
        return self._compared.seconds

    @property
    def comparison(self) -> Comparison | None:
        """What the last comparison with the model found; None before the first one, or where it is off."""
        return self._compared.last

    @property
    def state(self) -> GraphState:
        """The rewritten graph and what was proved about it; not to be changed."""
        return self._made.state

    @property
    def input_vocab(self) -> int:
        """Rows of the table that token ids are looked up in."""
        return self._made.input_vocab

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, packed ones included, that one pass reads."""
        return self._executor.weight_bytes

    @property
    def padding(self) -> list[int]:
        """Token ids that the model hides from all others: no text may begin with them."""
        return self._made.state.padding

    @property
    def sites(self) -> list[AttentionSpec]:
        """Attention sites in graph order."""
        return self._made.state.sites

    @property
    def states(self) -> list[StateSpec]:
        """Sites whose past is a state and not K/V, in graph order."""
        return self._made.state.states

    @property
    def max_context(self) -> int | None:
        """Largest number of tokens of one sequence that the program is proved for; None: unlimited."""
        return self._made.max_context

    @property
    def limits(self) -> list[Limit]:
        """What bounds the context, tightest first."""
        return self._made.limits

    @property
    def history(self) -> Any:
        """Records of the pipeline's passes."""
        return self._made.converted.history

    @property
    def weight_sums(self) -> list[int]:
        """Checksums of the module's tensors that the program reads, as they were last bound."""
        return self._made.watch.sums

    @property
    def said_of_weights(self) -> dict[str, str]:
        """What ranks of a mesh must agree on, by what is said where they do not.

        Ranks of a stage have the same weights; of all layers, each rank looks at a row of every tensor.
        """
        stage, model = self._made.state.stage, self._model()
        if stage is None or model is None:
            return {"weights": str(self.weight_sums)}
        return {f"weights of stage {stage.stage}": str(self.weight_sums), "weights": str(glance(model))}

    @property
    def notes(self) -> dict[str, Any]:
        """What passes left in `state.notes`."""
        return self._made.state.notes

    @property
    def graph_stats(self) -> GraphStats:
        """What was recorded as CUDA graphs, or why nothing is."""
        return self._executor.graph_stats

    @property
    def graph_digest(self) -> str:
        """See `GraphState.graph_digest`."""
        return self._made.state.graph_digest

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The rewritten graph, before lowering."""
        return self._made.state.gm

    def __repr__(self) -> str:
        return as_text(self._model(), self.sites, self.states, self.max_context, self.graph_stats)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return as_html(repr(self), self.sites)
