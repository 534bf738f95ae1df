"""What ranks of a mesh do not carry yet, by shares of a layer or by stages: a model that has it is refused."""

from __future__ import annotations

from treespec_compiler.errors import Refusal

from ..framework.state import GraphState, refuse


def refuse_uncarried(state: GraphState) -> None:
    """Raises `Unsupported` where a layer keeps something besides the K/V of its heads."""
    what = None
    if state.states:
        site = state.states[0]
        what = f"{site.name} keeps a state ({site.kind}) besides K/V"
    elif indexed := [site for site in state.sites if site.index_dim]:
        what = f"an indexer chooses the keys of {indexed[0].name} for all of its heads"
    if what is not None:
        reason = f"{what}, which ranks of a mesh do not carry yet"
        raise refuse(Refusal.MESH, reason, way_out="run the model on one device")
