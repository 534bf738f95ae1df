"""`treespec_triton::commit_path`: one launch for every layer, head and storage of a cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload

from .launch import Launch
from .sizes import power_of_two

MAX_MOVES = 16  # of a block: a longer path goes in several
WORDS = 2048  # of a block: 16 for each thread of 4 warps

Storage: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""Address, shape and strides of a pool [sites, pages, H, page_size, D], and bytes of an element."""


def commit_path(pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """As `treespec::commit_path`; pools of any dtypes with contiguous rows and one page size."""
    if not pools or not src.numel():
        return
    page_size = pools[0].shape[3]
    if any(pool.shape[3] != page_size or pool.stride(4) != 1 for pool in pools):
        found = [(tuple(pool.shape), pool.stride()) for pool in pools]
        raise ValueError(f"got pools of shapes and strides {found}, expected one page size and contiguous rows")
    layouts = tuple((p.data_ptr(), tuple(p.shape), p.stride(), p.element_size()) for p in pools)
    lanes, word_bytes, width = _lanes(layouts, pools[0].device)
    commit_launch(lanes, src, dst, page_size, word_bytes, width).run()


def commit_launch(lanes: Tensor, src: Tensor, dst: Tensor, page_size: int, word_bytes: int, width: int) -> Launch:
    """`lanes`, `word_bytes` and `width` as `_lanes` gives them."""
    from .kernels.commit import commit_kernel

    block_w = power_of_two(width)
    return Launch(
        commit_kernel,
        (len(lanes),),
        (lanes, src.contiguous(), dst.contiguous(), src.numel(), page_size),
        {"WORD": _word(word_bytes), "BLOCK_J": min(MAX_MOVES, max(1, WORDS // block_w)), "BLOCK_W": block_w},
        fusion=False,
    )


@functools.lru_cache(maxsize=64)
def _lanes(layouts: tuple[Storage, ...], device: torch.device) -> tuple[Tensor, int, int]:
    """A row [address, page stride, token stride, width] for every head of every site, in words; bytes of a word; the
    largest width.

    NOTE: remembered by what the rows are made of, so memory that is freed and given out again cannot make them wrong.
    """
    word = next(
        size
        for size in (4, 2, 1)
        if all(n * bytes % size == 0 for _, shape, strides, bytes in layouts for n in (shape[4], *strides[:4]))
        and all(address % size == 0 for address, *_ in layouts)
    )
    rows = [
        [
            address + (site * strides[0] + head * strides[2]) * bytes,
            strides[1] * bytes // word,
            strides[3] * bytes // word,
            shape[4] * bytes // word,
        ]
        for address, shape, strides, bytes in layouts
        for site in range(shape[0])
        for head in range(shape[2])
    ]
    with torch.inference_mode(False):  # it outlives the mode it happens to be made in
        return torch.tensor(rows, device=device), word, max(row[3] for row in rows)


def _word(bytes: int) -> object:
    import triton.language as tl

    return {4: tl.int32, 2: tl.int16, 1: tl.int8}[bytes]


COMMIT_PATH: OpOverload = implement(ops.commit_path, "treespec_triton", commit_path)
