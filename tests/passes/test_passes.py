"""Each pass: a small graph before and after, a case where it must not fire, and how often it matched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import DIM, HEADS, NanoGPT, RopeTril, Tiny
from oracles import EAGER
from pass_cases import One, applied, before, only
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import treespec_compiler as treespec
import treespec_compiler.codegen
from treespec_compiler.capture.call import call_spec
from treespec_compiler.ir.provenance import op_name
from treespec_compiler.ir.weights import Join, Shard
from treespec_compiler.passes import (
    bind_kernels,
    classify,
    insert_state,
    join_linears,
    normalize,
    select_rows,
    token_locality,
    treeify,
)
from treespec_compiler.passes import fuse as pack_linears
from treespec_compiler.passes import recognize_attention as recognize
from treespec_compiler.passes.framework.manager import run_passes
from treespec_compiler.program.semantics import semantic_check


def test_normalize() -> None:
    class Wordy(One):
        def finish(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(x.view(-1, DIM).detach().clone(), 0.5, training=False)
            return self.head(x.view(1, -1, DIM))

    old, new, matches, _ = applied(Wordy(), normalize.PASS)
    gone = {"aten.view", "aten.detach", "aten.clone", "aten.dropout", "aten.alias"}
    assert gone & set(old) and not gone & set(new) and matches >= 2
    assert new.count("aten.reshape") == old.count("aten.reshape") + old.count("aten.view")


def test_normalize_names_squeezed_dimensions() -> None:
    class Squeezed(One):
        def finish(self, x: Tensor) -> Tensor:
            return self.head(x.squeeze()).unsqueeze(0)

    _, _, _, state = applied(Squeezed(), normalize.PASS)
    node = next(n for n in state.graph.nodes if op_name(n) == "aten.squeeze")
    assert node.args[1] == [0]


def test_normalize_keeps_conversions_and_real_slices() -> None:
    class Kept(One):
        def finish(self, x: Tensor) -> Tensor:
            return self.head(x.double().float())[..., 1:]

    old, new, _, _ = applied(Kept(), normalize.PASS)
    kept = ("aten._to_copy", "aten.to", "aten.slice")
    assert only(old, *kept) == only(new, *kept) and len(only(new, *kept)) == 3


def test_normalize_spells_type_as() -> None:
    class Typed(One):
        def finish(self, x: Tensor) -> Tensor:
            return self.head(x.double().type_as(x).type_as(self.head.weight))

    old, new, _, _ = applied(Typed(), normalize.PASS)
    assert old.count("aten.type_as") == 2 and "aten.type_as" not in new
    assert new.count("aten._to_copy") == old.count("aten._to_copy") + 1  # the second one changes nothing


def test_recognize() -> None:
    old, new, matches, _ = applied(Tiny(), recognize.PASS)
    assert matches == 2 and old.count("aten.scaled_dot_product_attention") == 2
    assert new.count("treespec.attention") == 2 and "aten.scaled_dot_product_attention" not in new


@pytest.mark.parametrize("interleaved", [True, False])
def test_recognize_unrepeats_only_interleaved_heads(interleaved: bool) -> None:
    """`repeat_interleave` is what attention does itself; `repeat` orders the heads otherwise and must stay."""

    class Shared(One):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            k, v = (x[:, :2].repeat_interleave(2, 1) if interleaved else x[:, :2].repeat(1, 2, 1, 1) for x in (k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    _, _, matches, state = applied(Shared(), recognize.PASS)
    site = next(n for n in state.graph.nodes if op_name(n) == "treespec.attention")
    assert matches == 1 and site.args[1].meta["val"].shape[1] == (2 if interleaved else HEADS)


def test_classify() -> None:
    old, new, matches, state = applied(RopeTril(), classify.PASS)
    assert matches == 2 and old.count("treespec.attention") == new.count("treespec.causal_attention") == 2
    assert "treespec.attention" not in new and [s.mask.window for s in state.sites] == [0, 0]
    assert [s.kv_heads for s in state.sites] == [2, 2] and state.limits[0].tokens == 64


def test_classify_does_not_fire_on_a_wrong_mask() -> None:
    class Future(One):
        def mask(self, tokens: int) -> Tensor:
            return torch.ones(tokens, tokens).tril(1).bool()

    state = before(Future(), classify.PASS)
    with pytest.raises(treespec.Unsupported):
        run_passes(state, [classify.PASS])
    assert state.sites == [] and state.level == "recognized"


def test_token_locality_changes_nothing() -> None:
    old, new, matches, _ = applied(NanoGPT(), token_locality.PASS)
    assert old == new and matches > 20


def test_token_locality_refuses_one_mixer_among_many_ops() -> None:
    class Mixed(One):
        def finish(self, x: Tensor) -> Tensor:
            return self.head(x + 1e-3 * x.sum(1, keepdim=True))

    with pytest.raises(treespec.Unsupported, match=r"aten\.sum mixes tokens"):
        run_passes(before(Mixed(), token_locality.PASS), [token_locality.PASS])


def test_treeify() -> None:
    old, new, matches, state = applied(NanoGPT(), treeify.PASS)
    assert old.count("aten.arange") == 1 and "aten.arange" not in new and matches == 1
    read = next(n for n in state.graph.nodes if n.name == "positions").users
    assert [op_name(n) for n in read] in (["aten.embedding"], ["aten.sym_size", "aten.reshape"])
    assert [(p.offset, p.limit) for p in state.positions] == [(0, 64)]


def test_treeify_reads_sliced_tables_at_positions() -> None:
    old, new, matches, _ = applied(RopeTril(), treeify.PASS)
    assert matches == 2 and new.count("aten.index_select") == old.count("aten.index_select") + 2


def test_treeify_leaves_constants() -> None:
    """A value that is the same for every token is no position."""

    class Constant(One):
        def positions(self, ids: Tensor) -> Tensor:
            return self.wpe.weight[:1].expand(ids.shape[1], -1)

    _, _, matches, _ = applied(Constant(), treeify.PASS)
    assert matches == 0


def test_insert_state() -> None:
    old, new, matches, state = applied(Tiny(), insert_state.PASS)
    assert matches == 2 == old.count("treespec.causal_attention") == new.count("treespec.tree_attention")
    pools = [n.name for n in state.graph.nodes if n.op == "placeholder" and n.name.startswith("pool_")]
    assert pools == ["pool_k_0", "pool_v_0", "pool_k_1", "pool_v_1"]


def test_insert_state_gives_each_call_of_a_module_its_own_pools() -> None:
    class Twice(One):
        def block(self, x: Tensor, layer: int) -> Tensor:
            return super().block(super().block(x, 0), 0)

    _, _, matches, state = applied(Twice(), insert_state.PASS)
    sites = [n for n in state.graph.nodes if op_name(n) == "treespec.tree_attention"]
    assert matches == 2 and [n.args[3].name for n in sites] == ["pool_k_0", "pool_k_1"]


def test_select_rows_climbs_over_the_head() -> None:
    _, new, matches, state = applied(NanoGPT(), select_rows.PASS)
    picked = next(n for n in state.graph.nodes if n.op == "placeholder" and n.name == "rows").users
    assert matches == 1 and new.count("aten.index_select") == 1
    below = {op_name(u) for n in picked for u in n.users}
    assert "aten.layer_norm" in below and "aten.linear" not in below


def test_select_rows_stops_at_ops_that_do_not_commute() -> None:
    class Exponential(One):
        def finish(self, x: Tensor) -> Tensor:
            return self.head(x).exp()

    _, _, _, state = applied(Exponential(), select_rows.PASS)
    picked = next(iter(next(n for n in state.graph.nodes if n.name == "rows").users))
    assert op_name(picked.args[0]) == "aten.exp"


def test_pack_linears_joins_products_of_one_input() -> None:
    old, new, matches, state = applied(RopeTril(layers=1), pack_linears.PASS)
    # q and kv; o; gate and up; down; head
    assert old.count("aten.linear") == matches == 7 and "aten.linear" not in new
    assert new.count("treespec.packed_linear") == 5
    assert len(state.weights.derived) == 6  # five weights and the head's bias


def test_pack_linears_packs_what_is_joined_or_sharded() -> None:
    """A product's weight may be any expression: here q and kv were joined before, and the head is a part of two."""
    model = RopeTril(layers=1).eval()
    state = before(model, join_linears.PASS)
    run_passes(state, [join_linears.PASS])
    head = next(name for name in state.weights if state.weights.label(name) == "head.weight")
    whole = state.add_weight("whole", Shard(Join((state.weights[head], state.weights[head])), 0, 1, 2))
    state.node(head).replace_all_uses_with(whole)
    run_passes(state, [pack_linears.PASS, bind_kernels.PASS])
    texts = [str(made) for made in state.weights.derived.values()]
    assert sum(text.startswith("pack(join(join(") for text in texts) == 2
    assert "pack(join(shard(join(head.weight, head.weight), dim 0, 1 of 2)))" in texts
    semantic_check(model, call_spec(model))(state, "fuse")


JOINED = {**EAGER, "kernels": "aten", "pipeline": "default,join-linears"}


@pytest.mark.rare
def test_join_linears_joins_products_of_one_input() -> None:
    model = RopeTril(layers=1).eval()
    plain: Any = treespec.tree_program(model, options={**EAGER, "kernels": "aten"})
    joined: Any = treespec.tree_program(model, options={**JOINED, "verify_each": "semantic"})
    (record,) = (r for r in joined.history if r.name == "join linears")
    counts = [[op_name(n) for n in p.graph_module.graph.nodes].count("aten.linear") for p in (plain, joined)]
    assert record.matches == 4 and counts == [7, 5]  # q and kv; gate and up
    assert joined.packed_bytes > plain.packed_bytes
    ids = [1, 5, 2, 7]
    want = plain.prefill(ids, plain.new_cache(8)).clone()
    torch.testing.assert_close(joined.prefill(ids, joined.new_cache(8)), want, atol=1e-5, rtol=1e-5)


@pytest.mark.rare
def test_joined_weights_follow_the_modules() -> None:
    model = RopeTril(layers=1).eval()
    joined: Any = treespec.tree_program(model, options=JOINED)
    plain: Any = treespec.tree_program(model, options={**EAGER, "kernels": "reference"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    ids = [3, 1, 4]
    want = plain.prefill(ids, plain.new_cache(8)).clone()
    torch.testing.assert_close(joined.prefill(ids, joined.new_cache(8)), want, atol=1e-4, rtol=1e-4)


def test_join_linears_leaves_single_products() -> None:
    old, new, matches, state = applied(NanoGPT(), join_linears.PASS)
    assert matches == 0 and old == new and not state.weights.derived


def test_pack_linears_leaves_products_of_data() -> None:
    class Product(One):
        def finish(self, x: Tensor) -> Tensor:
            return self.head(x * (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1))

    old, new, _, _ = applied(Product(), pack_linears.PASS)
    assert old.count("aten.matmul") == new.count("aten.matmul") == 1


def test_bind_kernels() -> None:
    old, new, matches, _ = applied(Tiny(), bind_kernels.PASS)
    assert matches == sum(n.startswith("treespec.") for n in old)
    assert not any(n.startswith("treespec.") for n in new) and len(old) == len(new)


def test_reference_kernels_are_left() -> None:
    model = Tiny()
    program: Any = treespec.tree_program(model, options={**EAGER, "kernels": "reference"})
    names = [op_name(n) for n in program.graph_module.graph.nodes]
    assert names.count("treespec.tree_attention") == 2 and "treespec.packed_linear" not in names


def test_semantic_checks_run_after_each_pass() -> None:
    program: Any = treespec.tree_program(Tiny(), options={**EAGER, "verify_each": "semantic"})
    assert [r.matches for r in program.history if r.name == "insert state"] == [2]
