"""Placement rules one by one, against brute force: split the operands, run the op on every rank, compare."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharding_cases import assert_near, call, check, check_all, parts, run, whole
from torch import Tensor, fx

from treespec_compiler.ir import ops
from treespec_compiler.ir.linear import pack_weight
from treespec_compiler.passes.sharding.placements import PARTIAL, REPLICATED, Placement, Segment, Sharded
from treespec_compiler.passes.sharding.rules.attention import head_cuts
from treespec_compiler.passes.sharding.rules.moves import reshaped
from treespec_compiler.passes.sharding.table import RULES, op_of, rule_of

aten = torch.ops.aten


def x(*shape: int) -> Tensor:
    return torch.randn(shape)


INDEX = torch.tensor([1, 0, 2])
ENDS = torch.tensor([1, 4, 6])

CASES: dict[str, list[fx.Node]] = {
    "aten.add": [call(aten.add.Tensor, x(2, 6, 12), x(2, 6, 12), alpha=1), call(aten.add.Tensor, x(6, 12), x(12))],
    "aten.sub": [call(aten.sub.Tensor, x(6, 12), x(6, 12))],
    "aten.mul": [call(aten.mul.Tensor, x(2, 6, 12), x(1, 6, 1)), call(aten.mul.Tensor, x(6), 3.0)],
    "aten.div": [call(aten.div.Tensor, x(6, 12), x(6, 1).abs() + 1)],
    "aten.neg": [call(aten.neg.default, x(6, 4))],
    "aten.clone": [call(aten.clone.default, x(6, 4))],
    "aten._to_copy": [call(aten._to_copy.default, x(6, 4), dtype=torch.float64)],
    "aten.silu": [call(aten.silu.default, x(6, 12))],
    "aten.where": [call(aten.where.self, x(6, 12) > 0, x(6, 12), x(12))],
    "aten.reshape": [
        call(aten.reshape.default, x(2, 36), [2, 3, 12]),
        call(aten.reshape.default, x(2, 6, 12), [2, 72]),
        call(aten.reshape.default, x(1, 2, 6, 4), [2, 6, 4]),
        call(aten.reshape.default, x(2, 24), [2, -1, 4]),
        call(aten.reshape.default, x(4, 12), [-1]),
    ],
    "aten.flatten": [call(aten.flatten.using_ints, x(2, 6, 4), 1, 2)],
    "aten.transpose": [call(aten.transpose.int, x(2, 6, 12), 1, -1)],
    "aten.permute": [call(aten.permute.default, x(2, 6, 12), [2, 0, 1])],
    "aten.t": [call(aten.t.default, x(6, 12))],
    "aten.unsqueeze": [call(aten.unsqueeze.default, x(6, 12), 1)],
    "aten.squeeze": [call(aten.squeeze.dim, x(6, 1, 12), 1), call(aten.squeeze.dims, x(1, 6, 12), [0, 1])],
    "aten.select": [call(aten.select.int, x(6, 3, 12), 1, 2)],
    "aten.expand": [call(aten.expand.default, x(1, 6, 12), [4, 6, -1])],
    "aten.slice": [
        call(aten.slice.Tensor, x(6, 24), 1, 0, 12, 1),
        call(aten.slice.Tensor, x(6, 24), 1, 12, 9223372036854775807, 1),
        call(aten.slice.Tensor, x(6, 24), 1, -12, None, 1),
        call(aten.slice.Tensor, x(6, 24), 1, 0, 18, 2),
        call(aten.slice.Tensor, x(6, 24), 1, 1, 9223372036854775807, 2),
    ],
    "aten.split": [call(aten.split.Tensor, x(6, 24), 12, 1)],
    "aten.split_with_sizes": [call(aten.split_with_sizes.default, x(6, 24), [12, 12], -1)],
    "aten.unbind": [call(aten.unbind.int, x(6, 2, 12), 1)],
    "aten.cat": [call(aten.cat.default, [x(6, 12), x(6, 12)], 1), call(aten.cat.default, [x(6, 12), x(12, 12)])],
    "aten.stack": [call(aten.stack.default, [x(6, 12), x(6, 12)], 1)],
    "aten.index_select": [call(aten.index_select.default, x(3, 12), 0, INDEX)],
    "aten.index": [call(aten.index.Tensor, x(3, 12), [INDEX]), call(aten.index.Tensor, x(3, 3, 12), [INDEX, INDEX])],
    "aten.sum": [call(aten.sum.dim_IntList, x(2, 6, 12), [-1], True), call(aten.sum.dim_IntList, x(2, 6, 12), [1])],
    "aten.mean": [call(aten.mean.dim, x(2, 6, 12), [-1], True)],
    "aten.amax": [call(aten.amax.default, x(6, 12), [-1], False)],
    "aten.var": [call(aten.var.correction, x(6, 12), [-1], keepdim=True)],
    "aten.softmax": [call(aten.softmax.int, x(6, 12), -1, None)],
    "aten.topk": [call(aten.topk.default, x(6, 12), 2, -1, True, True)],
    "aten.cumsum": [call(aten.cumsum.default, x(6, 12), 1)],
    "aten.layer_norm": [call(aten.layer_norm.default, x(6, 12), [12], x(12), x(12))],
    "aten.rms_norm": [call(aten.rms_norm.default, x(2, 6, 12), [12], x(12))],
    "aten.linear": [call(aten.linear.default, x(5, 12), x(6, 12), x(6)), call(aten.linear.default, x(6, 12), x(6, 12))],
    "aten.addmm": [call(aten.addmm.default, x(6), x(5, 12), x(12, 6))],
    "aten.mm": [call(aten.mm.default, x(6, 12), x(12, 6))],
    "aten.matmul": [
        call(aten.matmul.default, x(2, 6, 12), x(12, 6)),
        call(aten.matmul.default, x(6, 4, 2), x(6, 2, 4)),
    ],
    "aten.bmm": [call(aten.bmm.default, x(6, 4, 12), x(6, 12, 4))],
    "treespec.grouped_linear": [call(ops.grouped_linear, x(6, 12), x(3, 6, 12), ENDS)],
    "aten.embedding": [call(aten.embedding.default, x(6, 12), INDEX)],
}  # fmt: skip

# The collectives need ranks, attention has tests of its own; others share the rule of one above.
ELSEWHERE = {
    "_c10d_functional.all_reduce", "_c10d_functional.all_gather_into_tensor", "treespec.tree_attention",
    "treespec.packed_linear", "transformers.grouped_mm_fallback",
}  # fmt: skip


def test_every_rule_is_run_here() -> None:
    tried = {RULES[name].fits.__qualname__ for name in CASES}
    assert {name for name, rule in RULES.items() if rule.fits.__qualname__ not in tried} <= ELSEWHERE


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_parts_give_what_the_whole_gives(name: str, ranks: int) -> None:
    for node in CASES[name]:
        found = check_all(node, ranks)
        assert found or name in ("aten.slice",), f"{node.format_node()}: no placement fits"


@pytest.mark.parametrize("name", CASES)
def test_wants_lead_to_what_is_wanted(name: str) -> None:
    """Cutting operands as a rule wants it gives the cut that was asked for."""
    for node in CASES[name]:
        rule, op = rule_of(node), op_of(node, 2)
        assert rule is not None
        if not isinstance(node.meta["val"], Tensor):
            continue
        for dim, size in enumerate(node.meta["val"].shape):
            cut = Sharded(dim, (Segment(size),))
            wants = rule.wants(op, cut) if cut.fits(2) else None
            if not wants or any(want.start for want in wants):
                continue
            given: list[Placement] = [REPLICATED] * len(op.operands)
            for want in wants:
                given[want.operand] = want.cut
            outcome = check(node, given, 2)
            assert outcome is not None and outcome.gives == cut


REFUSED: list[tuple[fx.Node, tuple[Placement, ...]]] = [
    (CASES["aten.silu"][0], (PARTIAL,)),
    (CASES["aten._to_copy"][0], (PARTIAL,)),
    (CASES["aten.add"][0], (PARTIAL, REPLICATED)),
    (CASES["aten.mul"][0], (PARTIAL, PARTIAL)),
    (CASES["aten.div"][0], (REPLICATED, PARTIAL)),
    (CASES["aten.softmax"][0], (Sharded(1, (Segment(12),)),)),
    (CASES["aten.layer_norm"][0], (Sharded(1, (Segment(12),)), REPLICATED, REPLICATED)),
    (CASES["aten.mean"][0], (Sharded(2, (Segment(12),)),)),
    (CASES["aten.linear"][0], (PARTIAL, REPLICATED, REPLICATED)),
    (CASES["aten.linear"][0], (Sharded(1, (Segment(6), Segment(6, 2))), REPLICATED, REPLICATED)),
    (CASES["aten.slice"][0], (Sharded(1, (Segment(24),)),)),
    (CASES["aten.slice"][3], (Sharded(1, (Segment(24),)),)),
    (CASES["aten.slice"][4], (Sharded(1, (Segment(2), Segment(22))),)),
    (CASES["aten.index"][0], (Sharded(0, (Segment(3),)), REPLICATED)),
    (CASES["aten.embedding"][0], (Sharded(0, (Segment(6),)), REPLICATED)),
    (CASES["aten.topk"][0], (Sharded(1, (Segment(12),)),)),
]


@pytest.mark.parametrize("at", range(len(REFUSED)))
def test_a_rule_that_has_no_answer_says_so(at: int) -> None:
    node, placements = REFUSED[at]
    rule = rule_of(node)
    assert rule is not None and rule.fits(op_of(node, 2), placements) is None


def test_a_packed_weight_is_cut_as_its_matrix() -> None:
    weight, value, bias = x(128, 12), x(5, 12), x(128)
    node = call(ops.packed_linear, value, pack_weight(weight), bias, 128)
    rule, op = rule_of(node), op_of(node, 2)
    assert rule is not None
    columns = Sharded(0, (Segment(128),))
    outcome = rule.fits(op, (REPLICATED, columns, columns))
    assert outcome is not None and outcome.gives == columns.moved(1)
    held = [
        ops.packed_linear(value, pack_weight(w), b, 64)
        for w, b in zip(parts(weight, columns, 2), parts(bias, columns, 2), strict=True)
    ]
    assert_near(whole(held, outcome.gives), node.meta["val"])


@pytest.mark.parametrize(
    ("heads", "groups", "ranks", "expected"),
    [(8, 4, 2, (4, 2)), (8, 2, 4, (2, 1)), (8, 1, 4, (2, 1)), (9, 3, 3, (3, 1)), (9, 3, 2, None), (8, 3, 2, None)],
)
def test_heads_are_dealt_out_with_their_group(
    heads: int, groups: int, ranks: int, expected: tuple[int, int] | None
) -> None:
    cuts = head_cuts(heads, groups, ranks)
    assert (cuts and (cuts[0].local(ranks), cuts[1].local(ranks))) == expected


def test_reshapes_follow_segments() -> None:
    def shape(*sizes: int) -> Any:
        return tuple(map(sympy.Integer, sizes))

    fused = Sharded(1, (Segment(16), Segment(16), Segment(16)))
    assert reshaped(fused, shape(5, 48), shape(5, 3, 4, 4), 2) == Sharded(2, (Segment(4),))
    assert reshaped(Sharded(2, (Segment(4),)), shape(5, 3, 4, 4), shape(5, 48), 2) == fused
    assert reshaped(fused, shape(5, 48), shape(5, 12, 4), 2) == Sharded(1, (Segment(4), Segment(4), Segment(4)))
    assert reshaped(Sharded(1, (Segment(48),)), shape(5, 48), shape(5, 3, 16), 2) is None
    assert reshaped(Sharded(0, (Segment(6),)), shape(6, 4), shape(4, 6), 2) == Sharded(0, (Segment(4),))  # halves
    assert reshaped(Sharded(1, (Segment(4),)), shape(6, 4), shape(4, 6), 2) is None


STEPS = [
    lambda v: (aten.silu.default, v),
    lambda v: (aten.neg.default, v),
    lambda v: (aten.mul.Tensor, v, 0.5),
    lambda v: (aten.add.Tensor, v, v),
    lambda v: (aten.transpose.int, v, 0, -1),
    lambda v: (aten.unsqueeze.default, v, 0),
    lambda v: (aten.reshape.default, v, [-1]),
    lambda v: (aten.reshape.default, v, [-1, 6, 4]),
    lambda v: (aten.reshape.default, v, [*v.shape[:-1], 2, v.shape[-1] // 2] if v.shape[-1] % 2 == 0 else [*v.shape]),
    lambda v: (aten.slice.Tensor, v, -1, 0, max(v.shape[-1] // 2, 1), 1),
    lambda v: (aten.sum.dim_IntList, v, [0], True),
    lambda v: (aten.softmax.int, v, -1, None),
    lambda v: (aten.cat.default, [v, v], -1),
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=7), st.sampled_from([2, 3]), st.integers(0, 2), st.booleans()
)
def test_rules_compose(steps: list[Any], ranks: int, dim: int, two: bool) -> None:
    """A chain of ops on parts, whole again wherever a rule has no answer, is the chain on the whole."""
    torch.manual_seed(0)
    value = x(6, 12, 24)
    size = value.shape[dim]
    segments = (Segment(size // 2), Segment(size // 2)) if two else (Segment(size),)
    place: Placement = Sharded(dim, segments)
    if not place.fits(ranks):
        place = REPLICATED
    held = parts(value, place, ranks)
    for step in steps:
        if value.numel() % 24:
            break
        target, *args = step(value)
        node = call(target, *args)
        rule, op = rule_of(node), op_of(node, ranks)
        assert rule is not None
        outcome = rule.fits(op, (place,) * len(op.operands)) if place != REPLICATED else None
        if outcome is None or any(need != place for need in outcome.needs):
            held, numbers, gives = parts(whole(held, place), REPLICATED, ranks), {}, REPLICATED
        else:
            numbers, gives = rule.numbers(op, outcome), outcome.gives
        held = [run(node, dict.fromkeys(node.all_input_nodes, mine), numbers) for mine in held]
        value, place = node.meta["val"], gives  # type: ignore[assignment]
        assert_near(whole(held, place), value)
