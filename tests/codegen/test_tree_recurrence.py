"""`tree_recurrence` against its reference, and both against the recurrence along each node's own path, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_tree
from torch import Tensor

from treespec_compiler import TokenTree
from treespec_compiler.codegen import aten_recurrence
from treespec_compiler.codegen.aten_recurrence import TREE_RECURRENCE
from treespec_compiler.codegen.gpu.recurrence import takes
from treespec_compiler.ir import ops
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.ir.specs import StateSpec
from treespec_compiler.program.batch import Part, pack
from treespec_compiler.program.cache import TreeCache

KEY_HEADS, HEADS, KEY, VALUE = 2, 4, 3, 5
CPU = torch.device("cpu")


def cache_of(slots: int, dtype: torch.dtype = torch.float64, rows: int = 1) -> TreeCache:
    width = KEY_HEADS * KEY + HEADS * VALUE + HEADS * rows
    spec = StateSpec(0, "recurrence", "r", "", "", (HEADS, KEY, VALUE), width, dtype, "", (KEY_HEADS,))
    return TreeCache([], 4096, slots, CPU, ops.commit_path, states=[spec])


def tokens(
    count: int, fade: float, delta: bool, dtype: torch.dtype = torch.float64, rows: int = 1
) -> list[Tensor | None]:
    """q, k, v, decay, beta of tokens: `fade` 0 forgets nothing, a large one all."""
    q, k = (torch.nn.functional.normalize(torch.randn(1, count, KEY_HEADS, KEY, dtype=dtype), dim=-1) for _ in "qk")
    v, decay = (
        torch.randn(1, count, HEADS, VALUE, dtype=dtype),
        -fade * torch.rand(1, count, HEADS, *([rows] if rows > 1 else []), dtype=dtype),
    )
    return [q, k, v, decay, torch.rand(1, count, HEADS, dtype=dtype) if delta else None]


def run(op, given_: list[Tensor | None], cache: TreeCache, parts: list[Part]) -> Tensor:
    batch = pack(parts, cache, CPU).meta
    assert cache.states is not None
    metadata = (batch.node_offsets, batch.prefix_lens, batch.tree_lens, batch.ancestors)
    return op(*given_, *cache.states.tensors, *metadata, batch.state_slots, batch.state_rows)


def taken(values: list[Tensor | None], nodes: list[int]) -> list[Tensor | None]:
    return [None if x is None else x[:, nodes] for x in values]


def joined(before: list[Tensor | None], after: list[Tensor | None]) -> list[Tensor | None]:
    return [None if a is None or b is None else torch.cat([a, b], 1) for a, b in zip(before, after)]


@pytest.mark.parametrize("op", [ops.tree_recurrence, TREE_RECURRENCE], ids=["reference", "aten"])
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-6, 0.3, 40.0]),
    st.sampled_from([0, 1, 5, 63, 65, 150]),
    st.sampled_from([1, 7, 80]),
    st.sampled_from([1, KEY]),
)
def test_each_node_is_the_recurrence_of_its_path(op, delta, seed, fade, committed, size, rows):
    torch.manual_seed(seed)
    cache, prefix = cache_of(3, rows=rows), tokens(committed, fade, delta, rows=rows)
    if committed:
        got = run(op, prefix, cache, [Part.prompt(2, [0] * committed)])
        torch.testing.assert_close(got, ops.recurrence(*prefix), atol=1e-9, rtol=1e-9)
        cache._append(2, [0] * committed)
    trees = {2: random_tree(size, 50, seed), 0: random_tree(4, 50, seed + 1)}
    own = {slot: tokens(len(tree), fade, delta, rows=rows) for slot, tree in trees.items()}
    for slot, tree in trees.items():
        cache._trees[slot] = tree
    got = run(op, joined(own[2], own[0]), cache, [Part(s, t) for s, t in trees.items()])
    first = 0
    for slot, tree in trees.items():
        for node in random_nodes(len(tree), seed):
            there = taken(own[slot], tree.path(node))
            wanted = ops.recurrence(*(joined(prefix, there) if slot == 2 else there))[0, -1]
            torch.testing.assert_close(got[0, first + node], wanted, atol=1e-9, rtol=1e-9)
        first += len(tree)
    path = trees[2].path(size - 1)[: 1 + seed % 3]
    cache.commit({2: path, 0: []})
    after = tokens(3, fade, delta, rows=rows)
    chain = run(op, after, cache, [Part(2, TokenTree.chain([1, 2, 3]))])
    whole = joined(joined(prefix, taken(own[2], path)), after)
    torch.testing.assert_close(chain[0], ops.recurrence(*whole)[0, -3:], atol=1e-9, rtol=1e-9)


def random_nodes(size: int, seed: int) -> list[int]:
    return sorted({0, size - 1, *(seed * (i + 1) % size for i in range(6))})


def test_many_decays_are_held_a_group_at_a_time(monkeypatch):
    torch.manual_seed(2)
    tree, values = random_tree(40, 50, 3), tokens(40, 0.5, True, rows=KEY)
    whole = run(TREE_RECURRENCE, values, cache_of(1, rows=KEY), [Part(0, tree)])
    monkeypatch.setattr(aten_recurrence, "MOST", 7 * 40 * HEADS * KEY)
    again = run(TREE_RECURRENCE, values, cache_of(1, rows=KEY), [Part(0, tree)])
    torch.testing.assert_close(again, whole, atol=1e-12, rtol=1e-12)


def test_grown_at_the_end():
    torch.manual_seed(1)
    cache, tree, values = cache_of(1), random_tree(30, 50, 3), tokens(30, 0.5, True)
    whole = run(TREE_RECURRENCE, values, cache, [Part(0, tree)]).clone()
    for start, end in ((0, 1), (1, 12), (12, 13), (13, 30)):
        part = TokenTree(tree.tokens[:end], tree.parents[:end])
        got = run(TREE_RECURRENCE, taken(values, [*range(start, end)]), cache, [Part(0, part, start)])
        torch.testing.assert_close(got, whole[:, start:end], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("which", range(5))
def test_what_is_not_finite_stays_on_its_path(which):
    cache, tree, values = cache_of(1, torch.float32), TokenTree([1, 2, 3, 4], [-1, 0, 0, 1]), tokens(4, 0.5, True)
    values = [x.float() for x in values if x is not None]
    values[which][:, 1] = torch.nan if which else torch.inf
    got = run(TREE_RECURRENCE, values, cache, [Part(0, tree)])
    rows = got.isfinite().flatten(2).all(2)[0].tolist()
    assert rows == [True, False, True, which == 0]  # descendants do not read a query


def test_a_kernel_of_a_gpu_is_taken_there_where_it_can():
    pytest.importorskip("triton", reason="needs triton")
    call = {
        "q": None,
        "k": torch.empty(1, 1, 1, 8),
        "v": None,
        "decay": None,
        "beta": None,
        "stash": None,
        "state": None,
    }

    def bound(device: str, dtype: torch.dtype) -> str:
        kernel = best_kernel(ops.tree_recurrence, device, dtype)
        assert kernel is not None
        return kernel.name

    assert bound("cuda", torch.bfloat16) == "triton" and bound("cpu", torch.bfloat16) == "aten"
    assert bound("cuda", torch.float64) == "aten"
    assert takes(call) and not takes(call | {"k": torch.empty(1, 1, 1, 2000)})
    assert not takes(call | {"state": torch.empty(1, dtype=torch.float64)})
