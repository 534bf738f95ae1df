"""`tree_convolution` against its reference, and both against the convolution of each node's own path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_tree
from torch import Tensor

from treespec_compiler import TokenTree
from treespec_compiler.codegen.aten_convolution import TREE_CONVOLUTION
from treespec_compiler.ir import ops
from treespec_compiler.ir.convolution import advance
from treespec_compiler.ir.specs import StateSpec
from treespec_compiler.program.batch import Part, pack
from treespec_compiler.program.cache import TreeCache

CHANNELS = 6
CPU = torch.device("cpu")


def cache_of(lag: int, slots: int, dtype: torch.dtype) -> TreeCache:
    spec = StateSpec(0, "convolution", "c", "", "", (lag, CHANNELS), CHANNELS, dtype, "")
    return TreeCache([], 4096, slots, CPU, ops.commit_path, states=[spec])


def convolve(op, x: Tensor, weight: Tensor, bias: Tensor, cache: TreeCache, parts: list[Part], rest) -> Tensor:
    batch = pack(parts, cache, CPU).meta
    assert cache.states is not None
    metadata = (batch.node_offsets, batch.prefix_lens, batch.tree_lens, batch.ancestors)
    return op(x, weight, bias, *cache.states.tensors, *metadata, batch.state_slots, batch.state_rows, *rest)


@pytest.mark.parametrize("op", [ops.tree_convolution, TREE_CONVOLUTION], ids=["reference", "aten"])
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(2, 1, 1, CHANNELS), (3, 1, 3, CHANNELS), (5, 2, 3, 1), (6, 2, 4, 2)]),
    st.sampled_from([0, 1, 2, 3, 9]),
    st.sampled_from([1, 7, 80]),
)
def test_each_node_is_the_convolution_of_its_path(op, seed, kernel, committed, size):
    lag, dilation, last, groups = kernel
    width = last if dilation > 1 else lag + 1
    torch.manual_seed(seed)
    weight = torch.randn(CHANNELS, CHANNELS // groups, width, dtype=torch.float64)
    bias = torch.randn(CHANNELS, dtype=torch.float64)
    cache = cache_of(lag, 3, torch.float64)
    prefix = torch.randn(1, CHANNELS, committed, dtype=torch.float64)
    rest = (lag, dilation, groups)
    if committed:
        for slot in (0, 2):
            convolve(op, prefix, weight, bias, cache, [Part.prompt(slot, [0] * committed)], rest)
            cache._append(slot, [0] * committed)
    trees = {2: random_tree(size, 50, seed), 0: random_tree(5, 50, seed + 1)}
    x = torch.randn(1, CHANNELS, size + 5, dtype=torch.float64)
    got = convolve(op, x, weight, bias, cache, [Part(s, t) for s, t in trees.items()], rest)
    first = 0
    for tree in trees.values():
        for node in range(len(tree)):
            path = torch.cat([prefix, x[..., [first + n for n in tree.path(node)]]], -1)
            wanted = ops.causal_convolution(path, weight, bias, *rest)[0, :, -1]
            torch.testing.assert_close(got[0, :, first + node], wanted, atol=1e-12, rtol=0)
        first += len(tree)


def test_a_state_moves_by_the_accepted_path():
    state, nodes = torch.arange(6.0).view(1, 3, 2), torch.arange(10.0, 14.0).view(1, 2, 2)
    assert torch.equal(advance(state, nodes), torch.tensor([[[4.0, 5.0], [10.0, 11.0], [12.0, 13.0]]]))
    many = torch.randn(1, 5, 2)
    assert torch.equal(advance(state, many), many[:, -3:])


def test_what_is_not_finite_stays_on_its_path():
    cache, tree = cache_of(2, 1, torch.float32), TokenTree([1, 2, 3, 4], [-1, 0, 0, 2])
    x = torch.randn(1, CHANNELS, 4)
    x[..., 1] = torch.nan
    weight, bias = torch.randn(CHANNELS, 1, 3), torch.zeros(CHANNELS)
    got = convolve(TREE_CONVOLUTION, x, weight, bias, cache, [Part(0, tree)], (2, 1, CHANNELS))
    assert got[0, 0].isnan().tolist() == [False, True, False, False]
