"""`treespec_aten::tree_convolution`: a gather of ancestors, then one product, on any device and in any float dtype.

Waits for the device, once a call, to learn where requests begin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.convolution import fake
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.state_requests import request_rows

from .aten import topology


def tree_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stash: Tensor,
    state: Tensor,
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
    lag: int,
    dilation: int,
    groups: int,
) -> Tensor:
    out = fake(x, weight)
    bounds = node_offsets.tolist()
    out[..., : bounds[0]] = 0
    out[..., bounds[-1] :] = 0
    new, width = x[0].T, weight.shape[2]  # [T, C]
    for r in request_rows(state, node_offsets, prefix_lens, tree_lens, state_slots, state_rows):
        here = slice(r.begin, r.end)
        stash[r.rows[r.old :]] = new[here].to(stash.dtype)
        before = torch.cat([r.committed, stash[r.rows]])  # [lag + nodes, C]
        taken = taps(ancestors[here], r.nodes, lag, dilation, width)
        out[0, :, here] = _product(before[taken].to(x.dtype), weight, bias, groups).T
    return out


def taps(ancestors: Tensor, nodes: int, lag: int, dilation: int, width: int) -> Tensor:
    """[n, width]: what each tap of one request's n new nodes reads, as a place behind `lag` committed tokens."""
    distances = torch.arange(lag, -1, -dilation, device=ancestors.device)[:width]
    if not ancestors.shape[1]:  # a chain
        own = torch.arange(nodes - len(ancestors), nodes, device=ancestors.device)
        return lag + own[:, None] - distances
    tree = topology(ancestors, nodes)
    depths = tree.sum(1, keepdim=True) - 1
    order = tree * torch.arange(1, nodes + 1, device=ancestors.device)
    most = min(lag + 1, nodes)
    up = order.topk(most, 1).values - 1  # column d: the ancestor d levels up, where there is one
    there = up[:, distances.clamp(max=most - 1)]
    return torch.where(distances <= depths, lag + there, lag + depths - distances)


def _product(window: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """window [n, K, C], weight [C', C / groups, K] -> [n, C']."""
    if groups != window.shape[2] or groups != weight.shape[0]:
        return F.conv1d(window.transpose(1, 2), weight, bias, groups=groups).squeeze(2)
    wide = torch.promote_types(window.dtype, torch.float32)
    found = (window.to(wide) * weight.squeeze(1).T.to(wide)).sum(1)
    return (found if bias is None else found + bias.to(wide)).to(window.dtype)


TREE_CONVOLUTION: OpOverload = implement(ops.tree_convolution, "treespec_aten", tree_convolution)
