"""The inputs of a tree graph besides weights: one table, which passes, lowering, batches and views read.

Sizes are symbols, so that no length, tree or cache makes another program: `T` new nodes of `requests` requests, of
which logits are wanted for `rows`; ancestors in `words` of 64 nodes; a request's slot is `slot_pages` of the `pages`
that a pool has. The batch lies in the forest: dimension 0 of a model's own values is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SYMBOLS = frozenset({
    "T", "requests", "requests + 1", "rows", "words", "slot_pages", "pages", "page_size",
    "state_requests", "state_nodes", "state_slots", "stash_rows",
})  # fmt: skip


@dataclass(frozen=True)
class Input:
    """A tensor that every call gives anew."""

    name: str
    dims: tuple[str, ...]
    """A symbol of `SYMBOLS` where any size may come, else what fixes the size."""
    meaning: str
    attention: bool = False
    """Whether tree attention reads it."""
    state: bool = False
    """Whether ops with a state (`ir.states`) read it."""
    dtype: torch.dtype | None = torch.int64
    """None: the model's."""

    @property
    def symbols(self) -> dict[int, str]:
        """Dimensions of any size: dimension -> symbol."""
        return {i: dim for i, dim in enumerate(self.dims) if dim in SYMBOLS}

    def sizes(self, of: Mapping[str, Any]) -> list[Any]:
        """The shape where the symbols have these sizes."""
        return [int(dim) if dim.isdecimal() else of[dim] for dim in self.dims]


# In the order of a call's integers (`program.batch`); those of attention are in the order of its schema.
INPUTS: tuple[Input, ...] = (
    Input("tokens", ("1", "T"), "the new nodes of all trees, side by side"),
    Input("positions", ("T",), "committed tokens of the request + depth of the node", attention=True),
    Input("write_index", ("T",), "where the node's K/V goes in the pools", attention=True),
    Input("node_offsets", ("requests + 1",), "where each request's nodes start", attention=True, state=True),
    Input("page_table", ("requests", "slot_pages"), "pages of each request's slot", attention=True),
    Input("prefix_lens", ("requests",), "committed tokens of each request", attention=True, state=True),
    Input("tree_lens", ("requests",), "uncommitted nodes of each request", attention=True, state=True),
    Input("rows", ("rows",), "nodes whose logits are wanted"),
    Input("ancestors", ("T", "words"), "a row a node, a bit an ancestor", attention=True, state=True),
    Input("state_slots", ("state_requests",), "slot of each request; empty in programs without states", state=True),
    Input("state_rows", ("state_nodes",), "where the requests' nodes lie in stashes, all of them", state=True),
)
BY_NAME: Mapping[str, Input] = {each.name: each for each in INPUTS}
TOKENS, POSITIONS, ROWS = "tokens", "positions", "rows"
ATTENTION: tuple[str, ...] = tuple(each.name for each in INPUTS if each.attention)
STATE: tuple[str, ...] = tuple(each.name for each in INPUTS if each.state)

POOL = Input("pool", ("pages", "kv_heads", "page_size", "dim"), "K and V of each site, written in place", dtype=None)
_POOL_PREFIX = "pool_"


def pool_names(site: int, indexed: bool = False) -> tuple[str, ...]:
    """The inputs that hold a site's K and V, and `indexed` its indexer's keys."""
    return tuple(f"{_POOL_PREFIX}{kind}_{site}" for kind in ("k", "v", "index")[: 2 + indexed])


def is_pool(name: str) -> bool:
    """Whether an input of this name is a pool."""
    return name.startswith(_POOL_PREFIX)


STREAM = Input("stream", ("1", "T", "width"), "what the stage before gives for the new nodes", dtype=None)

STASH = Input("stash", ("stash_rows", "width"), "of each uncommitted node, by site; written in place", dtype=None)
COMMITTED = Input("committed", ("state_slots", ".."), "of each slot's committed tokens, by site", dtype=None)
_STASH_PREFIX, _COMMITTED_PREFIX = "state_stash_", "state_committed_"


def state_names(site: int) -> tuple[str, str]:
    """The inputs that hold a site's stash and its committed state."""
    return f"{_STASH_PREFIX}{site}", f"{_COMMITTED_PREFIX}{site}"


def is_state(name: str) -> bool:
    """Whether an input of this name is a stash or a committed state."""
    return name.startswith((_STASH_PREFIX, _COMMITTED_PREFIX))


def input_of(name: str) -> Input | None:
    """What the table says of an input; None: it is a weight."""
    if is_state(name):
        return STASH if name.startswith(_STASH_PREFIX) else COMMITTED
    if name == STREAM.name:
        return STREAM
    return POOL if is_pool(name) else BY_NAME.get(name)


@dataclass(frozen=True)
class TreeMeta:
    """What a tree graph must know besides tokens: T new nodes of R requests; all int64, on the pools' device.

    Two widths of 0 say what only the host knows, so that prompts need no words and their kernels nothing read back.
    words = 0: every request's nodes are a chain, node j the parent of node j + 1. slot_pages = 0: there is one request,
    its slot is empty and all its nodes are new, so their keys are where `write_index` puts them.
    """

    positions: Tensor  # prefix length of the node's request + node depth
    write_index: Tensor  # where this node's K/V goes: page * page_size + offset; < 0: nowhere
    node_offsets: Tensor  # rows node_offsets[r]:node_offsets[r+1] are request r's new nodes
    page_table: Tensor  # pages of request r's slot, as many as its tokens need; any numbers behind those
    prefix_lens: Tensor  # committed tokens
    tree_lens: Tensor  # M_r: uncommitted nodes, new ones included, at offsets prefix_len .. prefix_len + M_r - 1
    rows: Tensor  # which of the T nodes' logits are wanted
    ancestors: Tensor  # bit (j % 64) of word (j // 64) of row i: node j is an ancestor of node i, or i itself
    state_slots: Tensor  # slot of each request; without states in the program, of no request
    state_rows: Tensor  # the rows of stashes of request 0's tree_lens[0] nodes, then request 1's; none without states
