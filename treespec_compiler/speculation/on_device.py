"""Greedy acceptance where the logits are: one small tensor is read back, not the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..ir import ops
from ..ir.accept import FIELDS
from ..ir.registry import best_kernel
from .near_ties import TOLERANCE
from .proposal import Proposal
from .verifier import Verdict, check_one_root

if TYPE_CHECKING:
    from ..program import TreeProgram


def greedy_kernel(program: TreeProgram) -> OpOverload | None:
    """Who accepts on the program's device; None: the logits are read back, which on a CPU costs nothing."""
    if program.device.type == "cpu" or program.options.kernels != "auto":
        return None
    kernel = best_kernel(ops.greedy_accept, program.device, program.dtype)
    return None if kernel is None else kernel.target


def accept_greedily(kernel: OpOverload, proposal: Proposal, logits: Tensor) -> Verdict:
    """What `GreedyVerifier` says of logits [N, V], by an implementation of `treespec::greedy_accept`."""
    check_one_root(proposal)
    count, device = len(proposal.tokens), logits.device
    numbers = torch.tensor([*proposal.tokens, *proposal.parents, 0, count], pin_memory=device.type == "cuda")
    tokens, parents, offsets = numbers.to(device, non_blocking=True).split([count, count, 2])
    read = kernel(logits, tokens, parents, offsets, TOLERANCE.get(logits.dtype, 0.0)).tolist()
    accepted, bonus, unusable, near = read[:FIELDS]
    return Verdict(read[FIELDS : FIELDS + accepted], bonus, unusable, bool(near))
