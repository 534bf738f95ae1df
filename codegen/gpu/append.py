"""K and V of new nodes into the paged pools in one launch, which can rotate q and k on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from treespec_compiler.ir.rotation import check

from .launch import Launch
from .sizes import power_of_two

# Elements of a block: 8 numbers for each thread of 4 warps.
BLOCK = 1024


def append(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, write_index: Tensor) -> None:
    """Write token t of every head at page `write_index[t] // page_size`, offset `write_index[t] % page_size`.

    k [1, Hkv, T, Dk] and v [1, Hkv, T, Dv] of any strides; pool_k [pages, Hkv, page_size, Dk] and pool_v of any strides
    and float dtype; write_index [T] int64, negative: this token is padding and is written nowhere. The grid depends on
    shapes only and nothing is read back, so the launch can be captured in a CUDA graph.
    """
    if k.shape[2]:
        append_launch(k, v, pool_k, pool_v, write_index).run()


def append_launch(k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, write_index: Tensor) -> Launch:
    from .kernels.append import append_kernel

    heads, nodes = k.shape[1], k.shape[2]
    blocks = _blocks(nodes, k.shape[3], v.shape[3])
    return Launch(
        append_kernel,
        (-(-nodes // blocks["BLOCK_T"]), heads),
        (
            k, v, pool_k, pool_v, write_index.contiguous(), nodes, pool_k.shape[2],
            *_token_strides(k), *_token_strides(v), *pool_k.stride(), *pool_v.stride(),
        ),
        {"KEY_DIM": k.shape[3], "VALUE_DIM": v.shape[3], **blocks},
    )  # fmt: skip


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
    check(cos, sin, style, rotary, q.shape[3])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.shape[2]:
        rope_append_launch(q, k, v, out, pool_k, pool_v, write_index, cos, sin, style, rotary).run()
    return out


def rope_append_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    write_index: Tensor,
    cos: Tensor,
    sin: Tensor,
    style: str,
    rotary: int,
) -> Launch:
    from .kernels.append import rope_append_kernel

    (_, heads, nodes, key_dim), value_dim = q.shape, v.shape[3]
    blocks = _blocks(nodes, key_dim, value_dim)
    turn = {"ROTARY": rotary, "COLUMNS": cos.shape[1], "HALF": style == "half"}
    return Launch(
        rope_append_kernel,
        (-(-nodes // blocks["BLOCK_T"]), heads + k.shape[1]),
        (
            q, k, v, out, pool_k, pool_v, write_index.contiguous(), cos, sin, nodes, pool_k.shape[2],
            *_token_strides(q), *_token_strides(k), *_token_strides(v), *_token_strides(out),
            *pool_k.stride(), *pool_v.stride(), *cos.stride(), *sin.stride(),
        ),
        {"HEADS": heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, **turn, **blocks},
    )  # fmt: skip


def _blocks(nodes: int, key_dim: int, value_dim: int) -> dict[str, int]:
    block_k, block_v = power_of_two(key_dim), power_of_two(value_dim)
    block_t = min(power_of_two(nodes), max(1, BLOCK // max(block_k, block_v)))
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_V": block_v}


def _token_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of [1, H, T, D] by token, head and dimension."""
    _, head, token, dim = x.stride()
    return token, head, dim
