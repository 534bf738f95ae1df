"""`tree_exponential_recurrence` against its reference, and both against the recurrence along each node's own path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_tree
from torch import Tensor

from treespec_compiler import TokenTree
from treespec_compiler.codegen import aten_exponential_recurrence
from treespec_compiler.codegen.aten_exponential_recurrence import TREE_EXPONENTIAL_RECURRENCE
from treespec_compiler.ir import ops
from treespec_compiler.ir.exponential_recurrence import state_size
from treespec_compiler.ir.specs import StateSpec
from treespec_compiler.program.batch import Part, pack
from treespec_compiler.program.cache import TreeCache

KEY_HEADS, HEADS, KEY, VALUE = 2, 4, 3, 5
CPU = torch.device("cpu")
Values = list[Tensor | None]


def cache_of(slots: int, from_zero: bool, dtype: torch.dtype = torch.float64) -> TreeCache:
    width, shape = KEY_HEADS * KEY + HEADS * (VALUE + 2), (HEADS, state_size(KEY, VALUE))
    sizes = (KEY_HEADS, KEY, int(from_zero))
    spec = StateSpec(0, "exponential recurrence", "r", "", "", shape, width, dtype, "", sizes)
    return TreeCache([], 4096, slots, CPU, ops.commit_path, states=[spec])


def tokens(count: int, fade: float, spread: float, bonus: bool, dtype: torch.dtype = torch.float64) -> Values:
    """q, k, v, decay, gate, bonus: `fade` 0 forgets nothing, a large one all; gates up to a few times `spread`."""
    q, k = (torch.randn(1, count, KEY_HEADS, KEY, dtype=dtype) for _ in "qk")
    v, decay = torch.randn(1, count, HEADS, VALUE, dtype=dtype), -fade * torch.rand(1, count, HEADS, dtype=dtype)
    gate, extra = (spread * torch.randn(1, count, HEADS, dtype=dtype) for _ in range(2))
    return [q, k, v, decay, gate, extra if bonus else None]


def run(op, values: Values, cache: TreeCache, parts: list[Part], from_zero: bool) -> Tensor:
    batch = pack(parts, cache, CPU).meta
    assert cache.states is not None
    metadata = (batch.node_offsets, batch.prefix_lens, batch.tree_lens, batch.ancestors)
    return op(*values, *cache.states.tensors, *metadata, batch.state_slots, batch.state_rows, from_zero)


def taken(values: Values, nodes: list[int]) -> Values:
    return [None if x is None else x[:, nodes] for x in values]


def joined(before: Values, after: Values) -> Values:
    return [None if a is None or b is None else torch.cat([a, b], 1) for a, b in zip(before, after, strict=True)]


@pytest.mark.rare
@pytest.mark.parametrize(
    "op", [ops.tree_exponential_recurrence, TREE_EXPONENTIAL_RECURRENCE], ids=["reference", "aten"]
)
@pytest.mark.parametrize("bonus", [True, False], ids=["bonus", "plain"])
@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-6, 0.3, 40.0]),
    st.sampled_from([0.1, 3.0, 300.0, 3000.0]),
    st.sampled_from([0, 1, 5, 63, 65, 150]),
    st.sampled_from([1, 7, 80]),
    st.booleans(),
)
def test_each_node_is_the_recurrence_of_its_path(op, bonus, seed, fade, spread, committed, size, from_zero):
    """Gates whose exponentials no float64 holds are among them."""
    torch.manual_seed(seed)
    cache, prefix = cache_of(3, from_zero), tokens(committed, fade, spread, bonus)

    def wanted(values: Values) -> Tensor:
        return ops.exponential_recurrence(*values, from_zero)[0]

    def close(got: Tensor, want: Tensor) -> None:
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)

    if committed:
        close(run(op, prefix, cache, [Part.prompt(2, [0] * committed)], from_zero)[0], wanted(prefix))
        cache._append(2, [0] * committed)
    trees = {2: random_tree(size, 50, seed), 0: random_tree(4, 50, seed + 1)}
    own = {slot: tokens(len(tree), fade, spread, bonus) for slot, tree in trees.items()}
    for slot, tree in trees.items():
        cache._trees[slot] = tree
    got = run(op, joined(own[2], own[0]), cache, [Part(s, t) for s, t in trees.items()], from_zero)
    first = 0
    for slot, tree in trees.items():
        for node in sorted({0, len(tree) - 1, *(seed * (i + 1) % len(tree) for i in range(6))}):
            there = taken(own[slot], tree.path(node))
            close(got[0, first + node], wanted(joined(prefix, there) if slot == 2 else there)[-1])
        first += len(tree)
    path = trees[2].path(size - 1)[: 1 + seed % 3]
    cache.commit({2: path, 0: []})
    after = tokens(3, fade, spread, bonus)
    chain = run(op, after, cache, [Part(2, TokenTree.chain([1, 2, 3]))], from_zero)
    close(chain[0], wanted(joined(joined(prefix, taken(own[2], path)), after))[-3:])


def test_the_sums_are_what_their_exponentials_say():
    """Where float64 holds them, against sums that are written out."""
    torch.manual_seed(3)
    q, k, v, decay, gate, bonus = tokens(9, 0.7, 1.0, True)
    assert all(x is not None for x in (q, k, v, decay, gate, bonus))
    got = ops.exponential_recurrence(q, k, v, decay, gate, None, True)[0]
    read = ops.exponential_recurrence(q, k, v, decay, gate, bonus, False)[0]
    for t in range(9):
        weights = [(gate[0, j] + decay[0, j + 1 : t + 1].sum(0)).exp() for j in range(t + 1)]
        before = [(gate[0, j] + decay[0, j + 1 : t].sum(0)).exp() for j in range(t)] + [bonus[0, t].exp()]
        ones = torch.cat([v, torch.ones_like(v[..., :1])], 3)
        products = torch.einsum("hd,jhd->jh", q[0, t], k[0, : t + 1]).repeat_interleave(2, 1)
        for each, found in ((weights, got), (before, read)):
            wanted = torch.einsum("jh,jhe->he", torch.stack(each) * products, ones[0, : t + 1])
            torch.testing.assert_close(found[t, :, :-1] * found[t, :, -1:].exp(), wanted, atol=1e-10, rtol=1e-10)


def test_grown_at_the_end_and_by_groups(monkeypatch):
    torch.manual_seed(1)
    cache, tree, values = cache_of(1, False), random_tree(30, 50, 3), tokens(30, 0.5, 9.0, True)
    whole = run(TREE_EXPONENTIAL_RECURRENCE, values, cache, [Part(0, tree)], False).clone()
    monkeypatch.setattr(aten_exponential_recurrence, "MOST", 7 * 30 * HEADS)
    for start, end in ((0, 1), (1, 12), (12, 13), (13, 30)):
        part = TokenTree(tree.tokens[:end], tree.parents[:end])
        given_ = taken(values, [*range(start, end)])
        got = run(TREE_EXPONENTIAL_RECURRENCE, given_, cache, [Part(0, part, start)], False)
        torch.testing.assert_close(got, whole[:, start:end], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("which", range(6))
def test_what_is_not_finite_stays_on_its_path(which):
    torch.manual_seed(2)
    cache, tree = cache_of(1, True, torch.float32), TokenTree([1, 2, 3, 4], [-1, 0, 0, 1])
    values = [x.float() for x in tokens(4, 0.5, 1.0, True) if x is not None]
    values[which][:, 1] = torch.nan if which else torch.inf
    got = run(TREE_EXPONENTIAL_RECURRENCE, values, cache, [Part(0, tree)], True)
    rows = got.isfinite().flatten(2).all(2)[0].tolist()
    assert rows == [True, False, True, which in (0, 5)]  # descendants read neither a query nor a bonus


@pytest.mark.parametrize("op", [ops.tree_exponential_recurrence, TREE_EXPONENTIAL_RECURRENCE])
def test_a_token_that_resets_the_sums(op):
    """A decay of minus infinity, and a gate that lets nothing in."""
    torch.manual_seed(5)
    values = tokens(6, 0.4, 2.0, False)
    values[3][:, 3], values[4][:, 4] = -torch.inf, -torch.inf
    got = run(op, values, cache_of(1, False), [Part(0, TokenTree.chain([1] * 6))], False)
    torch.testing.assert_close(got, ops.exponential_recurrence(*values, False), atol=1e-12, rtol=1e-12)
    after = ops.exponential_recurrence(*taken(values, [3, 4, 5]), False)
    torch.testing.assert_close(got[:, 3:], after, atol=1e-12, rtol=1e-12)
