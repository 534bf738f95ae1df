"""`treespec_cpu::*`: the tree ops in C++ for float32. Their schemas exist from import, their code after `load()`."""

from __future__ import annotations

import torch

from treespec_compiler.ir import ops
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload

from .build import begin, load, loaded

NAMESPACE = "treespec_cpu"
OPTIONAL = frozenset({"window", "chunk", "softcap", "slopes", "bias", "sinks"})
"""The optional arguments of tree attention that it takes."""

TREE_ATTENTION: OpOverload = implement(ops.tree_attention, NAMESPACE, None)
PACKED_LINEAR: OpOverload = implement(ops.packed_linear, NAMESPACE, None)
PACKED_EMBEDDING: OpOverload = implement(ops.packed_embedding, NAMESPACE, None)
COMMIT_PATH: OpOverload = implement(ops.commit_path, NAMESPACE, None)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("checksums(Tensor[] x) -> int[]")
CHECKSUMS: OpOverload = torch.ops.treespec_cpu.checksums.default
"""Of each contiguous tensor's bytes; their order matters. No op of the tree IR: graphs do not hold it."""

__all__ = [
    "CHECKSUMS",
    "COMMIT_PATH",
    "OPTIONAL",
    "PACKED_EMBEDDING",
    "PACKED_LINEAR",
    "TREE_ATTENTION",
    "begin",
    "load",
    "loaded",
]
