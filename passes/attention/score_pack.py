"""Slopes and relative biases as inputs: tabulated from the mask's own subgraph, again whenever a weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from treespec_compiler.ir.weights import Table

from ..forms.evaluate import evaluate_for_length
from ..framework.state import GraphState


def cone(node: fx.Node, gm: fx.GraphModule) -> fx.GraphModule:
    """The part of the graph that computes `node`, as a graph of its own (names kept)."""
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in needed:
            needed.add(current)
            stack.extend(current.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for current in gm.graph.nodes:
        if current in needed:
            copies[current] = graph.node_copy(current, copies.__getitem__)
            copies[current].name = current.name
    graph.output(copies[node])
    return fx.GraphModule(gm, graph)


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Evaluates the mask with given weights: slopes [heads], or bias [heads, limit] by distance."""

    mask: fx.GraphModule
    tokens: str
    kind: str
    heads: int
    limit: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.heads,) if self.kind == "slopes" else (self.heads, self.limit)

    def __call__(self, constants: Mapping[str, Tensor]) -> Tensor:
        n = 2 if self.kind == "slopes" else self.limit
        output = next(x for x in reversed(self.mask.graph.nodes) if x.op == "output")
        values = evaluate_for_length(output.args[0], self.tokens, constants, self.mask, n)
        last = values.expand(*values.shape[:-2], n, n)[..., n - 1, :].reshape(
            -1, n
        )  # [heads or 1, n]: the last query's row
        found = last[:, 1] - last[:, 0] if self.kind == "slopes" else last.flip(1)
        return found.expand(self.heads, *found.shape[1:]).contiguous()


def score_table(state: GraphState, mask: fx.Node, kind: str, heads: int, limit: int) -> Table:
    """The weight expression of a mask's slopes or biases."""
    part = cone(mask, state.gm)
    function = ScoreTable(part, state.tokens, kind, heads, limit)
    inputs = tuple((n.name, state.weights[n.name]) for n in part.graph.nodes if n.name in state.weights)
    value = mask.meta["val"]
    return Table(function, inputs, function.shape, value.dtype, value.device)
