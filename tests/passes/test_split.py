"""Pass "split": what a stage holds, what the verifier notices, what is refused, and how layers are dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharded import LATER, assert_ranks_decode, problems, stages, uncut
from torch import nn

from treespec_compiler.errors import InvalidOption, Refusal, Unsupported
from treespec_compiler.ir.inputs import STREAM
from treespec_compiler.mesh import Mesh
from treespec_compiler.options import Options
from treespec_compiler.passes.framework.found import built_in
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.passes.residual.stream import cuts
from treespec_compiler.passes.splitting.balance import bounds
from treespec_compiler.passes.splitting.cutting import take
from treespec_compiler.passes.splitting.stage import StageLayers, StageShare, Unsplit

VOCAB, WIDTH = 32, 16


class Decoder(nn.Module):
    """Layers of attention and an MLP. `around`: the embeddings go into every layer, too."""

    def __init__(self, layers: int = 3, around: bool = False) -> None:
        super().__init__()
        self.around, self.embed, self.head = around, nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.places = nn.Embedding(64, WIDTH)
        for name, wide in (("qkv", 3 * WIDTH), ("out", WIDTH), ("up", WIDTH)):
            setattr(self, name, nn.ModuleList(nn.Linear(WIDTH, wide) for _ in range(layers)))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        at = self.places(torch.arange(input_ids.shape[1]))
        x = first = self.embed(input_ids) + at
        for qkv, out, up in zip(self.qkv, self.out, self.up, strict=True):
            q, k, v = (e.unflatten(-1, (2, -1)).transpose(1, 2) for e in qkv(x + at).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).reshape(1, input_ids.shape[1], WIDTH))
            x = x + torch.relu(up(x + first if self.around else x))
        return self.head(x)


def decoder(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(**sizes).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return decoder()


@pytest.fixture(scope="module")
def whole(model: nn.Module) -> GraphState:
    return uncut(model)


def test_stages_together_say_what_the_model_says(model: nn.Module, whole: GraphState) -> None:
    assert_ranks_decode(model, stages(whole, "pp=2"), VOCAB, rounds=1)


@pytest.mark.family
@pytest.mark.parametrize("later", [(), LATER])
@pytest.mark.parametrize("mesh", ["pp=2", "pp=3", "tp=2,pp=2"])
def test_stages_of_other_meshes_do(model: nn.Module, whole: GraphState, mesh: str, later: tuple[str, ...]) -> None:
    assert_ranks_decode(model, stages(whole, mesh, later=later), VOCAB, rounds=2)


def test_a_stage_has_its_own_weights_pools_and_inputs(whole: GraphState) -> None:
    first, last = stages(whole, "pp=2")
    names = [{source for name in state.weights for source in state.weights[name].sources} for state in (first, last)]
    assert "embed.weight" in names[0] - names[1] and "head.weight" in names[1] - names[0]
    assert names[0] & names[1] == {"places.weight"}  # what positions say is computed where it is read
    assert [len(state.sites) for state in (first, last)] == [2, 1] and [s.index for s in last.sites] == [0]
    assert first.outputs == [STREAM.name] and last.outputs == ["logits"]
    assert STREAM.name not in first.placeholders and "pool_k_0" in last.placeholders
    assert all(user.target is torch.ops.aten.sym_size.int for user in last.node(last.tokens).users)
    assert first.vocab_size == VOCAB and first.dtype == torch.float32
    shares = [first.whole.stages, last.whole.stages]  # type: ignore[union-attr]
    assert shares[0] == shares[1] and [(s.start, s.stop) for s in shares[0]] == [(0, 2), (2, 3)]


def test_a_value_that_flows_around_the_cut_is_refused() -> None:
    with pytest.raises(Unsupported, match="2 stages need 1 places between layers, and the model has 0: no single") as e:
        stages(uncut(decoder(around=True)), "pp=2")
    assert e.value.kind is Refusal.MESH and "ranks that share every layer" in str(e.value)


def test_the_verifier_sees_what_flows_around_a_cut(whole: GraphState) -> None:
    """Cut where the graph must not be cut: between the norm's reader and the sum, say."""
    inside = next(n for n in whole.graph.nodes if n.meta.get("site") == 1)
    mine = whole.copy()
    cut = next(n for n in mine.graph.nodes if n.name == inside.name)
    share = StageShare(Mesh(pp=2), 0)
    layers = StageLayers(0, 1, ("", ""), 0)
    taken = Unsplit(mine.logits_value, VOCAB, (layers, StageLayers(1, 3, ("", ""), 0)))
    take(mine, cut, None)
    mine.stage, mine.whole = share, taken
    found = problems(mine)
    assert "a value of the tokens that does not come through the stream" in found
    assert "attention sites" in found


def test_a_stage_that_gives_something_else_is_an_error(whole: GraphState) -> None:
    first, last = stages(whole, "pp=2")
    first.stage, last.stage = last.stage, first.stage
    assert "outputs stream of stage 1, expected logits" in problems(first)
    assert "a first stage that reads a stream" in problems(last)


def test_more_stages_than_layers_are_refused(whole: GraphState) -> None:
    with pytest.raises(Unsupported, match="4 stages need 3 places between layers, and the model has 2: it has 3"):
        stages(whole, "pp=4")


def test_states_and_further_outputs_are_refused(whole: GraphState) -> None:
    other = whole.copy()
    other.states = [SimpleNamespace(name="ssm", kind="recurrence")]  # type: ignore[list-item]
    with pytest.raises(Unsupported, match=r"ssm keeps a state .* ranks of a mesh do not carry"):
        stages(other, "pp=2")
    tapped = whole.copy()
    tapped.output.args = ((tapped.logits, cuts(tapped)[1][-1]),)
    tapped.outputs = ["logits", "hidden:1"]
    with pytest.raises(Unsupported, match="outputs logits, hidden:1 of a model in 2 stages"):
        stages(tapped, "pp=2")


def test_nothing_happens_without_the_option(whole: GraphState) -> None:
    (pass_,) = (p for p in built_in() if p.name == "split")
    assert not pass_.is_wanted(whole, Options()) and pass_.run(whole) == 0


def test_meshes_are_read() -> None:
    mesh = Mesh.parse(" pp=3, tp=2")
    assert (mesh, mesh.ranks, str(mesh)) == (Mesh(2, 3), 6, "tp=2,pp=3")
    assert [mesh.stage(rank) for rank in range(6)] == [2, 2, 1, 1, 0, 0] and list(mesh.ranks_of(0)) == [4, 5]
    assert Mesh.parse(None) == Mesh.parse("tp=1") == Mesh()
    for text in ("", "tp", "pp=0", "tp=2,tp=2", "dp=2", "tp=2 pp=2", 2):
        with pytest.raises(InvalidOption, match="'tp=N', 'pp=M' or 'tp=N,pp=M'"):
            Options(mesh=text)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.data())
def test_no_dealing_out_has_a_smaller_largest_stage(sizes: Sequence[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(sizes)))
    pieces = [{f"own {i}": size, "shared": 5} for i, size in enumerate(sizes)]
    found = bounds(pieces, stages)
    assert found[0] == 0 and found[-1] == len(sizes) and all(a < b for a, b in pairwise(found))

    def best(start: int, left: int) -> int:
        if left == 1:
            return sum(sizes[start:]) + 5
        ends = range(start + 1, len(sizes) - left + 2)
        return min(max(sum(sizes[start:end]) + 5, best(end, left - 1)) for end in ends)

    largest = max(sum(sizes[a:b]) + 5 for a, b in pairwise(found))
    assert largest == best(0, stages)
