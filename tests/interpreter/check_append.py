"""K/V append against the copy it stands for."""

from __future__ import annotations

import pytest
import torch

from treespec_compiler.codegen.gpu.append import append

T, H = 5, 2


def pools(key_dim, value_dim, dtype, pages=3, size=16):
    return torch.randn(pages, H, size, key_dim).to(dtype), torch.randn(pages, H, size, value_dim).to(dtype)


def expected(pool, x, write_index):
    out, size, live = pool.clone(), pool.shape[2], write_index >= 0
    at = write_index[live]
    out[at // size, :, at % size] = x[0].transpose(0, 1)[live].to(pool.dtype)
    return out


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),  # a copy of bits, which the interpreter does right
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 40), (64, 32)])
def test_append(key_dim, value_dim, dtype, pool_dtype):
    k = torch.randn(1, T, H, key_dim).to(dtype).transpose(1, 2)  # as a projection gives it
    v = torch.randn(1, H, T, value_dim).to(dtype)
    pool_k, pool_v = pools(key_dim, value_dim, pool_dtype)
    write_index = torch.tensor([3, 17, 16, 40, 47])
    want = expected(pool_k, k, write_index), expected(pool_v, v, write_index)
    append(k, v, pool_k, pool_v, write_index)
    assert torch.equal(pool_k, want[0]) and torch.equal(pool_v, want[1])


def test_padding_is_written_nowhere():
    k, v = torch.randn(1, H, T, 8), torch.randn(1, H, T, 8)
    pool_k, pool_v = pools(8, 8, torch.float32)
    write_index = torch.tensor([-1, 0, -1, 20, -1])
    want = expected(pool_k, k, write_index), expected(pool_v, v, write_index)
    append(k, v, pool_k, pool_v, write_index)
    assert torch.equal(pool_k, want[0]) and torch.equal(pool_v, want[1])


def test_strided_pools_and_several_blocks_of_tokens():
    nodes, storage = 37, torch.randn(4, 2, H, 32, 48)  # pools are views of one storage, as in a TreeCache
    k, v = torch.randn(1, H, nodes, 48), torch.randn(1, H, nodes, 48)
    write_index = torch.randperm(64)[:nodes]
    before = storage.clone()
    append(k, v, storage[1], storage[3], write_index)
    assert torch.equal(storage[1], expected(before[1], k, write_index))
    assert torch.equal(storage[3], expected(before[3], v, write_index))
    assert torch.equal(storage[0], before[0]) and torch.equal(storage[2], before[2])


def test_no_tokens():
    pool_k, pool_v = pools(8, 8, torch.float32)
    before = pool_k.clone()
    append(torch.empty(1, H, 0, 8), torch.empty(1, H, 0, 8), pool_k, pool_v, torch.empty(0, dtype=torch.int64))
    assert torch.equal(pool_k, before)
