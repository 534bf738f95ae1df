"""The ops of the tree IR. Each module holds one: its schema, its fake and its reference, which is the definition."""

from __future__ import annotations

from .accept import greedy_accept
from .attention import tree_attention
from .commit import commit_path
from .grouped_linear import grouped_linear
from .linear import pack_weight, packed_bytes, packed_linear, unpack_weight
from .rope_attention import rope_scored_tree_attention, rope_tree_attention
from .scored_attention import scored_tree_attention
from .stochastic_accept import stochastic_accept

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
