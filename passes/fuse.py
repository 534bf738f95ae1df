"""fuse: linears on constant weights become packed skinny products; linears that share their input become one.

Decoding multiplies few rows by large matrices, so the weight is read once, in the order the kernel wants it, and
q/k/v or gate/up projections are one product whose result is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.linear import pack_weight
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.options import Options

from .framework.manager import Pass
from .framework.state import GraphState
from .spellings.products import JoinSpec, Product, bias_pieces, built_input, products, replace_by_slices, weight_pieces


@dataclass(frozen=True)
class PackSpec:
    """A weight that is joined, then packed."""

    joined: JoinSpec

    def build(self, constants: dict[str, Tensor]) -> Tensor:
        return pack_weight(self.joined.build(constants))


def pack_linears(state: GraphState) -> int:
    groups = products(state, lambda weight: weight.dtype is torch.float32 and weight.device.type == "cpu")
    for members in groups:
        _pack(state, members)
    return sum(map(len, groups))


def _pack(state: GraphState, members: Sequence[Product]) -> None:
    weight = built_input(state, PackSpec(JoinSpec(weight_pieces(members))))
    bias = built_input(state, JoinSpec(bias_pieces(members))) if members[0].bias is not None else None
    args = (members[0].x, weight, bias, sum(m.out_features for m in members))
    joined = state.call(torch.ops.treespec.packed_linear.default, args, like=members[0].node)
    replace_by_slices(state, members, joined)


def _has_kernel(state: GraphState, options: Options) -> bool:
    kernel = best_kernel(ops.packed_linear, state.device, state.dtype)
    return options.kernels == "auto" and kernel is not None


PASS = Pass(
    "fuse",
    pack_linears,
    before="any level from stateful on",
    after="same level; products with constant weights are treespec::packed_linear, one per shared input",
    optional=True,
    needs=("select rows",),
    place_before=("bind kernels",),
    wanted=_has_kernel,
)
