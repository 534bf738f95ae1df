"""K/V append against the copy it stands for, and rotating on the way against its definition."""

from __future__ import annotations

import pytest
import torch
from bfloat16 import exact_bfloat16
from tree_cases import Case

from treespec_compiler.codegen.gpu.append import append, rope_append
from treespec_compiler.codegen.gpu.tree_attention import TREE_ATTENTION
from treespec_compiler.ir import ops
from treespec_compiler.ir.rotation import rotate

T, H = 5, 2


def pools(key_dim, value_dim, dtype, pages=3, size=16):
    return torch.randn(pages, H, size, key_dim).to(dtype), torch.randn(pages, H, size, value_dim).to(dtype)


def expected(pool, x, write_index):
    out, size, live = pool.clone(), pool.shape[2], write_index >= 0
    at = write_index[live]
    out[at // size, :, at % size] = x[0].transpose(0, 1)[live].to(pool.dtype)
    return out


@pytest.mark.family
@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
@exact_bfloat16()
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


def angles(nodes, width):
    """cos and sin of unrelated numbers, so that mixed up columns show."""
    return torch.randn(nodes, width), torch.randn(nodes, width)


@pytest.mark.family
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("key_dim", "rotary"), [(24, 24), (24, 8), (40, 20), (8, 2)])
@pytest.mark.parametrize("per_angle", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rope_append(style, key_dim, rotary, per_angle, dtype):
    q = torch.randn(1, T, 2 * H, key_dim).to(dtype).transpose(1, 2)
    k = torch.randn(1, T, H, key_dim).to(dtype).transpose(1, 2)
    v = torch.randn(1, H, T, 16).to(dtype)
    cos, sin = angles(T, rotary // 2 if per_angle else rotary)
    pool_k, pool_v = pools(key_dim, 16, dtype)
    write_index = torch.tensor([3, 17, -1, 40, 47])
    turned = rotate(k, cos, sin, style, rotary)
    want = expected(pool_k, turned, write_index), expected(pool_v, v, write_index)
    got = rope_append(q, k, v, pool_k, pool_v, write_index, cos, sin, style, rotary)
    exact = {"atol": 1e-6, "rtol": 1e-6} if dtype is torch.float32 else {}
    torch.testing.assert_close(got, rotate(q, cos, sin, style, rotary), **exact)
    torch.testing.assert_close(pool_k, want[0], **exact)
    assert torch.equal(pool_v, want[1])
    assert torch.equal(got[..., rotary:], q[..., rotary:])


@pytest.mark.family
@exact_bfloat16()
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float32])
def test_rope_append_in_bfloat16(style, angle_dtype, pool_dtype):
    """One rounding, of the turned numbers to bfloat16, whatever the pool's dtype is."""
    q, k, v = (torch.randn(1, h, T, d).bfloat16() for h, d in ((2 * H, 40), (H, 40), (H, 16)))
    cos, sin = (x.to(angle_dtype) for x in angles(T, 10))
    pool_k, pool_v = pools(40, 16, pool_dtype)
    write_index = torch.tensor([3, 17, -1, 40, 47])
    want = expected(pool_k.double(), rotate(k.double(), cos, sin, style, 20), write_index)
    want_v = expected(pool_v, v, write_index)
    got = rope_append(q, k, v, pool_k, pool_v, write_index, cos, sin, style, 20)
    half_a_step = {"atol": 1e-6, "rtol": 1.001 * 2.0**-8}
    torch.testing.assert_close(got.double(), rotate(q.double(), cos, sin, style, 20), **half_a_step)
    torch.testing.assert_close(pool_k.double(), want, **half_a_step)
    written = pool_k[write_index[write_index >= 0] // 16, :, write_index[write_index >= 0] % 16]
    assert torch.equal(written, written.bfloat16().to(pool_dtype))
    assert torch.equal(pool_v, want_v) and torch.equal(got[..., 20:], q[..., 20:])


def test_rope_append_reads_strided_angles():
    """cos and sin as two halves of one table, read at the tokens' positions and transposed."""
    q, k, v = torch.randn(1, H, T, 8), torch.randn(1, H, T, 8), torch.randn(1, H, T, 8)
    table = torch.randn(T, 4, 2)
    cos, sin = table[..., 0], table[..., 1]
    pool_k, pool_v = pools(8, 8, torch.float32)
    write_index = torch.arange(T)
    want = expected(pool_k, rotate(k, cos, sin, "interleaved", 8), write_index)
    got = rope_append(q, k, v, pool_k, pool_v, write_index, cos, sin, "interleaved", 8)
    torch.testing.assert_close(got, rotate(q, cos, sin, "interleaved", 8))
    torch.testing.assert_close(pool_k, want)


@pytest.mark.parametrize("scored", [False, True])
def test_attention_that_rotates_is_rotation_then_attention(scored):
    case = Case([(5, [-1, 0, 0], 2), (3, [-1, 0], 2)], page_size=16)
    arguments = case.arguments()
    cos, sin = angles(4, 16)
    rest = {"softcap": 5.0 * scored, "cos": cos, "sin": sin, "style": "half", "rotary": 32}
    mine = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    want, got = ops.tree_attention(*arguments, **rest), TREE_ATTENTION(*mine, **rest)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine[3], arguments[3], atol=1e-6, rtol=1e-6)
    assert torch.equal(mine[4], arguments[4])
