"""The content of the report as JSON values: passes, graph differences, sites, masks, a verified token tree."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...capture.call import CallSpec
from ...converted import Converted
from ...errors import PassError, Unsupported
from ...ir.drawing import mask_svg, predicate_mask, tree_mask, tree_svg
from ...ir.provenance import group_of
from ...ir.specs import MaskSpec
from ...options import Options
from ...passes.framework.instruments import Recorder
from ...passes.framework.manager import Instrument, Pass, PassRecord
from ...passes.framework.state import GraphState
from ...passes.show.compare import compare
from ...passes.show.printing import line
from ...passes.show.snapshot import NodeData, Snapshot, short_path, short_paths, split_source
from ...pipeline import convert
from ...program.net import Comparison
from ...program.semantics import run_graph, semantic_check
from ...tree import TokenTree
from ..explain import compared, describe

# Cells of a drawn mask; a longer window is drawn with several tokens to a cell.
CELLS = 24
PREFIX = 6
SNIPPET = 4  # source lines shown on each side


@dataclass
class Timeline(Instrument):
    """Passes and records in order; the last pass of a failed run has no record."""

    steps: list[Pass] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)

    def before(self, state: GraphState, step: Pass) -> None:
        self.steps.append(step)

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        self.records.append(record)


def collect(model: nn.Module, name: str, call: CallSpec, options: Options) -> dict[str, Any]:
    """Convert the model, whatever comes of it, and gather what the page shows."""
    recorder, timeline = Recorder(), Timeline()
    real = not any(t.is_meta for t in model.parameters())
    checks = [semantic_check(model, call)] if real else []
    converted: Converted | None = None
    comparison: Comparison | None = None
    failure: Exception | None = None
    try:
        converted = convert(model, call, options, checks=checks, instruments=[recorder, timeline])
        comparison = compared(model, call, options, converted)
    except (Unsupported, PassError) as error:
        failure = error
    table = _Table()
    page: dict[str, Any] = {
        "model": name,
        "type": type(model).__name__,
        "failure": short_paths(str(failure)) if failure is not None else None,
        "passes": _passes(timeline, recorder.graphs, table, real, failure),
    }
    if converted is not None and comparison is not None:
        page |= describe(converted, recorder.graphs, comparison).as_json() | {"compared": str(comparison)}
        masks = list(dict.fromkeys(s.mask for s in converted.state.sites))
        tree, logits, prefix = _tree(converted.state) if real else (None, None, [])
        page["masks"] = [_mask(m, tree) for m in masks]
        if tree is not None and logits is not None:
            page["tree"] = _explored(tree, logits, prefix)
    return page | {"nodes": table.rows, "sources": table.sources}


class _Table:
    """Node lines and source lines, each once however many passes show them."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []  # [text, layer, source index or -1, name]
        self.sources: list[dict[str, Any]] = []
        self._row: dict[Any, int] = {}
        self._source: dict[str, int] = {}

    def node(self, node: NodeData, names: dict[str, str]) -> int:
        group = group_of(node.layer)[0]
        text = line(node, names, group) if node.op == "call_function" else _input_text(node, names)
        key = (text, node.layer, node.source)
        if key not in self._row:
            self._row[key] = len(self.rows)
            self.rows.append([text, node.layer, self._line(node.source), node.name])
        return self._row[key]

    def _line(self, source: str) -> int:
        if not source:
            return -1
        if source not in self._source:
            path, number, rest = split_source(source)
            where = rest.removeprefix(", in ").partition(": ")[0]
            snippet = _snippet(path, int(number)) if number else []
            self._source[source] = len(self.sources)
            self.sources.append({"file": short_path(path), "line": int(number or 0), "in": where, "text": snippet})
        return self._source[source]


def _input_text(node: NodeData, names: dict[str, str]) -> str:
    name = names.get(node.name, node.name)
    return f"{name}: {node.type}" if node.op != "output" else "return " + ", ".join(node.inputs)


@functools.cache
def _file(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _snippet(path: str, number: int) -> list[list[Any]]:
    lines = _file(path)
    first = max(1, number - SNIPPET)
    return [[i, lines[i - 1]] for i in range(first, min(len(lines), number + SNIPPET) + 1)]


def _passes(
    timeline: Timeline, graphs: list[Snapshot], table: _Table, real: bool, failure: Exception | None
) -> list[dict[str, Any]]:
    found = []
    for i, step in enumerate(timeline.steps):
        entry: dict[str, Any] = {
            "name": step.name,
            "takes": step.before,
            "leaves": step.after,
            "hash": step.source_hash,
        }
        if i < len(timeline.records):
            record = timeline.records[i]
            entry |= {"ms": record.seconds * 1e3, "matches": record.matches, "changed": record.changed}
            entry |= {"before": record.nodes_before, "after": record.nodes_after}
            entry["checks"] = "rules and meaning hold" if real else "rules hold"
            entry |= _difference(graphs[i], graphs[i + 1], table)
        else:
            entry |= {"failed": short_paths(str(failure)), "rows": [], "checks": "failed"}
        found.append(entry)
    return found


def _difference(a: Snapshot, b: Snapshot, table: _Table) -> dict[str, Any]:
    found = compare(a, b)
    names = [{g.tokens: "tokens"} | {n.name: n.label for n in g.nodes if n.label} for g in (a, b)]
    codes = {"same": 0, "changed": 1, "removed": 2, "added": 3}
    rows = []
    for kind, old, new in found.rows():
        if (new or old or _NOTHING).label:
            continue  # weights
        before = table.node(old, names[0]) if old is not None else -1
        after = table.node(new, names[1]) if new is not None else -1
        rows.append([codes[kind], before, after])
    return {"rows": rows, "removed": len(found.removed), "added": len(found.added), "rewired": len(found.changed)}


_NOTHING = NodeData("", "", "")


def _mask(mask: MaskSpec, tree: TokenTree | None) -> dict[str, Any]:
    reach = mask.reach
    step = max(1, -(-reach // 10)) if reach > 12 else 1
    shown = predicate_mask(lambda q, k: mask.sees(q * step, k * step), CELLS)
    entry = {"formula": mask.formula, "svg": mask_svg(shown, mask.formula), "step": step}
    if tree is not None:
        topology = tree_mask(tree.parents, PREFIX, mask.sees)
        entry["tree"] = mask_svg(topology, f"tree: {mask.formula}", PREFIX, cell=12)
    return entry


def _tree(state: GraphState) -> tuple[TokenTree, torch.Tensor, list[int]]:
    """A tree of the model's own best guesses, verified by the rewritten graph."""
    value: Any = state.logits.meta["val"]
    vocab = int(value.shape[-1])
    prefix = [(7 * i + 3) % vocab for i in range(PREFIX)]
    first = run_graph(state, TokenTree.chain(prefix), [])[-1]
    tokens, parents = [int(first.argmax())], [-1]
    level = [0]
    for width in (3, 2, 1):
        logits = run_graph(state, TokenTree(tokens, parents), prefix)
        grown = []
        for node in level:
            for token in logits[node].topk(min(width, vocab)).indices.tolist():
                grown.append(len(tokens))
                tokens.append(token)
                parents.append(node)
        level = grown
    tree = TokenTree(tokens, parents)
    return tree, run_graph(state, tree, prefix), prefix


def _explored(tree: TokenTree, logits: torch.Tensor, prefix: list[int]) -> dict[str, Any]:
    chances = logits.float().softmax(-1)
    nodes: list[dict[str, Any]] = []
    for node in range(len(tree)):
        top = chances[node].topk(min(3, chances.shape[-1]))
        guesses = [[int(t), float(p)] for t, p in zip(top.indices, top.values, strict=True)]
        nodes.append({"token": tree.tokens[node], "path": tree.path(node), "depth": tree.depths[node], "next": guesses})
    accepted, at = [0], 0
    while (
        child := next((c for c in tree.children(at) if tree.tokens[c] == nodes[at]["next"][0][0]), None)
    ) is not None:
        accepted.append(child)
        at = child
    svg = tree_svg(
        tree.tokens, tree.parents, accepted=accepted, node_attributes=lambda n: f'data-node="{n}" tabindex="0"'
    )
    return {"prefix": prefix, "nodes": nodes, "accepted": accepted, "svg": svg}
