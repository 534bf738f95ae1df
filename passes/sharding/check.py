"""The verifier of a rank's graph: all placements are derived again, from what weights and pools are made of.

Nothing that the pass noted is believed but the whole sizes of reshapes. Where an operand does not lie as its op's rule
needs it, where a partial sum or a part of a value leaves the graph, or a collective is not waited for, there is a
problem.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.errors import PassError
from treespec_compiler.ir.collectives import ALL_GATHER, ALL_REDUCE, WAIT
from treespec_compiler.ir.inputs import is_pool

from ..forms.form import Shape, shape_of
from ..framework.state import GraphState
from .expressions import placement_of
from .placements import REPLICATED, Placement, Segment, Sharded, sharded
from .rewriting import WHOLE
from .table import op_of, rule_of, whole_shape


def problems(state: GraphState, ranks: int) -> list[str]:
    """What does not fit together in a graph of one of `ranks` ranks; an empty list when everything does."""
    found = _Derivation(state, ranks)
    return found.run()


def placements(state: GraphState, ranks: int) -> dict[str, Placement]:
    """Where each value of the graph lies, by node name; a sound graph is asked for."""
    found = _Derivation(state, ranks)
    found.run()
    return {node.name: place for node, place in found.placed.items() if not isinstance(place, tuple)}


class _Derivation:
    def __init__(self, state: GraphState, ranks: int) -> None:
        self.state, self.ranks = state, ranks
        self.placed: dict[fx.Node, Any] = {}
        self.whole: dict[fx.Node, Shape] = {}

    def run(self) -> list[str]:
        for node in self.state.graph.nodes:
            problem = self._node(node)
            if problem is not None:
                return [problem]
        return []

    def _node(self, node: fx.Node) -> str | None:
        if node.op == "output":
            bad = next((n for n in node.args[0] if self.placed[n] != REPLICATED), None)
            return f"output {bad.name} is {self.placed[bad]}, not whole on every rank" if bad is not None else None
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.target is operator.getitem:
            self._put(node, self.placed[node.args[0]][node.args[1]])
            return None
        values = node.meta.get("val")
        if not isinstance(values, (torch.Tensor, tuple, list)):
            return self._number(node)
        return self._call(node, values)

    def _placeholder(self, node: fx.Node) -> str | None:
        try:
            place = self._input(node)
        except PassError as error:
            return f"input {node.name}: {error.problem}"
        self._put(node, place)
        return None

    def _input(self, node: fx.Node) -> Placement:
        if node.name in self.state.weights:
            return placement_of(self.state.weights[node.name], self.ranks)
        if is_pool(node.name):
            return self._pool(node)
        return REPLICATED

    def _pool(self, node: fx.Node) -> Placement:
        """A pool lies as its site's KV groups are dealt out; `state.groups` are those of the whole model."""
        reader = next(iter(node.users))
        groups = self.state.whole_groups[reader.meta["site"]]
        repeat = self.ranks // groups if self.ranks > groups else 1
        if node.meta["val"].shape[1] == groups:
            return REPLICATED
        return sharded(1, (Segment(groups, repeat),), self.ranks, "KV group")

    def _number(self, node: fx.Node) -> str | None:
        """Only sizes that are the same on every rank may be asked for."""
        for of in node.all_input_nodes:
            place = self.placed.get(of)
            if isinstance(place, Sharded) and node.args[1] == place.dim:
                return f"{node.format_node()}: the size of a dimension that is {place}"
        return None

    def _call(self, node: fx.Node, values: Any) -> str | None:
        if node.target in _COLLECTIVES and {user.target for user in node.users} != {WAIT}:
            return f"{node.format_node()}: it is not waited for"
        if WHOLE in node.meta:
            self.whole[node] = node.meta[WHOLE]
        op = op_of(node, self.ranks, self._shapes(node))
        given = [self.placed[of] for of in op.operands]
        rule = rule_of(node)
        whole = all(g == REPLICATED for g in given)
        outcome = rule.fits(op, given) if rule is not None and not whole else None
        if outcome is None:
            if node.target in _COLLECTIVES:
                return f"{node.format_node()}: its operand is {given[0]} already"
            bad = next((of for of, g in zip(op.operands, given, strict=True) if g != REPLICATED), None)
            if bad is not None:
                return f"{node.format_node()}: {bad.name} is {self.placed[bad]}, and the op needs it whole"
            several = isinstance(values, (tuple, list))
            self._put(node, (REPLICATED,) * len(values) if several else REPLICATED)
            return None
        for of, need, got in zip(op.operands, outcome.needs, given, strict=True):
            if need != got:
                return f"{node.format_node()}: {of.name} is {got}, and the op needs it {need}"
        self._put(node, outcome.gives)
        return None

    def _shapes(self, node: fx.Node) -> dict[fx.Node, Shape]:
        """Whole shapes of what is known, and of the node: that of its part where nothing else is said."""
        if node not in self.whole and isinstance(node.meta["val"], torch.Tensor):
            return self.whole | {node: shape_of(node)}
        return self.whole

    def _put(self, node: fx.Node, place: Any) -> None:
        self.placed[node] = place
        if not isinstance(place, tuple) and isinstance(node.meta.get("val"), torch.Tensor):
            # NOTE where rows were picked, sizes that count tokens are old ones, all of them alike.
            self.whole[node] = node.meta.get(WHOLE) or whole_shape(node, place)


_COLLECTIVES = (ALL_REDUCE, ALL_GATHER)
