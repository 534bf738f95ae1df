"""`treespec_triton::tree_recurrence`: one launch a site, which waits for nothing.

Two kernels. Blocks of 16 nodes, with products of tiles and a triangular solve, where a head has one decay; and a walk
along each node's path where the rows of a state decay apart, or heads are too small for tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.device import profile
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.recurrence import by_row

from .launch import Launch
from .recurrence_check import RecurrenceShape, confirm
from .sizes import power_of_two
from .tree_attention_spec import DTYPES

BLOCK_N = 16
"""Nodes of a block: the least that tiles are multiplied in, and all that many trees have."""
COLUMNS = 32
"""Of a head's state that a program computes."""
BLOCK_D = 16
"""Rows of a state that are multiplied at a time: more, and a thread's registers do not hold them."""
LANE_NUMBERS = 2048
"""Of a state that a program holds where it walks paths: 16 for each thread of 4 warps."""
STAGES = 1
"""Loads that are made ahead take registers that there are not."""
LONGEST = 1024
"""Rows of a state that a program can hold."""


def takes(call: Mapping[str, Any]) -> bool:
    """Whether there is a kernel for a call: not in float64, and not for states of more than `LONGEST` rows."""
    tensors = [call[name] for name in ("q", "k", "v", "decay", "beta", "stash", "state")]
    return call["k"].shape[3] <= LONGEST and all(x is None or x.dtype in DTYPES for x in tensors)


def tree_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    stash: Tensor,
    state: Tensor,
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
) -> Tensor:
    """As `treespec::tree_recurrence`, for the dtypes of DTYPES, in float32.

    What is not finite makes that head's columns NaN in which it is, at the node and below it. A kernel is checked on
    the device before its first use, and WrongKernel raised where it is wrong.
    """
    if v.shape[1] and profile(v.device).number(v.device) >= 0:  # not in the interpreter
        shape = RecurrenceShape.of({"k": k, "v": v, "decay": decay, "beta": beta, "stash": stash})
        confirm(launched, shape, not ancestors.shape[1], v.device)
    step = (node_offsets, prefix_lens, tree_lens, ancestors, state_slots, state_rows)
    return launched(q, k, v, decay, beta, stash, state, *step)


def launched(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, stash: Tensor, state: Tensor, *step: Tensor
) -> Tensor:
    """The same unchecked; `step`: of the op's schema, from `node_offsets` on."""
    out = v.new_zeros(v.shape)  # rows of no request stay 0
    if not (stash.is_contiguous() and state.is_contiguous()):
        raise ValueError(f"got a stash of strides {stash.stride()} and states of {state.stride()}, expected no gaps")
    if v.shape[1] and step[0].shape[0] > 1:
        recurrence_launch(q, k, v, decay, beta, stash, state, *(x.contiguous() for x in step), out=out).run()
    return out


def recurrence_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    stash: Tensor,
    state: Tensor,
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
    *,
    out: Tensor,
) -> Launch:
    """Tensors as `tree_recurrence` takes them, of any strides but the stash, the state, out and the integers."""
    from .kernels.recurrence_blocks import tree_recurrence_blocks_kernel
    from .kernels.recurrence_paths import tree_recurrence_paths_kernel

    (_, nodes, heads, value_dim), (key_heads, key_dim) = v.shape, k.shape[2:]
    requests, words, rows = prefix_lens.shape[0], ancestors.shape[1], by_row(decay).shape[3]
    chain, delta = words == 0, beta is not None
    tensors = (q, k, v, decay, v if beta is None else beta, stash, state)
    metadata = (node_offsets, prefix_lens, tree_lens, ancestors, state_slots, state_rows, requests, words)
    strides = (*q.stride()[1:], *k.stride()[1:], *v.stride()[1:])
    beta_strides = (0, 0) if beta is None else beta.stride()[1:]
    sizes = {"HEADS": heads, "KEY_HEADS": key_heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim}
    sizes |= {"DELTA": delta, "CHAIN": chain, "BLOCK_R": power_of_two(requests)}
    if rows == 1 and key_dim > 1 and value_dim >= BLOCK_N // 2:
        block_v = min(COLUMNS, max(BLOCK_N, power_of_two(value_dim)))
        carried = state  # read by none but chains
        if chain:
            carried = torch.empty(requests, *state.shape[1:], dtype=torch.float32, device=state.device)
        return Launch(
            tree_recurrence_blocks_kernel,
            (requests, heads, -(-value_dim // block_v)),
            (*tensors, carried, out, *metadata, *strides, *decay.stride()[1:3], *beta_strides),
            {**sizes, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "BLOCK_V": block_v},
            num_stages=STAGES,
        )
    block_k = power_of_two(key_dim)
    lanes = min(power_of_two(heads * value_dim), max(1, LANE_NUMBERS // block_k), 256)
    by_request = delta or chain
    return Launch(
        tree_recurrence_paths_kernel,
        (requests if by_request else nodes, -(-heads * value_dim // lanes)),
        (*tensors, out, *metadata, *strides, *decay.stride()[1:3], 0 if rows == 1 else decay.stride(3), *beta_strides),
        {**sizes, "ROWS": rows, "BLOCK_L": lanes, "BLOCK_K": block_k},
        num_stages=STAGES,
    )


TREE_RECURRENCE: OpOverload = implement(ops.tree_recurrence, "treespec_triton", tree_recurrence)
