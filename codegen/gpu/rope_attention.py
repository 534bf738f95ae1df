"""`treespec_triton::rope_tree_attention` and its scored sister: one launch that rotates and appends, then `attend`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from treespec_compiler.ir import attention, rope_attention

from .append import rope_append
from .tree_attention import attend_stored


def rope_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, pool_k: Tensor, pool_v: Tensor, positions: Tensor, write_index: Tensor, *args: Any
) -> Tensor:
    """`args`: the rest of the schema of the op, plain or scored."""
    *rest, cos, sin, style, rotary = args
    q = rope_append(q, k, v, pool_k, pool_v, write_index, cos, sin, style, rotary)
    return attend_stored(q, pool_k, pool_v, positions, write_index, *rest)


_library = torch.library.Library("treespec_triton", "FRAGMENT")
for _name, _schema in (
    ("rope_tree_attention", rope_attention.SCHEMA),
    ("rope_scored_tree_attention", rope_attention.SCORED_SCHEMA),
):
    _library.define(_name + _schema, tags=attention.TAGS)
    _library.impl(_name, rope_tree_attention, "CompositeExplicitAutograd")
    torch.library.register_fake(f"treespec_triton::{_name}", rope_attention.fake, lib=_library)

ROPE_TREE_ATTENTION: OpOverload = torch.ops.treespec_triton.rope_tree_attention.default
ROPE_SCORED_TREE_ATTENTION: OpOverload = torch.ops.treespec_triton.rope_scored_tree_attention.default
