"""The ops of the tree IR. Each module holds one: its schema, its fake and its reference, which is the definition."""

from __future__ import annotations

from treespec_compiler.ir.accept import greedy_accept
from treespec_compiler.ir.attention import tree_attention
from treespec_compiler.ir.commit import commit_path
from treespec_compiler.ir.grouped_linear import grouped_linear
from treespec_compiler.ir.linear import pack_weight, packed_bytes, packed_linear, unpack_weight
from treespec_compiler.ir.rope_attention import rope_scored_tree_attention, rope_tree_attention
from treespec_compiler.ir.scored_attention import scored_tree_attention
from treespec_compiler.ir.stochastic_accept import stochastic_accept

__all__ = [
    "commit_path",
    "greedy_accept",
    "grouped_linear",
    "pack_weight",
    "packed_bytes",
    "packed_linear",
    "rope_scored_tree_attention",
    "rope_tree_attention",
    "scored_tree_attention",
    "stochastic_accept",
    "tree_attention",
    "unpack_weight",
]
