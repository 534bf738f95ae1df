"""`treespec::grouped_linear`: rows sorted by group, each times the matrix of its group.

Row r belongs to the first group e with r < ends[e]; out[r] = x[r] @ weight[e].T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .device import profile
from .library import define
from .private_torch import OpOverload

SCHEMA = "(Tensor x, Tensor weight, Tensor ends) -> Tensor"


def reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, K], weight [E, M, K], ends [E] integers that do not fall, the last of them N -> [N, M], contiguous."""
    if not profile(x.device).synchronous:
        return every_group(x, weight, ends)
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group].t(), out=out[start:end])
        start = end
    return out


def every_group(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same without waiting for the device to say where groups end: every row times every matrix, and a choice."""
    rows = torch.arange(x.shape[0], device=x.device)
    group = torch.searchsorted(ends.to(torch.int64), rows, right=True)
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        out = torch.where((group == e)[:, None], x @ weight[e].t(), out)
    return out


def fake(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


grouped_linear: OpOverload = define("grouped_linear", SCHEMA, reference, fake)
