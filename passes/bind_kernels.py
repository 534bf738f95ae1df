"""bind kernels: each treespec op gets the best implementation the registry has, or stays on its reference."""

from __future__ import annotations

from typing import Any

from treespec_compiler.ir.library import definition
from treespec_compiler.ir.registry import best_kernel_for
from treespec_compiler.logs import logger

from .framework.manager import Pass
from .framework.state import GraphState

log = logger(__name__)


def bind_kernels(state: GraphState) -> int:
    matches = 0
    for node in state.graph.nodes:
        if definition(node.target) is node.target and node.op == "call_function":
            kernel = best_kernel_for(node, portable=state.portable)
            if kernel is None:
                value: Any = node.meta["val"]
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
