"""bind kernels: each treespec op gets the best implementation the registry has, or stays on its reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.logs import logger

from .framework.manager import Pass
from .framework.state import GraphState

log = logger(__name__)

_OPS = (
    ops.tree_attention,
    ops.scored_tree_attention,
    ops.rope_tree_attention,
    ops.rope_scored_tree_attention,
    ops.packed_linear,
    ops.grouped_linear,
)


def bind_kernels(state: GraphState) -> int:
    matches = 0
    for node in state.graph.nodes:
        if node.target in _OPS:
            value: Any = node.meta["val"]
            assert isinstance(value, Tensor)
            kernel = best_kernel(node.target, value.device, value.dtype, portable=state.portable)
            if kernel is None:
                log.warning("%s: no kernel for %s on %s, the reference runs", node.target, value.dtype, value.device)
                continue
            node.target = kernel.target
            matches += 1
    return matches


PASS = Pass(
    "bind kernels",
    bind_kernels,
    before="rows are selected",
    after="each treespec op is a kernel of the registry, or its reference",
    level="bound",
    optional=True,
    needs=("select rows",),
    wanted=lambda state, options: options.kernels != "reference",
)
