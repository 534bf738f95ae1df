"""fuse: linears on constant weights become packed skinny products; linears that share their input become one.

Decoding multiplies few rows by large matrices, so the weight is read once, in the order the kernel wants it, and
q/k/v or gate/up projections are one product whose result is split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from treespec_compiler.ir import ops
from treespec_compiler.ir.device import profile
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.ir.weights import Pack
from treespec_compiler.options import Options

from .framework.manager import Pass
from .framework.state import GraphState
from .spellings.products import Product, joined_bias, joined_weight, products, replace_by_slices


def pack_linears(state: GraphState) -> int:
    groups = products(state, lambda weight: weight.dtype in profile(weight.device).packs)
    for members in groups:
        _pack(state, members)
    return sum(map(len, groups))


def _pack(state: GraphState, members: Sequence[Product]) -> None:
    made, joined = Pack(joined_weight(members)), joined_bias(members)
    weight = state.add_weight("packed", made)
    bias = state.add_weight("packed", joined) if joined is not None else None
    args = (members[0].x, weight, bias, sum(m.out_features for m in members))
    product = state.call(torch.ops.treespec.packed_linear.default, args, like=members[0].node)
    replace_by_slices(state, members, product)


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
