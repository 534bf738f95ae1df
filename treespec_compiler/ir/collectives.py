"""The functional collectives of torch that cut graphs call: plain ops of a graph, the same with gloo and NCCL."""

from __future__ import annotations

import torch

ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default
"""(value, "sum", group) -> the sum over all ranks, to be waited for."""
ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
"""(value, ranks, group) -> all ranks' values one behind the other along dimension 0, to be waited for."""
WAIT = torch.ops._c10d_functional.wait_tensor.default
