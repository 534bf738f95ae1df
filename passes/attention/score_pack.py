"""Slopes and biases as inputs: tabulated from the mask's own subgraph, again whenever a weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir.weights import Table

from ..forms.by_value import SampledValues
from ..forms.evaluate import cone
from ..forms.patterns import HIDDEN
from ..forms.score_check import block
from ..framework.state import GraphState


def subgraph(node: fx.Node, gm: fx.GraphModule) -> fx.GraphModule:
    """The part of the graph that computes `node`, as a graph of its own (names kept)."""
    needed = cone(node)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for current in gm.graph.nodes:
        if current in needed:
            copies[current] = graph.node_copy(current, copies.__getitem__)
            copies[current].name = current.name
    graph.output(copies[node])
    return fx.GraphModule(gm, graph)


SLOPES, DISTANCE, PLACES, ROWS = "slopes", "distance", "places", "rows"


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Evaluates the mask with given weights: slopes [heads], or bias [heads, limit] by distance, of which the first
    `seen` are visible, or bias [limit, heads, limit] by the query's place and the distance, or the rows of a mask
    [.., T, seen], [limit, heads, seen].

    A slope is read over `seen` tokens, a power of two: two far numbers next to each other differ by their rounding.
    """

    mask: fx.GraphModule
    tokens: str
    kind: str
    heads: int
    limit: int
    seen: int

    @property
    def shape(self) -> tuple[int, ...]:
        if self.kind in (PLACES, ROWS):
            return (self.limit, self.heads, self.seen if self.kind == ROWS else self.limit)
        return (self.heads,) if self.kind == SLOPES else (self.heads, self.limit)

    def __call__(self, constants: Mapping[str, Tensor]) -> Tensor:
        output: Any = next(x for x in reversed(self.mask.graph.nodes) if x.op == "output").args[0]
        sampled = SampledValues(output, self.mask, self.tokens, constants, None)
        if self.kind in (PLACES, ROWS):
            return self._rows(sampled).expand(self.shape).contiguous()
        query = self.seen if self.kind == SLOPES else self.seen - 1
        keys = torch.tensor([query - self.seen, query]) if self.kind == SLOPES else torch.arange(query, -1, -1)
        row = block(sampled, query + 1, torch.tensor([query]), keys)[:, 0]  # [heads or 1, keys]
        if self.kind == SLOPES:
            found = (row[:, 1] - row[:, 0]) / self.seen
        else:
            found = torch.nn.functional.pad(row, (0, self.limit - self.seen))
        return found.expand(self.heads, *found.shape[1:]).contiguous()

    def _rows(self, sampled: SampledValues) -> Tensor:
        """[limit, heads or 1, seen or limit]"""
        places = torch.arange(self.limit)
        keys = places if self.kind == PLACES else torch.arange(self.seen)
        rows = block(sampled, self.limit, places, keys).transpose(0, 1)
        if self.kind == ROWS:
            return rows
        away = (places[:, None] - places).clamp(min=0)  # the key at each distance
        return rows.masked_fill(rows <= HIDDEN, 0).gather(-1, away[:, None].expand(rows.shape))


def score_table(state: GraphState, mask: fx.Node, kind: str, heads: int, limit: int, seen: int) -> Table:
    """The weight expression of a mask's slopes or biases."""
    part = subgraph(mask, state.gm)
    function = ScoreTable(part, state.tokens, kind, heads, limit, seen)
    inputs = tuple((n.name, state.weights[n.name]) for n in part.graph.nodes if n.name in state.weights)
    value = mask.meta["val"]
    return Table(function, inputs, function.shape, value.dtype, value.device)
