"""`treespec_aten::tree_exponential_recurrence`: all nodes of a request at once, by one matrix of exponents a head.

Derived in docs/hybrids.md. A long chain into which nothing was run before is cut in blocks, with a state in between.
Waits for the device, once a call, to learn where requests begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.exponential_recurrence import (
    Sums,
    advance,
    stashed,
    unpacked,
    unstashed,
    weight,
    with_ones,
)
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.recurrence import for_every_head
from treespec_compiler.ir.state_requests import request_rows

from .aten_blocks import MOST, node_blocks


@dataclass(frozen=True)
class _Tokens:
    """Of n nodes: k [n, Hk, Dk], v [n, H, Dv], decay and gate [n, H]."""

    k: Tensor
    v: Tensor
    decay: Tensor
    gate: Tensor


def tree_exponential_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    gate: Tensor,
    bonus: Tensor | None,
    stash: Tensor,
    state: Tensor,
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
    from_zero: bool,
) -> Tensor:
    out = v.new_zeros((*v.shape[:3], v.shape[3] + 2))
    wide, (key_heads, key_dim) = torch.promote_types(v.dtype, torch.float32), k.shape[2:]
    for r in request_rows(state, node_offsets, prefix_lens, tree_lens, state_slots, state_rows):
        before = r.committed.to(wide)
        for block in node_blocks(r, ancestors):
            here, behind = block.here, slice(len(block.old), None)
            old = _Tokens(*unstashed(stash[block.old].to(wide), key_heads, key_dim, v.shape[2]))
            new = _Tokens(*(x[0, here].to(wide) for x in (k, v, decay, gate)))
            own = None if bonus is None else bonus[0, here].to(wide)
            nodes, lost = _joined(old, new)
            sums = unpacked(before, key_dim, from_zero)
            out[0, here] = _read(q[0, here].to(wide), nodes, lost, own, sums, block.seen).to(out.dtype)
            marked = nodes.decay[behind].masked_fill(lost[behind, None], torch.nan)
            written = stashed(nodes.k[behind], nodes.v[behind], marked, nodes.gate[behind])
            stash[block.own] = written.to(stash.dtype)
            if not block.ends:
                before = advance(before[None], written[None], key_heads, key_dim, from_zero)[0]
    return out


def _joined(old: _Tokens, new: _Tokens) -> tuple[_Tokens, Tensor]:
    """All of them, and which have something that is not finite: of those nothing goes into any sum, and their decays
    are stashed as NaN."""
    k, v, decay, gate = (torch.cat(pair) for pair in zip(vars(old).values(), vars(new).values(), strict=True))
    forgets = torch.cat([decay, gate], 1)  # minus infinity forgets, or adds, nothing: numbers like others
    lost = (forgets.isnan() | (forgets == torch.inf)).any(1)
    lost = lost | ~k.isfinite().flatten(1).all(1) | ~v.isfinite().flatten(1).all(1)
    wide = lost[:, None, None]
    empty = decay.masked_fill(lost[:, None], 0.0), gate.masked_fill(lost[:, None], 0.0)
    return _Tokens(k.masked_fill(wide, 0.0), v.masked_fill(wide, 0.0), *empty), lost


def _read(q: Tensor, nodes: _Tokens, lost: Tensor, bonus: Tensor | None, state: Sums, seen: Tensor) -> Tensor:
    """[n, H, Dv + 2] of the last n nodes; `seen` [n, all]: the ancestors of each and itself."""
    heads, (sums, largest) = nodes.v.shape[1], state
    values, step, found = with_ones(nodes.v), max(1, MOST // nodes.decay.numel()), []
    own = torch.eye(len(nodes.k), dtype=torch.bool, device=q.device)[-len(q) :]
    for at in range(0, len(q), step):
        here = slice(at, at + step)
        path = seen[here] if bonus is None else seen[here] & ~own[here]
        behind = torch.where(path[..., None], nodes.decay, 0.0).flip(1).cumsum(1).flip(1)  # [rows, all, H]
        after = torch.cat([behind[:, 1:], torch.zeros_like(behind[:, :1])], 1)
        each = torch.where(path[..., None], after + nodes.gate, -torch.inf)
        if bonus is not None:
            each = torch.where(own[here][..., None], bonus[here, None], each)
        faded = behind[:, 0] + largest
        top = torch.maximum(each.amax(1), faded)  # [rows, H]
        products = for_every_head(torch.einsum("ihd,jhd->ijh", q[here], nodes.k)[..., None], heads)[..., 0]
        read = torch.einsum("ijh,jhe->ihe", weight(each, top[:, None]) * products, values)
        before = torch.einsum("ihd,hde->ihe", for_every_head(q[here], heads), sums)
        found.append(torch.cat([read + weight(faded, top)[..., None] * before, top[..., None]], 2))
    return torch.cat(found).masked_fill((seen & lost).any(1)[:, None, None], torch.nan)


TREE_EXPONENTIAL_RECURRENCE: OpOverload = implement(
    ops.tree_exponential_recurrence, "treespec_aten", tree_exponential_recurrence
)
