"""Models cut for ranks in this process: one conversion, then a state for any number of ranks, run in lockstep."""

from __future__ import annotations

from collections.abc import Sequence

from oracles import assert_rows, random_tree
from torch import nn

from treespec_compiler.capture.call import call_spec
from treespec_compiler.errors import PassError
from treespec_compiler.mesh import Mesh
from treespec_compiler.options import Options
from treespec_compiler.passes.framework.found import built_in
from treespec_compiler.passes.framework.manager import run_passes
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.passes.shard import PASS
from treespec_compiler.passes.sharding.mesh import RankShare
from treespec_compiler.passes.split import PASS as SPLIT
from treespec_compiler.passes.splitting.stage import StageShare
from treespec_compiler.pipeline import check_level, convert
from treespec_compiler.program.lockstep import Lockstep

LATER = ("fuse", "fuse-rope", "bind-kernels")


def uncut(model: nn.Module) -> GraphState:
    """The model's graph as pass "shard" finds it."""
    options = Options.parse({"lowering": "eager", "pipeline": ",".join(f"-{name}" for name in LATER)})
    return convert(model, call_spec(model, None, None), options).state


def cut(state: GraphState, ranks: int, rank: int = 0, later: Sequence[str] = ()) -> GraphState:
    """A copy of it for one rank, after these later passes; the level's verifier runs after each."""
    mine = state.copy()
    mine.cut = RankShare(ranks, rank)
    run_passes(mine, [PASS, *(p for p in built_in() if p.slug in later)], [check_level])
    return mine


def stages(state: GraphState, mesh: str, later: Sequence[str] = ()) -> list[GraphState]:
    """Copies of it for the stages of a mesh, the first one first, as `cut`; each for the first rank of its stage."""
    wanted, found = Mesh.parse(mesh), []
    for rank in (wanted.ranks_of(stage)[0] for stage in range(wanted.pp)):
        mine = state.copy()
        mine.cut = RankShare(wanted.tp, 0) if wanted.tp > 1 else None
        mine.stage = StageShare(wanted, rank)
        run_passes(mine, [PASS, SPLIT, *(p for p in built_in() if p.slug in later)], [check_level])
        found.append(mine)
    return found


def problems(state: GraphState) -> str:
    """What the level's verifier says of a graph; empty when nothing."""
    try:
        check_level(state, "test")
    except PassError as error:
        return error.problem
    return ""


def assert_ranks_decode(
    model: nn.Module, state: GraphState | Sequence[GraphState], vocab: int, rounds: int = 2
) -> None:
    """The path oracle on all ranks at once: prefill, then rounds of verify and commit."""
    prefix = [(5 * i + 3) % vocab for i in range(7)]
    ranks = Lockstep(state, max_tokens=64)
    ranks.prefill(prefix)
    for seed in range(rounds):
        tree = random_tree(7, vocab, seed)
        assert_rows(model, ranks.verify(tree), tree, prefix)
        path = tree.path(len(tree) - 1)
        ranks.commit(path)
        prefix += [tree.tokens[node] for node in path]
