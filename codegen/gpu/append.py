"""K and V of new nodes into the paged pools in one launch, which can rotate q and k on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from treespec_compiler.ir.rotation import check

from .sizes import power_of_two

# Elements of a block: 8 numbers for each thread of 4 warps.
BLOCK = 1024


def append(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, write_index: Tensor) -> None:
    """Write token t of every head at page `write_index[t] // page_size`, offset `write_index[t] % page_size`.

    k [1, Hkv, T, Dk] and v [1, Hkv, T, Dv] of any strides; pool_k [pages, Hkv, page_size, Dk] and pool_v of any strides
    and float dtype; write_index [T] int64, negative: this token is padding and is written nowhere. The grid depends on
    shapes only and nothing is read back, so the launch can be captured in a CUDA graph.
    """
    from .kernels.append import append_kernel

    heads, nodes = k.shape[1], k.shape[2]
    if nodes == 0:
        return
    block_k, block_v = power_of_two(k.shape[3]), power_of_two(v.shape[3])
    block_t = min(power_of_two(nodes), max(1, BLOCK // max(block_k, block_v)))
    with torch.cuda.device_of(pool_k):
        append_kernel[(-(-nodes // block_t), heads)](
            k,
            v,
            pool_k,
            pool_v,
            write_index.contiguous(),
            nodes,
            pool_k.shape[2],
            *_token_strides(k),
            *_token_strides(v),
            *pool_k.stride(),
            *pool_v.stride(),
            KEY_DIM=k.shape[3],
            VALUE_DIM=v.shape[3],
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=4,
            enable_fp_fusion=True,
        )


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    write_index: Tensor,
    cos: Tensor,
    sin: Tensor,
    style: str,
    rotary: int,
) -> Tensor:
    """As `append` of k turned by `ir.rotation.rotate`; returns q [1, Hq, T, Dk] turned.

    cos and sin [T, rotary] or [T, rotary / 2], of any strides.
    """
    from .kernels.append import rope_append_kernel

    (_, heads, nodes, key_dim), value_dim = q.shape, v.shape[3]
    check(cos, sin, style, rotary, key_dim)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if nodes == 0:
        return out
    block_k, block_v = power_of_two(key_dim), power_of_two(value_dim)
    block_t = min(power_of_two(nodes), max(1, BLOCK // max(block_k, block_v)))
    with torch.cuda.device_of(pool_k):
        rope_append_kernel[(-(-nodes // block_t), heads + k.shape[1])](
            q,
            k,
            v,
            out,
            pool_k,
            pool_v,
            write_index.contiguous(),
            cos,
            sin,
            nodes,
            pool_k.shape[2],
            *_token_strides(q),
            *_token_strides(k),
            *_token_strides(v),
            *_token_strides(out),
            *pool_k.stride(),
            *pool_v.stride(),
            *cos.stride(),
            *sin.stride(),
            HEADS=heads,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            ROTARY=rotary,
            COLUMNS=cos.shape[1],
            HALF=style == "half",
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _token_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of [1, H, T, D] by token, head and dimension."""
    _, head, token, dim = x.stride()
    return token, head, dim
