"""`treespec_cpu::*`: the tree ops in C++ for float32. Their schemas exist from import, their code after `load()`."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from treespec_compiler.ir import attention, commit, linear

from .build import load, loaded

_library = torch.library.Library("treespec_cpu", "FRAGMENT")
for _name, _module in (("tree_attention", attention), ("packed_linear", linear), ("commit_path", commit)):
    _library.define(_name + _module.SCHEMA, tags=_module.TAGS)
    torch.library.register_fake(f"treespec_cpu::{_name}", _module.fake, lib=_library)

TREE_ATTENTION: OpOverload = torch.ops.treespec_cpu.tree_attention.default
PACKED_LINEAR: OpOverload = torch.ops.treespec_cpu.packed_linear.default
COMMIT_PATH: OpOverload = torch.ops.treespec_cpu.commit_path.default

_library.define("checksums(Tensor[] x) -> int[]")
CHECKSUMS: OpOverload = torch.ops.treespec_cpu.checksums.default
"""Of each contiguous tensor's bytes; their order matters."""

__all__ = ["CHECKSUMS", "COMMIT_PATH", "PACKED_LINEAR", "TREE_ATTENTION", "load", "loaded"]
