"""shard: the graph becomes that of one of several ranks, each with a part of the weights, the heads and the K/V.

Off without option mesh. Placements follow from one rule an op (`sharding`): attention is cut by head, its products by
what heads need, an MLP by features, the head by rows of the vocabulary; sums over what is cut become whole again by an
all_reduce, the logits by an all_gather. What no rule cuts is computed whole on every rank.
"""

from __future__ import annotations

from treespec_compiler.errors import Refusal

from .framework.manager import Pass
from .framework.state import GraphState, refuse
from .sharding.carried import refuse_uncarried
from .sharding.plan import make_plan
from .sharding.rewriting import rewrite


def shard(state: GraphState) -> int:
    """Returns how many products and attention sites are cut."""
    cut = state.cut
    if cut is None or cut.ranks == 1:
        return 0
    refuse_uncarried(state)
    plan = make_plan(state, cut.ranks)
    if plan.empty:
        reason = next(iter(plan.whole.values()), "no product's size can be divided")
        raise refuse(
            Refusal.MESH,
            f"nothing of this model can be cut for {cut.ranks} ranks: {reason}",
            next(iter(plan.whole), None),
            way_out="choose a number of ranks that divides its heads, features or vocabulary",
        )
    state.whole_groups = [site.kv_heads for site in state.sites]
    rewrite(state, plan, cut)
    return len(plan.columns) + len(plan.rows) + len(plan.sites)


PASS = Pass(
    "shard",
    shard,
    before="rows are selected",
    after="same level; the graph of one rank, whose placements fit together",
    optional=True,
    needs=("select rows",),
    place_before=("tap", "fuse", "fuse rope", "join linears", "bind kernels"),
    standard=False,
    wanted=lambda state, options: state.cut is not None,
)
