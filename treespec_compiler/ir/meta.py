"""What a tree-verification graph must know besides tokens, as tensors only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TreeMeta:
    """T new nodes of R requests; all int64, on the pools' device. P pages per slot, W words of 64 nodes.

    Two widths of 0 say what only the host knows, so that prompts need no words and their kernels nothing read back.
    W = 0: every request's nodes are a chain, node j the parent of node j + 1. P = 0: there is one request, its slot is
    empty and all its nodes are new, so their keys are where `write_index` puts them.
    """

    positions: Tensor  # [T]    prefix length of the node's request + node depth
    write_index: Tensor  # [T]    where this node's K/V goes: page * page_size + offset; < 0: nowhere
    node_offsets: Tensor  # [R+1]  rows node_offsets[r]:node_offsets[r+1] are request r's new nodes
    page_table: Tensor  # [R, P] pages of request r's slot; today P = 1, page = slot
    prefix_lens: Tensor  # [R]    committed tokens
    tree_lens: Tensor  # [R]    M_r: uncommitted nodes, new ones included, at offsets prefix_len .. prefix_len + M_r - 1
    ancestors: Tensor  # [T, W] bit (j % 64) of word (j // 64) of row i: node j is an ancestor of node i, or i itself
    rows: Tensor  # [rows] which of the T nodes' logits are wanted (not an input of attention)

    def attention_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The metadata arguments of `treespec::tree_attention`, in the order of its schema."""
        return (
            self.positions,
            self.write_index,
            self.node_offsets,
            self.page_table,
            self.prefix_lens,
            self.tree_lens,
            self.ancestors,
        )
