"""`treespec_cpu::*`: the tree ops in C++ for float32. Their schemas exist from import, their code after `load()`."""

from __future__ import annotations

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.encoders import register_encoder
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
_library.define("encoded(Tensor weight, int bits, bool minimum, int[] levels) -> Tensor")
CHECKSUMS: OpOverload = torch.ops.treespec_cpu.checksums.default
"""Of each contiguous tensor's bytes; their order matters. No op of the tree IR: graphs do not hold it."""


def _encoded(weight: Tensor, bits: int, minimum: bool, levels: list[tuple[int, int]]) -> Tensor | None:
    if not loaded() or not weight.numel():
        return None
    flat = [level for pair in levels for level in pair]
    found: Tensor = torch.ops.treespec_cpu.encoded(weight.detach().contiguous(), bits, minimum, flat)
    return found if found.numel() else None


register_encoder("cpu", _encoded)

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
