"""A head that says all levels of a tree in one call: EAGLE-3's layer over slots for the tokens that come.

DFlash (Chen et al., arXiv 2602.06036) drafts a block of unknown tokens in one pass over the target's hidden states;
JetSpec (arXiv 2606.18394) lets each of them see those before it alone. So do the slots here, which follow the root as
tokens would. That siblings' children differ though the layer ran once comes of a product of low rank: it corrects the
logits at a slot by the token that a path has in front of it. The folder is EAGLE-3's, with `slots.*` and `follow.*`
beside it (`heads.slots`); published heads of these papers have other layouts and are not read.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from ....errors import InvalidOption
from ....ir.device import profile
from ....program.tree_program import TreeProgram
from ...cost.latency import LatencyTable, Point
from ...policies.protocol import Limits
from ...proposal import Proposal
from ..protocol import DraftRequest
from ..registry import DraftContext, register_draft
from .checkpoint import named_folder
from .loaded import TIMED_CALLS, TIMED_CONTEXT, LoadedHead, OpenedHead
from .session import HeadSession
from .slots import HeadSlots

USAGE = '"parallel:FOLDER" (a head for all levels at once)'


@dataclass(eq=False)
class LoadedParallel:
    """A head as it was read for a target, which it does not keep alive."""

    layer: LoadedHead
    slots: HeadSlots
    _latency: LatencyTable | None = field(default=None, repr=False)

    @classmethod
    def read(cls, folder: Path, target: TreeProgram) -> LoadedParallel:
        """Raises as `LoadedHead.read`."""
        opened = OpenedHead.of(folder, target)
        slots = HeadSlots.take(folder, opened.config, opened.tensors)
        return cls(LoadedHead.of(opened, target), slots)

    def latency(self) -> LatencyTable:
        """Of the one call that a tree takes: shared among the calls that a policy counts, one a level."""
        if self._latency is None:
            with torch.inference_mode():
                seconds = min(self._seconds() for _ in range(TIMED_CALLS)) / self.slots.depth
            self._latency = LatencyTable([Point(rows, TIMED_CONTEXT, 1, seconds) for rows in (1, 2)])
        return self._latency

    def _seconds(self) -> float:
        head, cache = self.layer.head, self.layer.places()
        shape = head.shape
        like = head.fused(head.zeros(1))
        cache.add(*2 * (like.new_zeros(shape.kv_heads, TIMED_CONTEXT, shape.head_dim),))
        cache.commit()
        began = perf_counter()
        embedded, states, places = self.slots.inputs(like, like, torch.arange(1, device=like.device))
        q, k, v, beside = head.projected(embedded, states, places)
        normed, _ = head.attended(q, *cache.add(k, v), cache.chain(len(places)), beside)
        logits = head.logits(normed) + self.slots.behind(like)
        logits[0, 0].item()  # a device is waited for
        return perf_counter() - began


class ParallelDraft:
    """Guesses by a parallel head. Made for one target.

    `prefill_seconds` stays 0: the head catches up with a prompt in the first step's call.
    """

    prefill_seconds = 0.0

    def __init__(self, target: TreeProgram, loaded: LoadedParallel, seconds: float = 0.0) -> None:
        self.target, self.loaded = target, loaded
        self.name = f"parallel:{loaded.layer.folder.name}"
        self.compile_seconds = seconds

    @property
    def learned_as(self) -> LoadedParallel:
        """What its acceptance is remembered under."""
        return self.loaded

    def latency(self) -> LatencyTable:
        return self.loaded.latency()

    def open(self, request: DraftRequest) -> ParallelSession:
        if request.target is not self.target:
            raise InvalidOption(name="draft", got=f"{self.name} of another model", expected="the target it reads")
        return ParallelSession(self.name, self.target, self.loaded, request)


class ParallelSession(HeadSession):
    """One request: the layer runs once a step, over the accepted tokens that it has not seen and the slots."""

    def __init__(self, name: str, target: TreeProgram, loaded: LoadedParallel, request: DraftRequest) -> None:
        super().__init__(name, target, loaded.layer, request)
        self._slots = loaded.slots
        self._levels: Tensor | None = None  # [D, draft vocabulary], without what the token in front changes

    def _calls(self, limits: Limits) -> int:
        return min(limits.depth, self._slots.depth)

    def _caught_up(self) -> Tensor:
        if self._after:  # else the step is begun again
            chunk = profile(self._target.device).prompt_chunk
            hidden, after = torch.cat(self._hidden), self._after
            self._hidden, self._after = [], []
            last = (len(after) - 1) // chunk * chunk
            for start in range(0, last, chunk):
                self._append(after[start : start + chunk], hidden[start : start + chunk])
            self._levels = self._ahead(after[last:], hidden[last:])
        return self._behind([0], [self._root])

    def _ahead(self, tokens: Sequence[int], hidden: Tensor) -> Tensor:
        """Commit places of these tokens; [D, draft vocabulary] of the last one and of the slots behind it."""
        first, count = self._places.committed, len(tokens)
        places = torch.arange(first, first + count, device=hidden.device)
        states = self._head.fused(hidden)
        embedded, states, places = self._slots.inputs(self._embedded(tokens, states), states, places)
        q, k, v, beside = self._head.projected(embedded, states, places)
        seen = self._places.chain(len(places))
        normed, _ = self._head.attended(q, *self._places.add(k, v), seen, beside)
        self._places.commit(count)
        return self._head.logits(normed[count - 1 :])

    def _level(self, proposal: Proposal, nodes: Sequence[int], run: dict[int, int]) -> Tensor:
        return self._behind([proposal.depths[node] for node in nodes], [proposal.tokens[node] for node in nodes])

    def _behind(self, depths: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits [n, draft vocabulary] behind tokens that stand so deep in the tree."""
        assert self._levels is not None
        base = self._levels[torch.tensor(depths, device=self._levels.device)]
        return base + self._slots.behind(self._embedded(tokens, base))

    def _embedded(self, tokens: Sequence[int], like: Tensor) -> Tensor:
        ids = torch.tensor(tokens, device=like.device)
        return self._loaded.embedding(self._target)[ids].to(like.dtype)

    def close(self) -> None:
        super().close()
        self._levels = None


_HEADS: weakref.WeakKeyDictionary[TreeProgram, dict[tuple[str, int], LoadedParallel]] = weakref.WeakKeyDictionary()


def _named(argument: str, context: DraftContext) -> ParallelDraft:
    """The head of a folder, kept with the target as long as its configuration is not written anew."""
    folder, key = named_folder(argument, "parallel", USAGE)
    heads, began = _HEADS.setdefault(context.target, {}), perf_counter()
    if key not in heads:
        heads[key] = LoadedParallel.read(folder, context.target)
    return ParallelDraft(context.target, heads[key], perf_counter() - began)


register_draft("parallel", _named, usage=USAGE)
