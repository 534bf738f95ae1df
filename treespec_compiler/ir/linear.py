"""`treespec::packed_linear`: x @ weight.T + bias on a weight packed for few rows of x.

A packed weight is [panels, K, 32]: panel p holds, for each k, the weights of outputs 32 p .. 32 p + 31, and zeros past
the last output. One pass over it in memory order serves every row of x, and 32 floats are two AVX-512, four AVX2 or
eight NEON vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define
from .private_torch import OpOverload

SCHEMA = "(Tensor x, Tensor packed, Tensor? bias, SymInt out_features) -> Tensor"
PANEL = 32


def pack_weight(weight: Tensor) -> Tensor:
    """[N, K] -> [panels, K, PANEL]. Weights that share an input may be concatenated along N before."""
    n, k = weight.shape
    panels = -(-n // PANEL)
    packed = weight.new_zeros(panels * PANEL, k)
    packed[:n] = weight
    return packed.view(panels, PANEL, k).transpose(1, 2).contiguous()


def unpack_weight(packed: Tensor, out_features: int) -> Tensor:
    """[panels, K, PANEL] -> [N, K]."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:out_features]


def packed_bytes(packed: Tensor) -> int:
    return packed.numel() * packed.element_size()


def reference(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x [..., K] -> [..., N], contiguous."""
    return torch.nn.functional.linear(x, unpack_weight(packed, out_features), bias).contiguous()


def fake(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


packed_linear: OpOverload = define("packed_linear", SCHEMA, reference, fake)
