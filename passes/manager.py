"""The pass manager: runs passes in order, verifies after each, and keeps the history."""

from __future__ import annotations

import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treespec_compiler.errors import TreespecError

from .state import GraphState

log = logging.getLogger("treespec.passes")

Check = Callable[[GraphState, str], None]


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline: `run` changes the graph (or only proves) and returns how many places it matched."""

    name: str
    run: Callable[[GraphState], int]
    before: str
    after: str
    level: str | None = None  # the level the graph has afterwards; None: unchanged

    @property
    def source_hash(self) -> str:
        """Hash of the module that defines the pass: its identity."""
        module = inspect.getmodule(self.run)
        text = inspect.getsource(module if module is not None else self.run)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class PassRecord:
    """What one pass did: counts, seconds, and the graph before and after as code."""

    name: str
    source_hash: str
    seconds: float
    matches: int
    nodes_before: int
    nodes_after: int
    code_before: str
    code_after: str

    @property
    def changed(self) -> bool:
        return self.code_before != self.code_after


@dataclass
class History:
    """Records of a pipeline run, in order."""

    records: list[PassRecord] = field(default_factory=list)

    def __getitem__(self, name: str) -> PassRecord:
        return next(r for r in self.records if r.name == name)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.records)


def run_passes(state: GraphState, passes: Sequence[Pass], checks: Sequence[Check] = ()) -> History:
    """Run `passes` in order; each check is called after each pass with (state, pass name) and raises on a broken graph."""
    history = History()
    code = state.graph.python_code("self").src
    for step in passes:
        nodes, started = len(state.graph.nodes), time.perf_counter()
        matches = step.run(state)
        state.clean()
        if step.level is not None:
            state.level = step.level
        seconds = time.perf_counter() - started
        after = state.graph.python_code("self").src
        history.records.append(
            PassRecord(step.name, step.source_hash, seconds, matches, nodes, len(state.graph.nodes), code, after)
        )
        code = after
        log.debug("%s: %d matches, %.1f ms", step.name, matches, seconds * 1e3)
        for check in checks:
            try:
                check(state, step.name)
            except TreespecError:
                log.error("after pass %s:\n%s", step.name, after)
                raise
    return history
