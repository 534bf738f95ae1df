"""Instruments of the pass manager: print graphs, measure time, write dumps, tell PyTorch's structured trace."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from treespec_compiler.ir.private_torch import trace_structured
from treespec_compiler.logs import GRAPHS

from ..show.dot import dot
from ..show.printing import code
from ..show.snapshot import Snapshot, snapshot
from ..show.view import View
from .manager import Instrument, Pass, PassRecord, slug
from .state import GraphState

CAPTURE = "capture"

Show = Callable[[str, Snapshot], None]  # (title, graph)


@dataclass
class GraphPrinter(Instrument):
    """Shows graphs before and after the passes asked for; names are slugs, "*" is every pass."""

    show: Show
    before_passes: frozenset[str] = frozenset()
    after_passes: frozenset[str] = frozenset()
    on_change: bool = False
    on_failure: bool = False

    def before(self, state: GraphState, step: Pass) -> None:
        if {step.slug, "*"} & self.before_passes:
            self.show(f"before {step.name}", snapshot(state, step.name))

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        if {step.slug, "*"} & self.after_passes:
            self.show(f"after {step.name}", snapshot(state, step.name))
        elif self.on_change and record.changed:
            self.show(f"after {step.name} (changed)", snapshot(state, step.name))

    def failed(self, state: GraphState, step: Pass, error: Exception) -> None:
        if self.on_failure:
            self.show(f"as {step.name} left it (failed)", snapshot(state, step.name))


@dataclass
class Recorder(Instrument):
    """Keeps the graph after every pass; `graphs[0]` is the captured one."""

    graphs: list[Snapshot] = field(default_factory=list)

    def before(self, state: GraphState, step: Pass) -> None:
        if not self.graphs:
            self.graphs.append(snapshot(state, CAPTURE))

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        self.graphs.append(snapshot(state, step.name))


@dataclass
class Dumper(Recorder):
    """Writes every graph into a folder, as code, JSON and DOT: `03-classify.py`, `.json`, `.dot`."""

    folder: Path = Path("treespec-dump")

    def before(self, state: GraphState, step: Pass) -> None:
        first = not self.graphs
        super().before(state, step)
        if first:
            self._write()

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        super().after(state, step, record)
        self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        graph = self.graphs[-1]
        stem = f"{len(self.graphs) - 1:02}-{slug(graph.after)}"
        (self.folder / f"{stem}.py").write_text(code(graph, View()))
        (self.folder / f"{stem}.json").write_text(json.dumps(graph.as_json(), indent=1))
        (self.folder / f"{stem}.dot").write_text(dot(graph, View()))


class StructuredTrace(Instrument):
    """Artifacts for `TORCH_TRACE`, so that tlparse lists every pass; costs nothing when no trace is written."""

    def before(self, state: GraphState, step: Pass) -> None:
        if state.level == "captured":
            self._artifact(state, CAPTURE)

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        self._artifact(state, step.name)

    def _artifact(self, state: GraphState, name: str) -> None:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"treespec_after_{slug(name).replace('-', '_')}", "encoding": "string"},
            payload_fn=lambda: code(snapshot(state, name), View()),
        )


class GraphLog(Instrument):
    """Graphs and counts for the logger `treespec.graphs` (`TREESPEC_LOGS=graphs`)."""

    log = GRAPHS

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        if self.log.isEnabledFor(logging.DEBUG):
            self.log.debug("after %s\n%s", step.name, code(snapshot(state, step.name), View()))


def always() -> Sequence[Instrument]:
    """The instruments of every conversion."""
    return (StructuredTrace(), GraphLog())
