"""`tree_chosen_attention` against its reference, and both against attention over each node's own path, in float64.

Scores of an indexer are small whole numbers here: they tie at every border, and torch.topk decides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_tree
from torch import Tensor

from treespec_compiler import TokenTree
from treespec_compiler.codegen import aten_chosen_attention
from treespec_compiler.codegen.aten_chosen_attention import TREE_CHOSEN_ATTENTION
from treespec_compiler.ir import ops
from treespec_compiler.ir.inputs import ATTENTION
from treespec_compiler.ir.specs import AttentionSpec, MaskSpec
from treespec_compiler.program.batch import Part, pack
from treespec_compiler.program.cache import TreeCache

HEADS, GROUPS, KEY, VALUE, INDEX = 4, 2, 3, 5, 4
CPU, SCALE, INDEX_SCALE = torch.device("cpu"), 0.6, 0.5
Values = dict[str, Tensor | None]


def cache_of(slots: int, dtype: torch.dtype = torch.float64, page_size: int | None = None) -> TreeCache:
    sizes = {"heads": HEADS, "kv_heads": GROUPS, "key_dim": KEY, "value_dim": VALUE, "index_dim": INDEX}
    spec = AttentionSpec(0, "a", "", "", **sizes, scale=SCALE, mask=MaskSpec(), dtype=dtype)
    return TreeCache([spec], 512, slots, CPU, ops.commit_path, page_size=page_size)


def tokens(count: int, heads: int, weighted: bool, dtype: torch.dtype = torch.float64) -> Values:
    q, k, v = (torch.randn(1, h, count, d, dtype=dtype) for h, d in ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE)))
    index_q, index_k, weights = (
        torch.randint(-2, 3, (1, count, *rest)).to(dtype) for rest in ((heads, INDEX), (INDEX,), (heads,))
    )
    made = {"q": q, "k": k, "v": v, "index_q": index_q, "index_k": index_k}
    return {**made, "index_weights": weights if weighted else None}


def taken(values: Values, nodes: list[int]) -> Values:
    return {n: x if x is None else x[:, :, nodes] if n in "qkv" else x[:, nodes] for n, x in values.items()}


def joined(*parts: Values) -> Values:
    return {
        n: None if parts[0][n] is None else torch.cat([p[n] for p in parts], 2 if n in "qkv" else 1) for n in parts[0]
    }


def run(op: Any, values: Values, cache: TreeCache, parts: list[Part], choice: tuple[int, int, int]) -> Tensor:
    meta = pack(parts, cache, CPU).meta
    metadata = [getattr(meta, name) for name in ATTENTION]
    return op(*values.values(), *cache.pools, *metadata, SCALE, INDEX_SCALE, *choice)


def on_path(values: Values, choice: tuple[int, int, int]) -> Tensor:
    """[Hq, Dv] of the last token."""
    q, k, v, *index = values.values()
    names = ("index_q", "index_k", "index_weights", "index_scale", "chosen", "block", "local")
    given_ = dict(zip(names, (*index, INDEX_SCALE, *choice), strict=True))
    return ops.causal_attention(q, k, v, SCALE, **given_)[0, :, -1]


@pytest.mark.parametrize("op", [ops.tree_chosen_attention, TREE_CHOSEN_ATTENTION], ids=["reference", "aten"])
@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 5, 40]),
    st.sampled_from([1, 7, 70]),
    st.sampled_from([(1, 1, 0), (4, 1, 0), (64, 1, 0), (2, 4, 1), (3, 2, 2)]),
    st.booleans(),
    st.sampled_from([None, 16]),
)
def test_each_node_chooses_on_its_own_path(op, seed, committed, size, choice, weighted, page_size):
    torch.manual_seed(seed)
    heads = 3 if weighted else GROUPS
    cache, prefix = cache_of(3, page_size=page_size), tokens(committed, heads, weighted)
    if committed:
        cache._reserve(2, committed)
        got = run(op, prefix, cache, [Part.prompt(2, [0] * committed)], choice)
        for i in sorted({0, committed // 2, committed - 1}):
            wanted = on_path(taken(prefix, [*range(i + 1)]), choice)
            torch.testing.assert_close(got[0, :, i], wanted, atol=1e-10, rtol=1e-10)
        cache._append(2, [0] * committed)
    trees = {2: random_tree(size, 50, seed), 0: random_tree(4, 50, seed + 1)}
    own = {slot: tokens(len(tree), heads, weighted) for slot, tree in trees.items()}
    for slot, tree in trees.items():
        cache._reserve(slot, len(tree))
        cache._trees[slot] = tree
    got = run(op, joined(own[2], own[0]), cache, [Part(s, t) for s, t in trees.items()], choice)
    first = 0
    for slot, tree in trees.items():
        for node in sorted({0, len(tree) - 1, *(seed * (i + 1) % len(tree) for i in range(6))}):
            there = taken(own[slot], tree.path(node))
            wanted = on_path(joined(prefix, there) if slot == 2 else there, choice)
            torch.testing.assert_close(got[0, :, first + node], wanted, atol=1e-10, rtol=1e-10)
        first += len(tree)
    path = trees[2].path(size - 1)[: 1 + seed % 3]
    cache.commit({2: path, 0: []})
    after = tokens(3, heads, weighted)
    cache._reserve(2, 3)
    chain = run(op, after, cache, [Part(2, TokenTree.chain([1, 2, 3]))], choice)
    whole = joined(prefix, taken(own[2], path), after)
    torch.testing.assert_close(chain[0, :, -1], on_path(whole, choice), atol=1e-10, rtol=1e-10)


def test_many_scores_are_held_a_group_at_a_time(monkeypatch):
    torch.manual_seed(2)
    tree, values = random_tree(40, 50, 3), tokens(40, 3, True)
    for part in (Part(0, tree), Part.prompt(0, [0] * 40)):
        whole = run(TREE_CHOSEN_ATTENTION, values, cache_of(1), [part], (4, 1, 0))
        monkeypatch.setattr(aten_chosen_attention, "MOST", 7 * 40 * 3)
        again = run(TREE_CHOSEN_ATTENTION, values, cache_of(1), [part], (4, 1, 0))
        monkeypatch.undo()
        torch.testing.assert_close(again, whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("which", ["q", "k", "v", "index_k"])
def test_what_is_not_finite_stays_on_its_path(which):
    torch.manual_seed(4)
    tree, values = TokenTree([1, 2, 3, 4], [-1, 0, 0, 1]), tokens(4, 3, True, torch.float32)
    spoilt = values[which]
    assert spoilt is not None
    spoilt.select(1 if which == "index_k" else 2, 1).fill_(torch.nan)
    got = run(TREE_CHOSEN_ATTENTION, values, cache_of(1, torch.float32), [Part(0, tree)], (64, 1, 0))
    assert got[0, :, [0, 2]].isfinite().all()
    if which != "index_k":  # all are chosen, whatever their scores
        assert got[0, :, 1].isnan().all() and (which == "q" or got[0, :, 3].isnan().all())
