"""`treespec_aten::grouped_linear`: torch's grouped product where it runs without waiting, else every row times every
matrix.

Nothing is read back either way, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from treespec_compiler.ir import grouped_linear as definition
from treespec_compiler.ir import ops
from treespec_compiler.ir.device import profile
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload

ALIGNMENT = 16  # bytes, of addresses and strides: the tensor memory accelerator's
MAX_GROUPS = 1023  # one block of threads lays out the groups
ARCHITECTURES = (9, 10)  # major numbers of the compute capabilities that torch has its kernel for


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, K], weight [E, M, K], ends [E], as `treespec::grouped_linear` -> [N, M], contiguous."""
    matrices = weight.transpose(1, 2)  # [E, K, M]
    if not _is_taken(x, matrices):
        return definition.every_group(x, weight, ends)
    # NOTE rows of another layout are copied: an end that is no multiple of 8 would be a failed assertion on the device.
    rows = x if x.stride(1) == 1 and is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
    product = torch._grouped_mm(rows, matrices, offs=ends.to(torch.int32).contiguous())
    return product.contiguous()  # its rows are padded to 16 bytes


def _is_taken(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch multiplies x [N, K] by matrices [E, K, M] in one launch that reads the ends on the device.

    NOTE for other dtypes and devices it copies the ends to the host, which a capture does not survive.
    """
    groups, inner, _ = matrices.shape
    return (
        x.dtype == matrices.dtype == torch.bfloat16
        and has_kernel(x.device)
        and groups <= MAX_GROUPS
        and min(x.numel(), matrices.numel()) > 0
        and inner * x.element_size() % ALIGNMENT == 0
        and is_aligned(matrices)
    )


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether torch has a grouped product for this device that does not wait for it."""
    return sys.platform != "win32" and profile(device).capability(device) in ARCHITECTURES


def is_aligned(matrices: Tensor) -> bool:
    """Whether [..., R, C] has contiguous rows or columns, and address and other strides are multiples of 16 bytes."""
    *batch, row, column = matrices.stride()
    rows, columns = matrices.shape[-2:]
    if row == 1 and column >= max(1, rows):
        step = column
    elif column == 1 and row >= max(1, columns):
        step = row
    else:
        return False
    places = (matrices.data_ptr(), *(s * matrices.element_size() for s in (*batch, step)))
    return all(place % ALIGNMENT == 0 for place in places)


GROUPED_LINEAR: OpOverload = implement(ops.grouped_linear, "treespec_aten", grouped_linear)
