"""Which of a program's graphs were compared with the model, each once before its first use, and what that cost."""

from __future__ import annotations

import weakref

from torch import nn

from ..capture.alone import alone
from ..capture.call import CallSpec
from ..capture.surroundings import outside_autocast
from ..stages import stage
from .executor import Executor, Tally
from .net import Comparison, Runs, check_program, check_variant


class Compared:
    """Lowering, which a graph's first run brings, is part of the time of a comparison and of its tally."""

    def __init__(self) -> None:
        self._done: weakref.WeakSet[Executor] = weakref.WeakSet()
        self.seconds = 0.0
        self.last: Comparison | None = None
        """With the model; None before the first one."""

    def own(self, program: Runs, executor: Executor, model: nn.Module, call: CallSpec, found: bool = False) -> bool:
        """The program's graph, with the model as it runs eagerly; raises `Unsupported` where they differ.

        False: it was compared before. `found`: it was saved, after a comparison of its own.
        """
        if executor in self._done:
            return False
        with alone(), outside_autocast(), stage("comparing with the model"):
            compiled = executor.tally.seconds
            self.last = check_program(program, model, call, found_saved=found)
            self._took(self.last.seconds, executor.tally, compiled)
        self._done.add(executor)
        return True

    def derived(self, program: Runs, executor: Executor, variant: Executor) -> None:
        """A graph made of the program's, with the program; raises `Unsupported` where they differ."""
        if variant is executor or variant in self._done:
            return
        with alone(), outside_autocast():
            compiled = variant.tally.seconds
            self._took(check_variant(program, executor, variant), variant.tally, compiled)
        self._done.add(variant)

    def _took(self, seconds: float, tally: Tally, compiled: float) -> None:
        self.seconds += seconds
        tally.seconds = max(tally.seconds, compiled + seconds)
