"""A head's products with its weights: a CPU's kernel for few rows reads them as narrow as they are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ....ir import ops
from ....ir.linear import pack_weight, packed_bytes
from ....ir.narrow import narrowest
from ....ir.private_torch import OpOverload
from ....ir.registry import best_kernel
from ....program.tree_program import TreeProgram


def product_kernel(target: TreeProgram) -> OpOverload | None:
    """The kernel of `treespec::packed_linear` that takes any form where a target runs; None: there is none, or the
    target was asked to run without kernels."""
    if target.options.kernels != "auto":
        return None
    kernel = best_kernel(ops.packed_linear, target.device, target.dtype, given=("form",))
    return None if kernel is None else kernel.target


class HeadProduct:
    """x @ weight.T + bias of a weight [N, K]: x [T, K] -> [T, N]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, kernel: OpOverload | None = None) -> None:
        """With a kernel the weight is packed, in the narrowest form that holds every value, and not kept; without one
        it is, and gradients reach it."""
        self.rows, self.columns = weight.shape
        self._bias, self._kernel = bias, kernel
        self._form = "" if kernel is None else narrowest(weight)
        self._weight = weight if kernel is None else pack_weight(weight, self._form)

    @property
    def bytes(self) -> int:
        """What one call reads of the weight."""
        return packed_bytes(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernel is None:
            return F.linear(x, self._weight, self._bias)
        found: Tensor = self._kernel(x, self._weight, self._bias, self.rows, self._form)
        return found
