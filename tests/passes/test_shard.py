"""Pass "shard": what is cut, what the verifier notices, and that nothing happens without the option."""

from __future__ import annotations

import pytest
import torch
from sharded import LATER, assert_ranks_decode, cut, problems, uncut
from torch import fx, nn
from zoo import make

from treespec_compiler.errors import InvalidOption, Refusal, Unsupported
from treespec_compiler.ir.provenance import op_name
from treespec_compiler.ir.stored_weights import Pack
from treespec_compiler.ir.weights import Arange, Expression, Join, Lone, Shard, Slice, Source, Transpose
from treespec_compiler.options import Options
from treespec_compiler.passes.framework.found import built_in
from treespec_compiler.passes.framework.plan import plan
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.passes.sharding.expressions import for_rank, placed, placement_of
from treespec_compiler.passes.sharding.placements import PARTIAL, REPLICATED, Segment, Sharded

VOCAB = 32


class Block(nn.Module):
    """Fused q, k, v; grouped heads; biases; a gated MLP."""

    def __init__(self, heads: int, groups: int, wide: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.norm, self.qkv = nn.LayerNorm(24), nn.Linear(24, (heads + 2 * groups) * 4)
        self.out = nn.Linear(heads * 4, 24)
        self.gate_up, self.down = nn.Linear(24, 2 * wide, bias=False), nn.Linear(wide, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).split([self.heads * 4, self.groups * 4, self.groups * 4], -1)
        q, k, v = (each.view(1, x.shape[1], -1, 4).transpose(1, 2) for each in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(1, x.shape[1], -1))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, heads: int = 4, groups: int = 2, wide: int = 12, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(vocab, 24), Block(heads, groups, wide), nn.Linear(24, vocab)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(input_ids)))


def decoder(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(**sizes).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return decoder()


@pytest.fixture(scope="module")
def whole(model: nn.Module) -> GraphState:
    return uncut(model)


def calls(state: GraphState, name: str) -> list[fx.Node]:
    return [n for n in state.graph.nodes if op_name(n) == f"_c10d_functional.{name}"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_computes_its_part(model: nn.Module, whole: GraphState, ranks: int) -> None:
    state = cut(whole, ranks)
    assert len(calls(state, "all_reduce")) == 2 and len(calls(state, "all_gather_into_tensor")) == 1
    assert [(s.heads, s.kv_heads) for s in state.sites] == [(4 // ranks, max(2 // ranks, 1))]
    assert_ranks_decode(model, state, VOCAB)


@pytest.mark.parametrize("later", [LATER, ("join-linears",)])
def test_later_passes_work_on_parts(model: nn.Module, whole: GraphState, later: tuple[str, ...]) -> None:
    assert_ranks_decode(model, cut(whole, 2, later=later), VOCAB, rounds=1)


def test_graphs_of_all_ranks_are_one(whole: GraphState) -> None:
    first, last = cut(whole, 4, 0), cut(whole, 4, 3)
    assert str(first.graph) == str(last.graph)
    assert {n: for_rank(made, 3, 4) for n, made in first.weights.items()} == dict(last.weights)


def test_any_all_reduce_that_is_left_out_is_noticed(whole: GraphState) -> None:
    state = cut(whole, 2)
    assert problems(state) == ""
    for at in range(len(calls(state, "all_reduce"))):
        other = state.copy()
        reduce = calls(other, "all_reduce")[at]
        (wait,) = reduce.users
        wait.replace_all_uses_with(reduce.args[0])  # type: ignore[arg-type]
        assert "is partial sum" in problems(other)


def test_a_gather_that_is_left_out_is_noticed(whole: GraphState) -> None:
    state = cut(whole, 2).copy()
    (gather,) = calls(state, "all_gather_into_tensor")
    state.output.args = ((gather.args[0],),)
    assert "not whole on every rank" in problems(state)


def test_a_collective_that_is_not_waited_for_is_noticed(whole: GraphState) -> None:
    state = cut(whole, 2).copy()
    wait = calls(state, "wait_tensor")[0]
    wait.replace_all_uses_with(wait.args[0])  # type: ignore[arg-type]
    assert "not waited for" in problems(state)


def test_a_sum_that_is_reduced_twice_is_noticed(whole: GraphState) -> None:
    state = cut(whole, 2).copy()
    wait = calls(state, "wait_tensor")[0]
    again = state.call(torch.ops._c10d_functional.all_reduce.default, (wait, "sum", "treespec_tp"), like=wait.next)
    done = state.call(torch.ops._c10d_functional.wait_tensor.default, (again,), like=again.next)
    wait.replace_all_uses_with(done, delete_user_cb=lambda user: user is not again)
    assert "is replicated already" in problems(state)


def test_a_weight_that_is_cut_otherwise_is_noticed(whole: GraphState) -> None:
    state = cut(whole, 2).copy()
    found = [name for name, made in state.weights.items() if isinstance(made, (Shard, Join, Lone))]
    assert (
        len(found) == 9
    )  # qkv and gate_up in segments, out, down, head; biases of qkv, head, and two that one rank adds
    for name in found:
        made = state.weights[name]
        source = state.weights[name].sources[0]
        state.weights.add(name, Source(source, made.shape, made.dtype, made.device, ()))
        assert problems(state) != "", name
        state.weights.add(name, made)
    assert problems(state) == ""


def test_heads_that_do_not_divide_leave_attention_whole() -> None:
    model = decoder(heads=9, groups=3)
    state = cut(uncut(model), 2)
    assert [(s.heads, s.kv_heads) for s in state.sites] == [(9, 3)]
    assert len(calls(state, "all_reduce")) == 1  # the MLP's
    assert_ranks_decode(model, state, VOCAB, rounds=1)


def test_nothing_to_cut_is_refused() -> None:
    model = decoder(heads=3, groups=3, wide=7, vocab=33)
    with pytest.raises(Unsupported, match="3 heads in 3 KV groups cannot be dealt out to 2 ranks") as caught:
        cut(uncut(model), 2)
    assert caught.value.kind is Refusal.MESH and caught.value.source and "divides" in str(caught.value)


def test_without_the_option_there_is_no_pass() -> None:
    (pass_,) = (p for p in built_in() if p.name == "shard")
    assert pass_ not in plan(None, built_in())
    assert Options.parse().ranks == 1 and Options.parse({"mesh": "tp=1"}).ranks == 1


@pytest.mark.parametrize("mesh", ["tp=0", "tp=two", "pp=0", "tp=2,tp=2", "draft=1", 2, ""])
def test_a_mesh_that_is_not_built_is_refused_by_name(mesh: object) -> None:
    with pytest.raises(InvalidOption, match=r"Invalid option mesh: got .*'tp=N,pp=M'.*draft ranks are not"):
        Options.parse({"mesh": mesh})


Q = Source("q", (8, 6), torch.float32, torch.device("cpu"), (6, 1))
TWO = Sharded(0, (Segment(4), Segment(4, 2)))


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (REPLICATED, Q),
        (PARTIAL, Lone(Q, False)),
        (Sharded(1, (Segment(6),)), Shard(Q, 1, 1, 2)),
        (Sharded(0, (Segment(8, 2),)), Q),
        (TWO, Join((Shard(Slice(Q, 0, 0, 4), 0, 1, 2), Slice(Q, 0, 4, 8)))),
    ],
)
def test_a_part_of_a_weight(placement: object, expected: Expression) -> None:
    made = placed(Q, placement, 1, 2)  # type: ignore[arg-type]
    assert made == expected
    assert placement_of(made, 2) == (REPLICATED if made == Q else placement)
    tensor = torch.randn(8, 6)
    assert made.build(lambda name: tensor).shape == made.shape


def test_placements_of_what_is_made_of_parts() -> None:
    rows, columns = Shard(Q, 0, 0, 2), Shard(Q, 1, 0, 2)
    assert placement_of(Transpose(columns), 2) == Sharded(0, (Segment(6),))
    assert placement_of(Pack(Join((rows, rows))), 2) == Sharded(0, (Segment(8), Segment(8)))
    assert placement_of(Join((columns, columns)), 2) == Sharded(1, (Segment(6),))
    assert placement_of(Join((rows, Q)), 2) == Sharded(0, (Segment(8), Segment(8, 2)))
    assert placement_of(Arange(8, torch.device("cpu")), 2) == REPLICATED
    assert placement_of(Join((columns, Q), 1), 2) == Sharded(1, (Segment(6), Segment(6, 2)))
    for odd in (Shard(rows, 0, 0, 2), Join((Lone(Q, True), Q)), Shard(Q, 0, 0, 4)):
        with pytest.raises(Exception, match="got a weight"):
            placement_of(odd, 2)


def test_a_tied_table_is_cut_for_the_head_alone() -> None:
    model = make("gpt2")
    state = cut(uncut(model), 2)
    assert_ranks_decode(model, state, 96, rounds=1)
