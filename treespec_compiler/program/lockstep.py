"""All ranks of a mesh in one process: op by op, stage after stage, every rank in turn, collectives by hand.

What a mesh computes can be seen without one: the graph is the same on all ranks of a stage, and only weights and caches
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import PassError
from ..ir import ops
from ..ir.collectives import ALL_GATHER, ALL_REDUCE, WAIT
from ..ir.inputs import STREAM, TOKENS, pool_names
from ..passes.framework.state import GraphState
from ..passes.sharding.expressions import for_rank
from ..tree import Forest, TokenTree
from .batch import Part, pack
from .cache import TreeCache


class Lockstep:
    """The ranks of a graph that pass "shard" made, or of all stages that pass "split" made of it, the first one first.

    Each rank has its weights, and its cache of `slots`.
    """

    def __init__(self, state: GraphState | Sequence[GraphState], max_tokens: int, slots: int = 1) -> None:
        states = [state] if isinstance(state, GraphState) else state
        self.stages = [_Stage(each, max_tokens, slots) for each in states]
        self.state, self.weights = states[-1], self.stages[-1].weights
        self.caches = [cache for stage in self.stages for cache in stage.caches]

    def prefill(self, ids: Sequence[int], slot: int = 0) -> Tensor:
        """Commit a prompt; logits [V] after it."""
        rows = self._run([Part(slot, TokenTree.chain(list(ids)))])
        for cache in self.caches:
            cache._append(slot, list(ids))
        return rows[-1]

    def verify(self, tree: TokenTree | Forest) -> Tensor:
        """Logits [N, V], as `TreeProgram.verify`."""
        items = tree.items if isinstance(tree, Forest) else [(0, tree)]
        rows = self._run([Part(slot, each) for slot, each in items])
        for cache in self.caches:
            for slot, each in items:
                cache._trees[slot] = each
        return rows

    def commit(self, path: Any) -> None:
        """As `TreeCache.commit`."""
        for cache in self.caches:
            cache.commit(path)

    def _run(self, parts: Sequence[Part]) -> Tensor:
        """Raises `PassError` where the ranks do not end with the same bits."""
        for cache in self.caches:
            for part in parts:
                cache._reserve(part.slot, len(part.tree))
        given: list[dict[str, Tensor]] = [{} for _ in self.stages[0].caches]
        with torch.no_grad():
            for stage in self.stages:
                outputs = stage.run(parts, given)
                given = [{STREAM.name: output[0]} for output in outputs]
        rows = [self.state.logits_given.rows(output[0]) for output in outputs]
        if any(not torch.equal(rows[0].nan_to_num(), other.nan_to_num()) for other in rows[1:]):
            raise PassError(pass_name="shard", problem="ranks with different logits", expected="the same bits on all")
        return rows[0]


class _Stage:
    """The ranks that share one graph."""

    def __init__(self, state: GraphState, max_tokens: int, slots: int) -> None:
        self.state, self.ranks = state, 1 if state.cut is None else state.cut.ranks
        self.device = state.device
        names = [name for name in state.weights if any(n.name == name for n in state.graph.nodes)]
        self.weights = [
            {name: for_rank(state.weights[name], rank, self.ranks).build(state.weights.read) for name in names}
            for rank in range(self.ranks)
        ]
        self.caches = [
            TreeCache(state.sites, max_tokens, slots, self.device, ops.commit_path) for _ in range(self.ranks)
        ]

    def run(self, parts: Sequence[Part], given: Sequence[dict[str, Tensor]]) -> list[Any]:
        """Outputs of every rank, of which each is `given` what the stage before gave."""
        return self._interpret([self._inputs(rank, parts) | own for rank, own in enumerate(given)])

    def _inputs(self, rank: int, parts: Sequence[Part]) -> dict[str, Tensor]:
        cache = self.caches[rank]
        given = pack(parts, cache, self.device).named()
        given[self.state.tokens] = given.pop(TOKENS)
        pools = (name for site in self.state.sites for name in pool_names(site.index, bool(site.index_dim)))
        return {**self.weights[rank], **given, **dict(zip(pools, cache.pools, strict=True))}

    def _interpret(self, inputs: list[dict[str, Tensor]]) -> list[Any]:
        values: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        last = {of: node for node in self.state.graph.nodes for of in node.all_input_nodes}
        for node in self.state.graph.nodes:
            if node.op == "placeholder":
                for own, given in zip(values, inputs, strict=True):
                    own[node] = given[node.name]
            elif node.op == "get_attr":
                for own in values:
                    own[node] = getattr(self.state.gm, str(node.target))
            elif node.op == "output":
                return [[own[n] for n in node.args[0]] for own in values]
            else:
                self._node(node, values)
            for of in node.all_input_nodes:
                if last[of] is node:
                    for own in values:
                        del own[of]
        raise AssertionError("a graph without an output")

    def _node(self, node: fx.Node, values: list[dict[fx.Node, Any]]) -> None:
        together = COLLECTIVES.get(node.target)
        if together is not None:
            terms = [own[node.args[0]] for own in values]
            whole = together(terms)
            for own in values:
                own[node] = whole.clone()
            return
        for own in values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), own.__getitem__)
            own[node] = args[0] if node.target is WAIT else node.target(*args, **kwargs)


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0)


COLLECTIVES: dict[Any, Callable[[list[Tensor]], Tensor]] = {
    ALL_REDUCE: _sum,
    ALL_GATHER: torch.cat,
}
"""What every rank holds afterwards, of what each of them gave."""
