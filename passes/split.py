"""split: the graph becomes that of one of several pipeline stages, each with some of the layers and their weights.

Off unless option mesh has stages. A stage is what lies between two proved cuts of the residual stream
(`residual.stream`): a rank hands the stream of the new nodes to the next one, and nothing else. Layers are dealt out so
that the largest stage is as small as it can be.
"""

from __future__ import annotations

from itertools import pairwise

from torch import fx

from treespec_compiler.errors import Refusal

from .framework.manager import Pass
from .framework.state import GraphState, refuse
from .locality.ids import input_vocab
from .residual.stream import cuts
from .sharding.carried import refuse_uncarried
from .splitting.balance import bounds
from .splitting.cutting import behind, sites_of, take, weights_behind
from .splitting.stage import StageLayers, Unsplit


def split(state: GraphState) -> int:
    """Returns how many attention sites are left."""
    share = state.stage
    if share is None:
        return 0
    count = share.mesh.pp
    refuse_uncarried(state)
    if len(state.outputs) > 1:
        raise refuse(
            Refusal.MESH,
            f"outputs {', '.join(state.outputs)} of a model in {count} stages, each of which gives one value",
            way_out="leave pass tap out of the pipeline",
        )
    places = _places(state, count)
    ends = [*places, state.logits]
    pieces = [weights_behind(state, start, end) for start, end in zip([None, *places], ends, strict=True)]
    chosen = bounds(pieces, count)
    inner = [places[at - 1] for at in chosen[1:-1]]
    whole = Unsplit(state.logits.meta["val"], input_vocab(state), _layers(state, inner))
    start, end = list(pairwise([None, *inner, None]))[share.stage]
    take(state, start, end)
    state.whole = whole
    return len(state.sites)


def _places(state: GraphState, stages: int) -> list[fx.Node]:
    """Where the graph can be cut: between two attention layers, as often as one value carries everything there."""
    groups = cuts(state)
    inner = groups[1 : len(state.sites)]
    found = [group[-1] for group in inner if group]
    if len(found) >= stages - 1:
        return found
    missing = next((k for k, group in enumerate(inner) if not group), None)
    reason = f"it has {len(state.sites)} attention layers"
    if missing is not None:
        reason = f"no single value carries everything from attention {missing} to attention {missing + 1}"
    raise refuse(
        Refusal.MESH,
        f"{stages} stages need {stages - 1} places between layers, and the model has {len(found)}: {reason}",
        way_out="choose fewer stages, or ranks that share every layer (tp)",
    )


def _layers(state: GraphState, inner: list[fx.Node]) -> tuple[StageLayers, ...]:
    found = []
    for start, end in pairwise([None, *inner, state.logits]):
        assert end is not None
        sites = sites_of(behind(state, start, [end]))
        first, last = (state.sites[site].layer or state.sites[site].name for site in (sites[0], sites[-1]))
        size = sum(weights_behind(state, start, end).values())
        found.append(StageLayers(sites[0], sites[-1] + 1, (first, last), size))
    return tuple(found)


PASS = Pass(
    "split",
    split,
    before="rows are selected",
    after="same level; the graph of one stage, which reads the stream of the stage before it and nothing else of it",
    optional=True,
    needs=("select rows",),
    place_after=("shard",),
    place_before=("tap", "fuse", "fuse rope", "join linears", "bind kernels"),
    standard=False,
    wanted=lambda state, options: state.stage is not None,
)
