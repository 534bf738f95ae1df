"""Early exit: a draft cut from the target's own graph, with the target's weights and the K/V of its first layers.

Nothing is held twice: the cut graph reads the target's weight tensors, and runs on the target's own tree cache, where
it writes the first layers' K/V of uncommitted nodes only. The verification that follows writes them again. Committed
tokens need no catching up. Self-speculation by early exit is LayerSkip (arXiv 2404.16710).
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...errors import InvalidOption, UnreadableModel, Unsupported
from ...passes.early_exit import HEAD_NORM, HEAD_PROJECTION, copy_state, early_exit
from ...program.arguments import check_tokens, new_part
from ...program.batch import Batch, Part, pack
from ...program.cuda_graphs import GraphStats, run_or_explain
from ...program.lowering import Lowered, lower_eager, lower_inductor
from ...tree import TokenTree
from .model import DraftRequest, ModelDraft, ModelDraftSession
from .sampled import SampledDraftSession

if TYPE_CHECKING:
    from ...program.cache import TreeCache
    from ...program.tree_program import TreeProgram

CALIBRATION_TOKENS = 48
LONGEST_CHAIN = 6
STEP_OVERHEAD = 0.05
"""Of a chain's verification, in plain steps a node: bench_verify's slope for few nodes."""


@dataclass(frozen=True, eq=False)
class ExitHead:
    """A trained exit after `layer` layers: the head on projection @ (norm * rmsnorm(h)), instead of the final norm."""

    layer: int
    norm: Tensor
    projection: Tensor
    eps: float

    @classmethod
    def load(cls, weights: Path | str, config: Path | str | None = None) -> ExitHead:
        """From a safetensors file with norm.weight [D] and proj.weight [D, D], and its JSON with `layer` and `eps`.

        Raises UnreadableModel.
        """
        from safetensors.torch import load_file

        try:
            about = json.loads(Path(config or Path(weights).with_suffix(".json")).read_text(encoding="utf-8"))
            tensors = load_file(str(weights))
            head = cls(int(about["layer"]), tensors["norm.weight"], tensors["proj.weight"], float(about["eps"]))
            if head.projection.shape != (head.norm.numel(),) * 2:
                raise ValueError(f"shapes {list(head.norm.shape)} and {list(head.projection.shape)}")
        except Exception as error:  # safetensors has an exception of its own, without a common base
            expected = "norm.weight [D] and proj.weight [D, D] in safetensors, beside it a JSON with layer and eps"
            fix = "Name the safetensors file of a trained exit."
            problem = f"{type(error).__name__}: {error}"
            raise UnreadableModel(name=str(weights), problem=problem, expected=expected, fix=fix) from error
        return head


class EarlyExitProgram:
    """The first `layers` attention layers of a tree program, its final norm and head; runs on the program's caches."""

    def __init__(
        self, target: TreeProgram, layers: int, head: ExitHead | None = None, lowering: str | None = None
    ) -> None:
        if head is not None and head.layer != layers:
            expected = f"{head.layer}, the layer the head was trained for"
            raise InvalidOption(name="layers", got=layers, expected=expected)
        self.target, self.layers, self.head = target, layers, head
        self.options = target.options
        self.compile_seconds, self.compile_count = 0.0, 0
        self._lowering = lowering or target.options.lowering
        self._source: Any = None
        self._sync()

    def _sync(self) -> None:
        """Cut the target's graph, again if the target was rebuilt."""
        converted = self.target._converted
        if converted is self._source:
            return
        began = perf_counter()
        state = copy_state(converted.state)
        trained = None
        if self.head is not None:
            trained = {"norm": self.head.norm, "projection": self.head.projection, "eps": self.head.eps}
        early_exit(state, self.layers, trained)
        self.graph_module, self._source = state.gm, converted
        places = {name: i for i, name in enumerate(self.target._names)}
        own: dict[str, Tensor] = {}
        if self.head is not None:
            own = {HEAD_NORM: self.head.norm, HEAD_PROJECTION: self.head.projection}
        names = [n.name for n in state.graph.nodes if n.op == "placeholder"]
        # Where each input comes from: a place in the target's list of inputs, or a tensor of the exit's own.
        self._inputs: list[int | Tensor] = [
            places[n] if n in places else own[n].to(self.device, self.dtype).contiguous() for n in names
        ]
        self._lowered: Lowered | None = None
        self._graphs, self._no_graphs = self.target._recording(self._place, self._launch)
        self.compile_seconds += perf_counter() - began

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def max_context(self) -> int | None:
        return self.target.max_context

    @property
    def _input_vocab(self) -> int:
        return self.target._input_vocab

    @property
    def own_bytes(self) -> int:
        """Memory beyond the target's: the trained head's, if there is one."""
        return sum(x.numel() * x.element_size() for x in self._inputs if isinstance(x, Tensor))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads."""
        template = self.target._template
        found = [x if isinstance(x, Tensor) else template[x] for x in self._inputs]
        return sum(x.numel() * x.element_size() for x in found if x is not None)

    def new_cache(self, max_tokens: int = 4096, slots: int = 1) -> TreeCache:
        return self.target.new_cache(max_tokens, slots)

    def check_weights(self, contents: bool = False) -> None:
        self.target.check_weights(contents)

    def verify(self, tree: TokenTree, cache: TreeCache) -> Tensor:
        return self.extend(tree, cache, 0)

    def extend(self, tree: TokenTree, cache: TreeCache, start: int = 0, slot: int = 0) -> Tensor:
        """The exit's logits [new nodes, V] after the path to each node >= `start` of an uncommitted tree."""
        target = self.target
        target._ready(cache)
        self._sync()
        part = new_part(cache, slot, tree, start)
        check_tokens(tree.tokens, target._input_vocab, f"the tree of slot {slot}")
        target._check_context(cache.length(slot) + max(tree.depths) + 1)
        cache._reserve(slot, len(tree))
        logits = self._run(part, cache)
        cache._trees[slot] = tree
        return logits

    @property
    def graph_stats(self) -> GraphStats:
        """What was recorded as CUDA graphs, or why nothing is."""
        return self._graphs.stats() if self._graphs is not None else GraphStats(off=self._no_graphs)

    def _run(self, part: Part, cache: TreeCache) -> Tensor:
        if self._graphs is not None:
            logits, self._no_graphs = run_or_explain(self._graphs, [part], cache, self.target._template, self.options)
            if logits is not None:
                return logits
            if self._no_graphs:
                self._graphs = None
        return self._launch(self._place(pack([part], cache, self.device), cache))

    def _launch(self, inputs: list[Tensor]) -> Tensor:
        lowered = self._lowered or self._lower()
        with torch.no_grad():
            return lowered.run(inputs)[0]

    def _place(self, batch: Batch, cache: TreeCache) -> list[Tensor]:
        every = self.target._place(batch, cache)
        return [every[x] if isinstance(x, int) else x for x in self._inputs]

    def _lower(self) -> Lowered:
        gm, target = self.graph_module, self.target
        if self._lowering == "eager":
            self._lowered = lower_eager(gm)
            return self._lowered
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
        roles = [target._roles[x] if isinstance(x, int) else "weight" for x in self._inputs]
        fixed = [target._template[x] if isinstance(x, int) else x for x in self._inputs]
        examples = [target._example(n, f) for n, f in zip(nodes, fixed, strict=True)]
        self._lowered = lower_inductor(gm, roles, examples)
        self.compile_count += 1
        self.compile_seconds += self._lowered.seconds
        return self._lowered


class EarlyExitDraft(ModelDraft):
    """Drafts with the target's own first `layers` layers; None: chosen on the first prompt, see `choose_layers`."""

    def __init__(self, target: TreeProgram, layers: int | None = None, head: ExitHead | None = None) -> None:
        self.target, self.head = target, head
        self.name = "early-exit" if layers is None else f"early-exit:{layers}"
        self.prefill_seconds = self._calibration_seconds = 0.0
        if layers is None and head is not None:
            layers = head.layer
        self._program = None if layers is None else _program(target, layers, head)

    @property
    def program(self) -> TreeProgram:  # type: ignore[override]
        """The exit; it has of a tree program what drafting needs."""
        return cast("TreeProgram", self._program)

    @property
    def compile_seconds(self) -> float:
        return self._calibration_seconds + (0.0 if self._program is None else self._program.compile_seconds)

    def calibrate(self, prompt: Sequence[int]) -> None:
        """Choose the number of layers by a prompt, unless it was given or chosen before."""
        if self._program is None:
            began = perf_counter()
            self._program = _program(self.target, choose_layers(self.target, prompt), None)
            self._calibration_seconds += perf_counter() - began

    def open(self, request: DraftRequest) -> ModelDraftSession:
        if request.cache is None or request.target is not self.target:
            expected = "the target whose layers it runs"
            raise InvalidOption(name="draft", got=f"{self.name} of another model", expected=expected)
        if request.prompt:
            self.calibrate(request.prompt)
        return (EarlyExitSession if request.by_logits else SampledEarlyExitSession)(self, request)


class _OnTargetsCache(ModelDraftSession):
    """No cache of its own, nothing to catch up, nothing to commit: the target does all that."""

    def __init__(self, draft: ModelDraft, request: DraftRequest) -> None:
        super().__init__(draft, request)
        assert request.cache is not None
        self._cache = request.cache
        self._capacity = request.cache.max_tokens

    def accept(self, tokens: Sequence[int]) -> None:
        self._pending = [tokens[-1]]
        self._run = 0
        assert self._cache is not None
        self._length = self._cache.length(0)

    def close(self) -> None:
        self._cache = None


class EarlyExitSession(_OnTargetsCache):
    """Greedy children."""


class SampledEarlyExitSession(_OnTargetsCache, SampledDraftSession):
    """Drawn children."""

    def accept(self, tokens: Sequence[int]) -> None:
        self._rows.accept(tokens)
        super().accept(tokens)


_CHOSEN: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _program(target: TreeProgram, layers: int, head: ExitHead | None) -> EarlyExitProgram:
    kept = target.__dict__.setdefault("_early_exits", {})
    if (layers, id(head)) not in kept:
        kept[layers, id(head)] = EarlyExitProgram(target, layers, head)
    return cast(EarlyExitProgram, kept[layers, id(head)])


def choose_layers(target: TreeProgram, text: Sequence[int]) -> int:
    """The exit of most expected tokens a second, by agreement with the target on the end of `text`.

    The cost of an exit is taken for its share of the weights' bytes, since decoding reads them all at each step.
    """
    if target in _CHOSEN:
        return _CHOSEN[target]
    tail = list(text[-CALIBRATION_TOKENS:])
    begin = list(text[: -len(tail)])
    chain = TokenTree.chain(tail)
    whole = sum(x.numel() * x.element_size() for x in target._template if x is not None)
    speeds: dict[int, float] = {}
    with torch.inference_mode():
        cache = target.new_cache(max_tokens=len(text) + 1)
        if begin:
            target.prefill(begin, cache)
        wanted = target.verify(chain, cache).argmax(-1)
        for layers in range(1, len(target.sites)):
            try:
                program = EarlyExitProgram(target, layers, lowering="eager")
            except Unsupported:
                continue
            agreement = float((program.extend(chain, cache).argmax(-1) == wanted).float().mean())
            speeds[layers] = expected_speed(agreement, program.weight_bytes / whole)
    if not speeds:
        raise Unsupported("no layer of this model has an early exit", way_out="use another draft")
    best = max(speeds, key=lambda layers: (speeds[layers], -layers))
    _CHOSEN[target] = best
    return best


def expected_speed(acceptance: float, cost: float) -> float:
    """Over plain decoding, of the best chain whose nodes are accepted with this chance and drafted at this cost."""
    speeds, tokens = [], 1.0
    for depth in range(1, LONGEST_CHAIN + 1):
        tokens += acceptance**depth
        speeds.append(tokens / (1 + depth * (cost + STEP_OVERHEAD)))
    return max(speeds)
