"""`draft="eagle3:FOLDER"`: a published EAGLE-3 head beside its target."""

from __future__ import annotations

import weakref
from time import perf_counter

from ....errors import InvalidOption
from ....program.tree_program import TreeProgram
from ...cost.latency import LatencyTable
from ..protocol import DraftRequest
from ..registry import DraftContext, register_draft
from .checkpoint import named_folder
from .loaded import LoadedHead
from .session import HeadSession

USAGE = '"eagle3:FOLDER" (a published head)'


class HeadDraft:
    """Guesses by a head that reads the target's hidden states. Made for one target.

    `prefill_seconds` stays 0: the head catches up with a prompt in the first step's first call.
    """

    prefill_seconds = 0.0

    def __init__(self, target: TreeProgram, loaded: LoadedHead, seconds: float = 0.0) -> None:
        self.target, self.loaded = target, loaded
        self.name = f"eagle3:{loaded.folder.name}"
        self.compile_seconds = seconds

    @property
    def learned_as(self) -> LoadedHead:
        """What its acceptance is remembered under."""
        return self.loaded

    def latency(self) -> LatencyTable:
        return self.loaded.latency()

    def open(self, request: DraftRequest) -> HeadSession:
        if request.target is not self.target:
            raise InvalidOption(name="draft", got=f"{self.name} of another model", expected="the target it reads")
        return HeadSession(self.name, self.target, self.loaded, request)


_HEADS: weakref.WeakKeyDictionary[TreeProgram, dict[tuple[str, int], LoadedHead]] = weakref.WeakKeyDictionary()


def _named(argument: str, context: DraftContext) -> HeadDraft:
    """The head of a folder, kept with the target as long as its configuration is not written anew."""
    folder, key = named_folder(argument, "eagle3", USAGE)
    heads, began = _HEADS.setdefault(context.target, {}), perf_counter()
    if key not in heads:
        heads[key] = LoadedHead.read(folder, context.target)
    return HeadDraft(context.target, heads[key], perf_counter() - began)


register_draft("eagle3", _named, usage=USAGE)
