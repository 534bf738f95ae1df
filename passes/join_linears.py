"""join linears: linears of constant weights that share their input become one, whose result is split.

A GPU's step launches a product less for each that is joined, and k's and v's alone are too small to read memory at
full speed. The joined weights are copies beside the module's own (`TreeProgram.packed_bytes`), so this runs where a
pipeline names it. On a CPU, pass "fuse" does it.
"""

from __future__ import annotations

import torch

from .framework.manager import Pass
from .framework.state import GraphState
from .spellings.products import joined_bias, joined_weight, products, replace_by_slices

aten = torch.ops.aten


def join_linears(state: GraphState) -> int:
    groups = [members for members in products(state, lambda weight: weight.dtype.is_floating_point) if len(members) > 1]
    for members in groups:
        first = members[0]
        weight, joined = state.add_weight("packed", joined_weight(members)), joined_bias(members)
        bias = state.add_weight("packed", joined) if joined is not None else None
        product = state.call(aten.linear.default, (first.x, weight, bias), like=first.node)
        replace_by_slices(state, members, product)
    return sum(map(len, groups))


PASS = Pass(
    "join linears",
    join_linears,
    before="rows are selected",
    after="same level; products of one input with constant weights are one product",
    optional=True,
    needs=("select rows",),
    place_before=("bind kernels",),
    standard=False,
)
