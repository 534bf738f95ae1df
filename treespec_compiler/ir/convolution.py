"""`treespec::causal_convolution` over one whole sequence, and `treespec::tree_convolution` over the nodes of trees.

Tap j of the kernel reads the token `lag - j * dilation` before each token, and zeros in front of the first one. In a
tree, the token d before a node is its ancestor d levels up, and behind the border the last committed tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import seen_nodes
from .library import define
from .private_torch import OpOverload
from .state_requests import request_rows

SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, int lag, int dilation, int groups) -> Tensor"
TREE_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) stash, Tensor state, Tensor node_offsets, Tensor prefix_lens, "
    "Tensor tree_lens, Tensor ancestors, Tensor state_slots, Tensor state_rows, int lag, int dilation, int groups) "
    "-> Tensor"
)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, lag: int, dilation: int, groups: int) -> Tensor:
    """x [1, C, T], weight [C', C / groups, K] -> [1, C', T]: y[t] = bias + sum_j weight[j] x[t - lag + j * dilation].

    `lag` is at least (K - 1) * dilation: nothing reads ahead. Tokens in front of the first one are zeros.
    """
    padded = F.conv1d(F.pad(x, (lag, 0)), weight, bias, dilation=dilation, groups=groups)
    return padded[..., : x.shape[2]].contiguous()


def tree_reference(
    x: Tensor,  # [1, C, T]
    weight: Tensor,  # [C', C / groups, K]
    bias: Tensor | None,  # [C']
    stash: Tensor,  # [rows, C], written
    state: Tensor,  # [slots, lag, C]: the last committed tokens, the newest last
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
    lag: int,
    dilation: int,
    groups: int,
) -> Tensor:  # [1, C', T]
    """Keep the new nodes' x in the stash, then convolve along each node's path; rows of no request give 0."""
    out = fake(x, weight).zero_()
    for r in request_rows(state, node_offsets, prefix_lens, tree_lens, state_slots, state_rows):
        stash[r.rows[r.old :]] = x[0, :, r.begin : r.end].T.to(stash.dtype)
        for i in range(r.begin, r.end):
            path = seen_nodes(ancestors, i, r.nodes - r.end + i)
            before = torch.cat([r.committed, stash[r.rows[path]]]).to(x.dtype)  # [lag + depth + 1, C]
            window = before[len(before) - 1 - lag :: dilation][: weight.shape[2]]  # [K, C]
            out[0, :, i] = F.conv1d(window.T.unsqueeze(0), weight, bias, groups=groups)[0, :, 0]
    return out


def fake(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(1, weight.shape[0], x.shape[2])


def advance(state: Tensor, nodes: Tensor) -> Tensor:
    """state [sites, lag, C] after these nodes [sites, n, C] of one path were committed."""
    return torch.cat([state, nodes], 1)[:, -state.shape[1] :]


causal_convolution: OpOverload = define("causal_convolution", SCHEMA, reference, fake)
tree_convolution: OpOverload = define("tree_convolution", TREE_SCHEMA, tree_reference, fake)
