"""The ops of the tree IR. Each module holds one or two: schema, fake and reference, which is the definition."""

from __future__ import annotations

from .accept import greedy_accept
from .attention import tree_attention
from .chosen_attention import tree_chosen_attention
from .commit import commit_path
from .convolution import causal_convolution, tree_convolution
from .exponential_recurrence import exponential_recurrence, tree_exponential_recurrence
from .grouped_linear import grouped_linear
from .linear import pack_weight, packed_bytes, packed_linear, unpack_weight
from .mapping import mapped, unmapped
from .packed_embedding import packed_embedding
from .recurrence import recurrence, tree_recurrence
from .sequence_attention import attention, causal_attention
from .stochastic_accept import stochastic_accept
from .streaming import fetch, release

__all__ = [
    "attention",
    "causal_attention",
    "causal_convolution",
    "commit_path",
    "exponential_recurrence",
    "fetch",
    "greedy_accept",
    "grouped_linear",
    "mapped",
    "pack_weight",
    "packed_bytes",
    "packed_embedding",
    "packed_linear",
    "recurrence",
    "release",
    "stochastic_accept",
    "tree_attention",
    "tree_chosen_attention",
    "tree_convolution",
    "tree_exponential_recurrence",
    "tree_recurrence",
    "unmapped",
    "unpack_weight",
]
