"""What was proved about a model, as plain values: the content of `treespec explain`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from ..capture.call import CallSpec
from ..converted import Converted
from ..ir.inputs import BY_NAME, POOL, POSITIONS, SYMBOLS, TOKENS, Input, is_pool
from ..ir.registry import kernel_of
from ..ir.states import is_over_trees
from ..options import Options
from ..passes.framework.instruments import Recorder
from ..passes.framework.state import GraphState
from ..passes.sharding.summary import CutSummary as CutSummary
from ..passes.sharding.summary import summary
from ..passes.show.snapshot import NodeData, Snapshot, short_paths, short_source
from ..pipeline import convert
from ..program.net import Comparison
from ..program.rounding import Judged
from ..program.tree_program import TreeProgram


@dataclass(frozen=True)
class Site:
    """One attention site, as it is shown."""

    index: int
    module: str
    source: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    mask: str
    bias: str
    softcap: float
    sinks: bool
    positions: str
    scale: float
    bytes_per_token: int


@dataclass(frozen=True)
class StateSite:
    """One site whose past is a state, as it is shown."""

    index: int
    kind: str
    module: str
    source: str
    formula: str
    bytes_per_slot: int
    kernel: str = ""
    """Which implementation of its op was bound."""


@dataclass(frozen=True)
class Explanation:
    sites: list[Site]
    positions: list[tuple[str, str]]  # (formula, source line)
    context: str
    max_context: int | None
    local_values: int
    local_ops: dict[str, int]
    signature: list[tuple[str, str, str]]  # (name, type, meaning)
    result: str
    bytes_per_token: int
    comparison: Comparison
    """With the eager model, the program run op by op."""
    states: list[StateSite] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def explanation_of(text: Mapping[str, Any]) -> Explanation:
    """The inverse of `as_json`. Raises TypeError, KeyError and AttributeError for what is none."""
    comparison = text["comparison"]
    own: dict[str, Any] = {
        "sites": [Site(**site) for site in text["sites"]],
        "states": [StateSite(**site) for site in text["states"]],
        "positions": [(formula, reader) for formula, reader in text["positions"]],
        "signature": [(name, kind, meaning) for name, kind, meaning in text["signature"]],
        "comparison": Comparison(**(comparison | {"worst": Judged(**comparison["worst"])})),
    }
    return Explanation(**(dict(text) | own))


def explain(model: nn.Module, call: CallSpec, options: Options) -> Explanation:
    """Convert the model, compare it, and say what was found; raises `Unsupported` as `tree_program` does."""
    recorder = Recorder()
    converted = convert(model, call, options, instruments=[recorder])
    return describe(converted, recorder.graphs, compared(model, call, options, converted))


def compared(model: nn.Module, call: CallSpec, options: Options, converted: Converted) -> Comparison:
    """The comparison that every program has before its first use, here of the program run op by op.

    Raises `Unsupported` where the program is not the model's.
    """
    program = TreeProgram(model, call, replace(options, lowering="eager", verify="build"), converted)
    program.check()
    return program.comparison or Comparison()


def explain_cut(model: nn.Module, call: CallSpec, options: Options) -> list[CutSummary]:
    """How the model is cut for the ranks of `options.mesh`, which need not be there: a summary of each stage, in order.

    Raises `Unsupported`.
    """
    mesh = options.shape
    ranks = [mesh.ranks_of(stage)[0] for stage in range(mesh.pp)]
    return [summary(convert(model, call, options, rank=rank).state) for rank in ranks]


def describe(converted: Converted, graphs: list[Snapshot], comparison: Comparison) -> Explanation:
    state = converted.state
    proved = next(g for g in graphs if g.after == "token locality")
    treeified = next(g for g in graphs if g.after == "insert state")
    rotated = _positions_of_sites(treeified)
    sites = [
        Site(
            spec.index,
            spec.layer or spec.name,
            short_source(spec.source),
            spec.heads,
            spec.kv_heads,
            spec.key_dim,
            spec.value_dim,
            spec.formula,
            spec.bias,
            spec.softcap,
            spec.sinks,
            rotated.get(spec.index, ""),
            spec.scale,
            spec.bytes_per_token(),
        )
        for spec in state.sites
    ]
    positions = list(dict.fromkeys((p.formula, short_source(p.reader)) for p in state.positions))
    signature, result = _signature(graphs[-1])
    record = converted.history["token locality"]
    return Explanation(
        sites,
        positions,
        _context(converted),
        converted.max_context,
        record.matches,
        _local_ops(proved),
        signature,
        result,
        sum(s.bytes_per_token for s in sites),
        comparison,
        _states(state),
    )


def _states(state: GraphState) -> list[StateSite]:
    bound = [kernel_of(node.target) for node in state.graph.nodes if is_over_trees(node)]
    return [
        StateSite(
            spec.index,
            spec.kind,
            spec.layer or spec.name,
            short_source(spec.source),
            spec.formula,
            spec.bytes_per_slot(),
            kernel.name if kernel is not None else "the reference",
        )
        for spec, kernel in zip(state.states, bound, strict=True)
    ]


def _context(converted: Converted) -> str:
    if converted.max_context is None:
        return "unlimited: nothing in the graph ends at a number of tokens"
    return f"{converted.max_context} tokens at most ({short_paths(converted.limits[0].reason)})"


def _readers(graph: Snapshot, start: str) -> set[str]:
    """Nodes that depend on the input `start`."""
    found = {start}
    for node in graph.nodes:
        if found.intersection(node.inputs):
            found.add(node.name)
    return found


def _local_ops(graph: Snapshot) -> dict[str, int]:
    """How many calls of each op carry tokens, attention aside."""
    readers = _readers(graph, graph.tokens)
    calls = [n for n in graph.nodes if n.op == "call_function" and n.name in readers and n.type and "[" in n.type]
    counted = Counter(n.short_target.removeprefix("aten.").removeprefix("_operator.") for n in calls if n.site is None)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _positions_of_sites(graph: Snapshot) -> dict[int, str]:
    """site -> "rope" or "i" where the queries read positions inside the attention module."""
    content = _readers(graph, graph.tokens)
    nodes = {n.name: n for n in graph.nodes}
    found: dict[int, str] = {}
    for site in graph.nodes:
        if site.site is None:
            continue
        seen: set[str] = set()
        stack = [site.args[0]["node"]]
        while stack:
            node = nodes[stack.pop()]
            if node.name in seen:
                continue
            seen.add(node.name)
            stack += [i for i in node.inputs if _stays_inside(nodes[i], site, content)]
        if POSITIONS in seen:
            waves = {"aten.cos", "aten.sin", "aten.index_select", "aten.index", "aten.embedding"}
            found[site.site] = "rope" if any(nodes[n].short_target in waves for n in seen) else "i"
    return found


def _stays_inside(node: NodeData, site: NodeData, content: set[str]) -> bool:
    return node.name not in content or (bool(node.layer) and node.layer.startswith(site.layer))


def _signature(graph: Snapshot) -> tuple[list[tuple[str, str, str]], str]:
    inputs = [n for n in graph.nodes if n.op == "placeholder" and not n.label]
    rows: list[tuple[str, str, str]] = []
    pools = [n for n in inputs if is_pool(n.name)]
    made = [n for n in inputs if n.made]
    tables = [n for n in made if n.made.startswith("table(")]
    packs = [n for n in made if n not in tables]
    for node in inputs:
        known = BY_NAME.get(TOKENS if node.name == graph.tokens else node.name)
        if known is not None:
            rows.append((known.name, _with_symbols(known, node.type), known.meaning))
    if pools:
        kinds = ", ".join(dict.fromkeys(_pool_type(n.type) for n in pools))
        rows.append((f"{pools[0].name} .. {pools[-1].name}", kinds, POOL.meaning))
    if packs:
        rows.append((f"{packs[0].name} .. {packs[-1].name}", f"{len(packs)} tensors", "weights packed for the kernels"))
    rows += [(n.name, n.type, "slopes or biases of scores, computed from the mask") for n in tables]
    output = next(n for n in graph.nodes if n.op == "output")
    logits = graph[output.inputs[0]].type
    last = logits.rstrip("]").split(", ")[-1]
    return rows, f"{logits.split('[')[0]}[rows, {last}] logits"


def _with_symbols(known: Input, text: str) -> str:
    """`i64[T, 2]` with its sizes by their names."""
    return f"{text.split('[')[0]}[{', '.join(known.dims)}]"


def _pool_type(text: str) -> str:
    kind, sizes = text.rstrip("]").split("[")
    shown = [dim if dim in SYMBOLS else size for dim, size in zip(POOL.dims, sizes.split(", "), strict=True)]
    return f"{kind}[{', '.join(shown)}]"
