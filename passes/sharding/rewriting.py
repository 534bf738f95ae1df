"""From a graph of whole values to that of one rank: every call on its part, and collectives where rules need them.

The graph is the same on every rank. What differs are weights: a rank's part of each, and, where a rank takes its part
of a value that all of them have, the numbers of its rows.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.inputs import is_pool
from treespec_compiler.ir.private_torch import enable_python_dispatcher
from treespec_compiler.ir.weights import Arange, Expression

from ..forms.form import shape_of
from ..framework.state import GraphState
from .collect import all_gather, all_reduce
from .expressions import placed
from .mesh import RankShare
from .placements import PARTIAL, REPLICATED, Partial, Placement, Sharded
from .plan import CutPlan, constants
from .respell import respelled
from .rule import Fit, Op, PlacementRule, operands, with_arguments
from .table import op_of, rule_of

aten = torch.ops.aten

WHOLE = "whole"
"""Key of a node's `meta`: the whole shape of its value, which a reshape of a part does not tell."""


def rewrite(state: GraphState, plan: CutPlan, cut: RankShare) -> None:
    """Make the state's graph the one of `cut.rank`; the plan is of the same graph."""
    _Rewriting(state, plan, cut).run()


class _Rewriting:
    def __init__(self, state: GraphState, plan: CutPlan, cut: RankShare) -> None:
        self.state, self.plan, self.cut, self.ranks = state, plan, cut, cut.ranks
        self.constant = constants(state)
        self.now: dict[fx.Node, tuple[fx.Node, Any]] = {}
        """Of each node of the whole graph, the node of the rank's graph and its placement (a tuple for several)."""
        self.made: dict[tuple[fx.Node, Placement], fx.Node] = {}

    def run(self) -> None:
        cuts = {pool: keys for node, (_, keys) in self.plan.sites.items() for pool in _pools(node)}
        pools = {pool: keys for pool, keys in cuts.items() if keys.local(self.ranks) < keys.size}
        before = list(self.state.graph.nodes)
        for node in before:
            if node.op == "placeholder":
                self.now[node] = (node, pools.get(node, REPLICATED))
            elif node.op == "output":
                values = [self.convert(value, REPLICATED, node) for value in node.args[0]]
                node.args = (tuple(values),)
            else:
                self.now[node] = self._call(node)
        for pool, keys in pools.items():
            self.now[pool] = (pool, keys)
        self._narrow(pools)
        for node in reversed(before):
            if node.op == "call_function" and self.now[node][0] is not node and not node.users:
                self.state.graph.erase_node(node)
        self.state.rewritten()

    def _narrow(self, pools: dict[fx.Node, Sharded]) -> None:
        """Pools and sites are those of a rank's groups."""
        for pool, keys in pools.items():
            sizes = list(pool.meta["val"].shape)
            sizes[1] = keys.local(self.ranks)
            with self.state.fake_mode:
                pool.meta["val"] = pool.meta["val"].new_empty(sizes)
        for node, (queries, keys) in self.plan.sites.items():
            at = node.meta["site"]
            heads, groups = queries.local(self.ranks), keys.local(self.ranks)
            self.state.sites[at] = replace(self.state.sites[at], heads=heads, kv_heads=groups)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> tuple[fx.Node, Any]:
        if node.target is operator.getitem:
            return self._getitem(node)
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return self._number(node)
        found = respelled(node, [self.now[of][1] for _, of in operands(node)])
        if found is not None:
            return self._respelled(node, found)
        rule, op = rule_of(node), op_of(node, self.ranks)
        given = self._given(op, rule)
        outcome = rule.fits(op, given) if rule is not None and any(g != REPLICATED for g in given) else None
        if outcome is None:
            values = node.meta["val"]
            gives: Any = (REPLICATED,) * len(values) if isinstance(values, (tuple, list)) else REPLICATED
            outcome = Fit((REPLICATED,) * len(op.operands), gives)
        new = [self.convert(of, need, node) for of, need in zip(op.operands, outcome.needs, strict=True)]
        numbers = rule.numbers(op, outcome) if rule is not None else {}
        return self._emit(node, dict(zip(op.operands, new, strict=True)), numbers), outcome.gives

    def _given(self, op: Op, rule: PlacementRule | None) -> list[Placement]:
        """What the operands are now; those of a product that is planned to be cut are as the plan wants them."""
        # A sum that was reduced already, for a norm say, is not carried on in parts: it would be reduced again.
        given = [self.now[of][1] for of in op.operands]
        done = [
            isinstance(g, Partial) and (of, REPLICATED) in self.made for of, g in zip(op.operands, given, strict=True)
        ]
        given = [REPLICATED if reduced else g for g, reduced in zip(given, done, strict=True)]
        column = self.plan.columns.get(op.node)
        if column is not None and rule is not None:
            for want in rule.wants(op, column) or ():
                given[want.operand] = want.cut
        return given

    def _emit(self, node: fx.Node, new: dict[fx.Node, fx.Node], numbers: dict[str, Any]) -> fx.Node:
        """The call on these operands; the node itself where nothing is another."""
        new |= {of: self.now[of][0] for of in node.all_input_nodes if of not in new}
        if not numbers and all(of is to for of, to in new.items()):
            return node
        args, kwargs = with_arguments(node, numbers)
        args, kwargs = fx.node.map_arg((args, kwargs), lambda of: new[of])
        made = self.state.call(node.target, args, kwargs, like=node)
        if "site" in node.meta:
            made.meta["site"] = node.meta["site"]
        if isinstance(node.meta["val"], torch.Tensor):
            made.meta[WHOLE] = shape_of(node)
        return made

    def _getitem(self, node: fx.Node) -> tuple[fx.Node, Any]:
        source, at = node.args
        assert isinstance(source, fx.Node) and isinstance(at, int)
        there, placements = self.now[source]
        return (node if there is source else self._plain(node, (there, at))), placements[at]

    def _number(self, node: fx.Node) -> tuple[fx.Node, Any]:
        """A size: it is asked of what is there now, whose tokens are all there."""
        new = {of: self.now[of][0] for of in node.all_input_nodes}
        if all(of is to for of, to in new.items()):
            return node, REPLICATED
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda of: new[of])
        return self._plain(node, args, kwargs), REPLICATED

    def _plain(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A call of anything, such as getitem, with its value."""
        with self.state.graph.inserting_before(node):
            made = self.state.graph.call_function(node.target, args, kwargs or {})
        values = fx.node.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
        made.meta = {k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta}
        with self.state.fake_mode, enable_python_dispatcher():
            made.meta["val"] = node.target(*values[0], **values[1])
        return made

    def _respelled(self, node: fx.Node, spelling: Any) -> tuple[fx.Node, Any]:
        value = {of: self.now[of][0] for _, of in operands(node)}
        return spelling.emit(self.state, node, value), spelling.gives

    # -- conversions ---------------------------------------------------------------------------------------------------

    def convert(self, node: fx.Node, need: Placement, at: fx.Node) -> fx.Node:
        """The node's value under a placement, made before `at`."""
        there, placement = self.now[node]
        if placement == need:
            return there
        known = self.made.get((node, need))
        if known is None:
            known = self.made[node, need] = self._converted(node, there, placement, need, at)
        return known

    def _converted(self, node: fx.Node, there: fx.Node, placement: Placement, need: Placement, at: fx.Node) -> fx.Node:
        if node in self.constant and placement == REPLICATED:
            made = self._constant(node, need, at)
            if made is not None:
                return made
        if placement != REPLICATED and need != REPLICATED:
            whole = self.convert(node, REPLICATED, at)
            return self._part(whole, need, at)
        if isinstance(placement, Partial):
            return all_reduce(self.state, there, self.cut, at)
        if isinstance(placement, Sharded):
            return all_gather(self.state, there, placement, self.cut, at)
        return self._part(there, need, at)

    def _constant(self, node: fx.Node, need: Placement, at: fx.Node) -> fx.Node | None:
        """A weight's part, or the op on the parts of what it is computed from; None: there is no such thing."""
        if node.op == "placeholder":
            return self.state.add_weight("shard", self._placed(self.state.weights[node.name], need))
        rule, op = rule_of(node), op_of(node, self.ranks)
        if rule is None or not isinstance(need, Sharded):
            return None
        wants = rule.wants(op, need)
        if wants is None or any(want.start for want in wants):
            return None
        given: list[Placement] = [REPLICATED] * len(op.operands)
        for want in wants:
            given[want.operand] = want.cut
        outcome = rule.fits(op, given)
        if outcome is None or outcome.gives != need:
            return None
        new = [self.convert(of, need, at) for of, need in zip(op.operands, outcome.needs, strict=True)]
        return self._emit(node, dict(zip(op.operands, new, strict=True)), rule.numbers(op, outcome))

    def _placed(self, of: Expression, need: Placement) -> Expression:
        return placed(of, need, self.cut.rank, self.ranks)

    def _part(self, whole: fx.Node, need: Placement, at: fx.Node) -> fx.Node:
        """A rank's part of a value that every rank has, by the numbers of its rows; or its term of a sum."""
        if isinstance(need, Partial):
            ones = self.state.add_weight("shard", self._placed(Arange(2, self.state.device), PARTIAL))
            one = self.state.call(aten.select.int, (ones, 0, 1), like=at)
            return self.state.call(aten.mul.Tensor, (whole, one), like=at)
        assert isinstance(need, Sharded)
        rows = self._placed(Arange(need.size, self.state.device), need.moved(0))
        index = self.state.add_weight("shard", rows)
        return self.state.call(aten.index_select.default, (whole, need.dim, index), like=at)


def _pools(node: fx.Node) -> Sequence[fx.Node]:
    return [a for a in node.args if isinstance(a, fx.Node) and is_pool(a.name)]
