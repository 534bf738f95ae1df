"""Committing in one launch against the definition."""

from __future__ import annotations

import pytest
import torch

from treespec_compiler.codegen.gpu.commit import COMMIT_PATH, MAX_MOVES
from treespec_compiler.ir import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int8), b.contiguous().view(torch.int8))


def check(pools, src, dst):
    expected = [pool.clone() for pool in pools]
    src, dst = torch.tensor([src, dst]).t().contiguous().t()  # as columns: of any strides
    ops.commit_path(expected, src, dst)
    COMMIT_PATH(pools, src, dst)
    assert all(map(same_bits, pools, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_storages_of_several_shapes(dtype):
    """Row widths that are no power of two and, at 2 bytes, odd numbers of them."""
    pools = [torch.randn(2, 3, 4, 16, 5).to(dtype), torch.randn(1, 3, 2, 16, 8).to(dtype)]
    pools[0][0, 1, 0, 4] = torch.nan
    check(pools, [18, 20, 21, 30, 33, 40], [18, 19, 20, 21, 32, 33])


def test_storages_of_several_dtypes():
    pools = [torch.randn(2, 2, 3, 16, 8), torch.randn(2, 2, 3, 16, 6).to(torch.bfloat16)]
    check(pools, [3, 5, 21], [2, 3, 20])


@pytest.mark.parametrize("moves", [1, MAX_MOVES - 1, MAX_MOVES, MAX_MOVES + 1, 3 * MAX_MOVES + 5])
def test_every_target_is_another_moves_source(moves):
    """A path shifted by one: within a block and across blocks, what is overwritten has been read."""
    check([torch.randn(1, 1, 2, 64, 4)], list(range(8, 8 + moves)), list(range(7, 7 + moves)))


def test_views_of_a_storage():
    storage = torch.randn(4, 2, 2, 16, 12)
    before = storage.clone()
    check([storage[1:3, :, :, :, :8]], [6, 20], [4, 17])
    assert torch.equal(storage[[0, 3]], before[[0, 3]]) and torch.equal(storage[..., 8:], before[..., 8:])


def test_random_paths():
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        pages, size = 3, 24
        src, dst = [], []
        for page in range(pages):  # one slot a page, a path of it
            prefix = int(torch.randint(0, 8, (), generator=generator))
            path = torch.randperm(size - prefix, generator=generator)[
                : int(torch.randint(0, 9, (), generator=generator))
            ]
            for target, node in enumerate(sorted(path.tolist())):
                if node != target:
                    src.append(page * size + prefix + node)
                    dst.append(page * size + prefix + target)
        if src:
            check([torch.randn(1, pages, 2, size, 4)], src, dst)


def test_one_table_for_each_cache():
    """The table of addresses is made once for a cache, and made anew for another one."""
    from treespec_compiler.codegen.gpu import commit

    commit._lanes.cache_clear()
    pools = [torch.randn(2, 1, 2, 16, 4)]
    for _ in range(3):
        check(pools, [3], [2])
    assert commit._lanes.cache_info().misses == 1
    check([torch.randn(2, 1, 2, 16, 4)], [3], [2])
    assert commit._lanes.cache_info().misses == 2
    with pytest.raises(ValueError, match="one page size"):
        COMMIT_PATH([torch.randn(1, 1, 1, 8, 4), torch.randn(1, 1, 1, 16, 4)], torch.tensor([3]), torch.tensor([2]))
    with pytest.raises(ValueError, match="contiguous rows"):
        COMMIT_PATH([torch.randn(1, 1, 1, 8, 4).transpose(3, 4)], torch.tensor([3]), torch.tensor([2]))
