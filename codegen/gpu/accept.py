"""`treespec_triton::greedy_accept`: two launches, nothing of which waits for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from treespec_compiler.ir import accept, ops
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload

from .launch import Launch
from .sizes import power_of_two

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

BLOCK = 1024
MAX_SPLITS = 16
# Programs that give every multiprocessor of a large GPU (132 to 160 of them) something to do, twice.
PROGRAMS = 256


def split_size(rows: int, vocab_size: int) -> int:
    """Ids of a row that one program reads: a power of two, so that few kernels are compiled."""
    splits = max(1, min(MAX_SPLITS, PROGRAMS // max(1, rows)))
    return max(BLOCK, power_of_two(-(-vocab_size // splits)))


def walk_block(rows: int) -> int:
    """Rows that a walk looks at together: a power of two, and one kernel for all small trees."""
    return power_of_two(max(rows, 16))


def walk_warps(block_n: int, block_s: int) -> int:
    """One warp, which needs no barriers, while a thread holds 8 numbers at most; 16 warps hold 4096 without spills."""
    return min(16, power_of_two(max(1, block_n * block_s // 256)))


def greedy_accept(logits: Tensor, tokens: Tensor, parents: Tensor, node_offsets: Tensor, tie: float) -> Tensor:
    """As `treespec::greedy_accept`, for the dtypes of DTYPES."""
    if logits.dtype not in DTYPES:
        raise ValueError(f"got logits of {logits.dtype}, expected one of {sorted(map(str, DTYPES))}")
    tokens, parents, node_offsets = (t.contiguous() for t in (tokens, parents, node_offsets))
    out = accept.fake(logits, tokens, parents, node_offsets, tie)
    for launch in accept_launches(logits, tokens, parents, node_offsets, out, tie):
        launch.run()
    return out


def accept_launches(
    logits: Tensor, tokens: Tensor, parents: Tensor, node_offsets: Tensor, out: Tensor, tie: float
) -> list[Launch]:
    """Each row's best ids, where there are rows, then a walk for each request."""
    from .kernels.accept import greedy_walk_kernel, row_best_kernel

    (rows, vocab_size), requests = logits.shape, node_offsets.numel() - 1
    size = split_size(rows, vocab_size)
    splits = -(-vocab_size // size)
    block_n, block_s = walk_block(rows), power_of_two(splits)
    best = torch.empty(rows, splits, 2, dtype=torch.int64, device=logits.device)
    row_best = Launch(
        row_best_kernel,
        (rows, splits),
        (logits, *logits.stride(), best, vocab_size),
        {"SPLIT": size, "BLOCK": BLOCK},
        fusion=False,
    )
    walk = Launch(
        greedy_walk_kernel,
        (requests,),
        (best, tokens, parents, node_offsets, out, requests, splits),
        {"TIE": tie, "FIELDS": accept.FIELDS, "BLOCK_N": block_n, "BLOCK_S": block_s},
        walk_warps(block_n, block_s),
        fusion=False,
    )
    return [row_best, walk] if rows else [walk]


GREEDY_ACCEPT: OpOverload = implement(ops.greedy_accept, "treespec_triton", greedy_accept)
