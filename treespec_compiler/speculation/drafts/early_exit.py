"""Early exit: drafts by the target's own first layers, on the target's own cache (`program.early_exit`)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import InvalidOption, Refusal, Unsupported
from ...program.cache import TreeCache
from ...program.early_exit import EarlyExitProgram, ExitHead, exit_graph
from ...program.executor import Executor
from ...program.tree_program import TreeProgram
from ...tree import TokenTree
from ..slots import Slot
from .model import ModelDraft
from .protocol import DraftRequest, ProgramDraft
from .registry import DraftContext, register_draft
from .session import ModelDraftSession

CALIBRATION_TOKENS = 48
LONGEST_CHAIN = 6
STEP_OVERHEAD = 0.05
"""Of a chain's verification, in plain steps a node: bench_verify's slope for few nodes."""


class EarlyExitDraft(ModelDraft):
    """Drafts with the target's own first `layers` layers; None: chosen on the first prompt, see `choose_layers`."""

    def __init__(self, target: TreeProgram, layers: int | None = None, head: ExitHead | None = None) -> None:
        self.target, self.head = target, head
        self.name = "early-exit" if layers is None else f"early-exit:{layers}"
        self.prefill_seconds = self._calibration_seconds = 0.0
        if layers is None and head is not None:
            layers = head.layer
        self._program = None if layers is None else EarlyExitProgram(target, layers, head)

    @property
    def program(self) -> TreeProgram:  # type: ignore[override]
        """The exit; it has of a tree program what drafting needs."""
        return cast(TreeProgram, self._program)

    @property
    def compile_seconds(self) -> float:
        return self._calibration_seconds + (0.0 if self._program is None else self._program.compile_seconds)

    def calibrate(self, prompt: Sequence[int]) -> None:
        """Choose the number of layers by a prompt, unless it was given or chosen before."""
        if self._program is None:
            began = perf_counter()
            self._program = EarlyExitProgram(self.target, choose_layers(self.target, prompt))
            self._calibration_seconds += perf_counter() - began

    def open(self, request: DraftRequest) -> ModelDraftSession:
        if request.cache is None or request.target is not self.target:
            expected = "the target whose layers it runs"
            raise InvalidOption(name="draft", got=f"{self.name} of another model", expected=expected)
        if request.prompt:
            self.calibrate(request.prompt)
        slot = Slot(self.program, request.cache, request.slot)
        return EarlyExitSession(self, request, slot)


class EarlyExitSession(ModelDraftSession):
    """No cache of its own, nothing to catch up, nothing to commit: the target does all that."""

    def __init__(self, draft: ProgramDraft, request: DraftRequest, slot: Slot) -> None:
        super().__init__(draft, request, slot)
        self._capacity = slot.cache.max_tokens
        self._targets = slot

    def accept(self, tokens: Sequence[int]) -> None:
        self._children.accept(tokens)
        self._pending = [tokens[-1]]
        self._own = None
        self._length = self._targets.length

    def room(self, nodes: int) -> tuple[Slot | None, TreeProgram, int]:
        return self._targets, self.program, 0  # the target's own

    def resume(self, slot: Slot, tokens: Sequence[int]) -> None:
        self._slot = self._targets = Slot(self.program, slot.cache, slot.index)
        self._pending, self._own = [tokens[-1]], None

    def close(self) -> None:
        """Nothing is held."""


_CHOSEN: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def choose_layers(target: TreeProgram, text: Sequence[int]) -> int:
    """The exit of most expected tokens a second, by agreement with the target on the end of `text`.

    The cost of an exit is taken for its share of the weights' bytes, since decoding reads them all at each step.
    """
    if target in _CHOSEN:
        return _CHOSEN[target]
    tail = list(text[-CALIBRATION_TOKENS:])
    begin = list(text[: -len(tail)])
    chain = TokenTree.chain(tail)
    measured = replace(target.options, lowering="eager", verify="off")  # what they say is measured, and never used
    speeds: dict[int, float] = {}
    with torch.inference_mode():
        cache = target.new_cache(max_tokens=len(text) + 1)
        if begin:
            target.prefill(begin, cache)
        wanted = target.verify(chain, cache).argmax(-1)
        for layers in range(1, len(target.sites)):
            try:
                exit_ = target.executor(exit_graph(layers), measured)  # not kept: each is used once
            except Unsupported:
                continue
            logits = _logits(target, exit_, chain, cache)
            agreement = float((logits.argmax(-1) == wanted).float().mean())
            speeds[layers] = expected_speed(agreement, exit_.weight_bytes / target.weight_bytes)
    if not speeds:
        raise Unsupported(Refusal.EARLY_EXIT, "no layer of this model has an early exit", way_out="use another draft")
    best = max(speeds, key=lambda layers: (speeds[layers], -layers))
    _CHOSEN[target] = best
    return best


def _logits(target: TreeProgram, exit_: Executor, chain: TokenTree, cache: TreeCache) -> Tensor:
    return target.call(lambda: exit_, chain, cache)[0]


def expected_speed(acceptance: float, cost: float) -> float:
    """Over plain decoding, of the best chain whose nodes are accepted with this chance and drafted at this cost."""
    speeds, tokens = [], 1.0
    for depth in range(1, LONGEST_CHAIN + 1):
        tokens += acceptance**depth
        speeds.append(tokens / (1 + depth * (cost + STEP_OVERHEAD)))
    return max(speeds)


USAGE = '"early-exit", "early-exit:2" (layers) or "early-exit:FILE.safetensors" (a trained head)'


def _named(argument: str, context: DraftContext) -> EarlyExitDraft:
    if argument.endswith(".safetensors"):
        head = ExitHead.load(argument)
        return EarlyExitDraft(context.target, head.layer, head)
    if argument and (not argument.isdecimal() or int(argument) == 0):
        raise InvalidOption(name="draft", got=f"early-exit:{argument}", expected=USAGE)
    return EarlyExitDraft(context.target, int(argument) if argument else None)


register_draft("early-exit", _named, usage=USAGE)
