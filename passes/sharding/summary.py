"""What a cut graph holds and says to other ranks, for people: placements and bytes of weights, collectives."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import fx

from treespec_compiler.ir.attention import tree_attention
from treespec_compiler.ir.collectives import ALL_GATHER, ALL_REDUCE
from treespec_compiler.ir.library import definition
from treespec_compiler.ir.provenance import layer_path
from treespec_compiler.ir.weights import Expression

from ..framework.state import GraphState
from .check import placements
from .expressions import placement_of
from .placements import REPLICATED, Partial, Placement, Segment, Sharded
from .rule import meaning, named
from .rules.products import PRODUCTS


@dataclass(frozen=True)
class HeldWeight:
    """One weight input: the model's tensors it is made of, how it lies, and bytes of it whole and on one rank."""

    names: tuple[str, ...]
    placement: str
    whole_bytes: int
    bytes: int


@dataclass(frozen=True)
class Collective:
    """One call to all ranks: what, in which layer, and bytes that a rank gives for each token (or row of logits)."""

    kind: str
    layer: str
    bytes_per_row: int


@dataclass(frozen=True)
class StageOf:
    """Pipeline stage `index` of `count`: its ranks, its attention layers `start` .. `stop - 1`, the outer ones' names.

    `hands_on`: bytes that a rank gives to the next stage for each token.
    """

    index: int
    count: int
    ranks: tuple[int, ...]
    start: int
    stop: int
    names: tuple[str, str]
    hands_on: int


@dataclass(frozen=True)
class CutSummary:
    """`products`: how many are cut by outputs (column), by inputs (row), or whole. `ranks`: that share every layer."""

    ranks: int
    weights: tuple[HeldWeight, ...]
    collectives: tuple[Collective, ...]
    products: dict[str, int]
    sites: int
    whole_sites: int
    stage: StageOf | None = None
    """None: every rank has all layers."""

    @property
    def bytes(self) -> int:
        """Of weights on one rank."""
        return sum(w.bytes for w in self.weights)

    @property
    def whole_bytes(self) -> int:
        """Of the same weights in one process."""
        return sum(w.whole_bytes for w in self.weights)

    def count(self, kind: str) -> int:
        """Collectives of a kind in one step."""
        return sum(c.kind == kind for c in self.collectives)


def summary(state: GraphState) -> CutSummary:
    """Of the graph of one rank."""
    ranks = 1 if state.cut is None else state.cut.ranks
    used = [n for n in state.graph.nodes if n.op == "placeholder" and n.name in state.weights and n.users]
    weights = tuple(_held(state.weights[n.name], ranks) for n in used)
    collectives = tuple(_collective(n) for n in state.graph.nodes if n.target in (ALL_REDUCE, ALL_GATHER))
    where = _where(state)
    sites = [n for n in state.graph.nodes if definition(n.target) is tree_attention]
    whole = sum(where.get(n.name) == REPLICATED for n in sites)
    kinds = [kind for _, kind in _kinds(state, where)]
    products = {kind: kinds.count(kind) for kind in ("column", "row", "whole")}
    return CutSummary(ranks, weights, collectives, products, len(state.sites), whole, _stage(state))


def _where(state: GraphState) -> dict[str, Placement]:
    if state.cut is None:
        return {node.name: REPLICATED for node in state.graph.nodes}
    return placements(state, state.cut.ranks)


def _stage(state: GraphState) -> StageOf | None:
    share, whole = state.stage, state.whole
    if share is None or whole is None:
        return None
    layers, handed = whole.stages[share.stage], state.logits.meta["val"]
    size = 0 if share.last else int(handed.shape[-1]) * handed.dtype.itemsize
    ranks = tuple(share.mesh.ranks_of(share.stage))
    return StageOf(share.stage, share.mesh.pp, ranks, layers.start, layers.stop, layers.names, size)


def _held(made: Expression, ranks: int) -> HeldWeight:
    placement = placement_of(made, ranks)
    size = prod(made.shape) * made.dtype.itemsize
    whole = size
    if isinstance(placement, Sharded):
        whole = size * placement.size // placement.local(ranks)
    return HeldWeight(made.sources or (str(made),), _text(placement), whole, size)


def _text(placement: Placement) -> str:
    if placement == REPLICATED:
        return "replicated"
    if isinstance(placement, Partial):
        return "on rank 0 alone"
    assert isinstance(placement, Sharded)
    return f"dimension {placement.dim}: {' + '.join(map(_segment, placement.segments))}"


def _segment(segment: Segment) -> str:
    return f"{segment.size}" if segment.repeat == 1 else f"{segment.size} (each part on {segment.repeat} ranks)"


def _collective(node: fx.Node) -> Collective:
    value = node.args[0].meta["val"]
    kind = "all_reduce" if node.target is ALL_REDUCE else "all_gather"
    return Collective(kind, layer_path(node) or "", int(value.shape[-1]) * value.dtype.itemsize)


def _kinds(state: GraphState, where: dict[str, Placement]) -> list[tuple[fx.Node, str]]:
    """Products and how they are cut: by outputs (column), by inputs (row), or whole."""
    found = []
    for node in state.graph.nodes:
        if node.op != "call_function" or meaning(node) not in PRODUCTS:
            continue
        x, weight = (named(node)[name] for name in PRODUCTS[meaning(node)])
        if isinstance(where.get(node.name), Partial):
            found.append((node, "row"))
        elif where.get(weight.name) != REPLICATED:
            found.append((node, "column"))
        elif x.name not in state.weights:
            found.append((node, "whole"))
    return found


def of_weights(state: GraphState) -> dict[str, str]:
    """How the products of each of the model's weights are cut, by its name: "column", "row" or "whole"."""
    found: dict[str, str] = {}
    for node, kind in _kinds(state, _where(state)):
        stack = [named(node)[PRODUCTS[meaning(node)][1]]]
        while stack:
            of = stack.pop()
            if of.name in state.weights:
                found |= dict.fromkeys(state.weights[of.name].sources, kind)
            stack += of.all_input_nodes
    return found
