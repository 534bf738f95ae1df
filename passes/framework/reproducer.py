"""When a pass fails, a folder is written from which `treespec reproduce` runs the failure again.

It holds the captured graph, the weights (large ones as shapes only), options, versions, the pipeline, the failing pass,
and the graph as that pass left it.
"""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, fx

from treespec_compiler.errors import InvalidOption, Unsupported
from treespec_compiler.logs import logger
from treespec_compiler.options import Options
from treespec_compiler.user_cache import cache_dir
from treespec_compiler.versions import versions

from ..show.printing import code
from ..show.snapshot import snapshot
from ..show.view import View
from .instruments import CAPTURE
from .manager import Instrument, Pass, PassRecord
from .state import GraphState

log = logger(__name__)

# All weights are saved up to this many bytes together; above it, only tensors of up to SMALL bytes.
LARGEST, SMALL = 64 << 20, 256 << 10

INFO, GRAPH, WEIGHTS, FAILED = "reproducer.json", "graph.json", "weights.safetensors", "failed.py"


class ReproducerWriter(Instrument):
    """Keeps a copy of the captured graph and writes the folder if a pass fails.

    A refusal, of the model or of an option, is an answer, not a failure; it is written only with `refusals=True`.
    """

    def __init__(
        self, options: Options, folder: Path | None = None, model: str | None = None, refusals: bool = False
    ) -> None:
        self.options, self.folder, self.model, self.refusals = options, folder, model, refusals
        self._captured: tuple[GraphState, fx.Graph] | None = None
        self._ran: list[Pass] = []

    def before(self, state: GraphState, step: Pass) -> None:
        if self._captured is None:
            graph = fx.Graph()
            graph.output(graph.graph_copy(state.graph, {}))
            kept = replace(state, weights=state.weights.copy(), written=list(state.written))
            self._captured = kept, graph
        self._ran.append(step)

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        """Nothing: the steps were noted before they ran."""

    def failed(self, state: GraphState, step: Pass, error: Exception) -> None:
        if isinstance(error, (Unsupported, InvalidOption)) and not self.refusals:
            return
        folder = self.folder or cache_dir() / "reproducers" / f"{time.strftime('%Y%m%d-%H%M%S')}-{step.slug}"
        try:
            self._write(folder, state, step, error)
        except Exception as problem:
            # NOTE the failure itself matters more than its record.
            log.warning("no reproducer in %s: %s", folder, problem)
            return
        error.add_note(f"A reproducer is in {folder}; `treespec reproduce {folder}` runs it again.")

    def _write(self, folder: Path, state: GraphState, step: Pass, error: Exception) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        assert self._captured is not None  # `before` ran
        first, graph = self._captured
        captured = snapshot(first, CAPTURE, graph)
        tensors = dict(first.constants)
        tensors |= {n.name: getattr(state.gm, n.target) for n in captured.nodes if n.op == "get_attr"}
        saved, left_out = _split(tensors)
        save_file(saved, folder / WEIGHTS)
        (folder / GRAPH).write_text(json.dumps(captured.as_json(), indent=1))
        (folder / FAILED).write_text(code(snapshot(state, step.name), View(fold=False)))
        for own in (p for p in self._ran if p.user):
            (folder / f"pass-{own.slug}.py").write_text(own.source)
        info: dict[str, Any] = {
            "treespec_reproducer": 1,
            "model": self.model,
            "options": asdict(self.options),
            "pipeline": [p.slug for p in self._ran],
            "user_passes": [p.slug for p in self._ran if p.user],
            "source_hashes": {p.slug: p.source_hash for p in self._ran},
            "failing_pass": step.slug,
            "error": type(error).__name__,
            "text": str(error),
            "guards": [str(g) for g in state.guards],
            "random_weights": {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in left_out.items()},
            "versions": reproducer_versions(),
        }
        (folder / INFO).write_text(json.dumps(info, indent=1))


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(saved with their values, known by shape only)."""
    size = {n: t.numel() * t.element_size() for n, t in tensors.items()}
    limit = LARGEST if sum(size.values()) <= LARGEST else SMALL
    saved = {n: t for n, t in tensors.items() if size[n] <= limit and not t.is_meta}
    # NOTE safetensors refuses tensors that share memory (tied weights).
    return {n: t.detach().cpu().clone().contiguous() for n, t in saved.items()}, {
        n: t for n, t in tensors.items() if n not in saved
    }


def reproducer_versions() -> dict[str, str]:
    """What a failure may depend on besides the graph."""
    found = versions("torch", "sympy")
    return found | {"python": platform.python_version(), "platform": re.sub(r"-with.*", "", platform.platform())}
