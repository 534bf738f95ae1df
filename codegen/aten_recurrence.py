"""`treespec_aten::tree_recurrence`: all nodes of a request at once, by one unit-triangular solve a head.

Derived in docs/hybrids.md. A long chain into which nothing was run before is cut in blocks, with a state in between.
Waits for the device, once a call, to learn where requests begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.recurrence import advance, by_row, for_every_head, unstashed
from treespec_compiler.ir.state_requests import request_rows

from .aten_blocks import MOST, node_blocks


@dataclass(frozen=True)
class _Nodes:
    """Of n nodes: k [n, Hk, Dk], v or w [n, H, Dv], decay [n, H, 1 or Dk]."""

    k: Tensor
    v: Tensor
    decay: Tensor


def tree_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    stash: Tensor,
    state: Tensor,
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
) -> Tensor:
    out, decay = v.new_zeros(v.shape), by_row(decay)  # NOTE contiguous, as the fake: zeros_like keeps strides
    wide = torch.promote_types(v.dtype, torch.float32)
    for r in request_rows(state, node_offsets, prefix_lens, tree_lens, state_slots, state_rows):
        before = r.committed.to(wide)
        for block in node_blocks(r, ancestors):
            here = block.here
            old = _Nodes(*unstashed(stash[block.old].to(wide), k.shape[2], before.shape))
            new = _Nodes(k[0, here].to(wide), v[0, here].to(wide), decay[0, here].to(wide))
            rates = None if beta is None else beta[0, here].to(wide)
            found, written = _solved(q[0, here].to(wide), new, rates, old, before, block.seen)
            out[0, here] = found.to(out.dtype)
            stash[block.own] = written.to(stash.dtype)
            if not block.ends:
                before = advance(before[None], written[None], k.shape[2])[0]
    return out


def _solved(
    q: Tensor, new: _Nodes, beta: Tensor | None, old: _Nodes, state: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """(out [n, H, Dv], what is stashed [n, width]) of n new nodes behind m old ones.

    `seen` [n, m + n]: the ancestors of each and itself. What is not finite at one node makes those NaN that see it, and
    no others: it is left out of all sums, and its decay is stashed as NaN.
    """
    heads, m = new.v.shape[1], len(old.k)
    parts = [new.k, new.v] + ([] if beta is None else [beta])
    bad = torch.stack([~p.isfinite().flatten(1).all(1) for p in parts]).any(0)
    odd = torch.cat([old.decay, new.decay]).flatten(1)  # -inf forgets everything, and is a decay like others
    lost = (odd.isnan() | (odd == torch.inf)).any(1)
    lost[m:] |= bad
    k = torch.cat([old.k, new.k]).masked_fill(lost[:, None, None], 0.0)
    v = new.v.masked_fill(lost[m:, None, None], 0.0)
    decay = torch.cat([old.decay, new.decay]).masked_fill(lost[:, None, None], 0.0)
    rate = None if beta is None else beta.masked_fill(lost[m:, None], 0.0)

    keys = k[m:] if rate is not None else None
    alike, read, since = _pairs(q, keys, k, decay, seen, heads)
    wide_k, wide_q, written = for_every_head(k[m:], heads), for_every_head(q, heads), v
    if rate is not None:
        target = v - torch.einsum("nhd,hde->nhe", wide_k * since, state)
        target = target - torch.einsum("ijh,jhe->ihe", alike[:, :m], old.v)
        system = (rate[:, None] * alike[:, m:]).permute(2, 0, 1).tril(-1)  # [H, n, n]
        wanted = (rate[..., None] * target).transpose(0, 1)  # [H, n, Dv]
        written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True).transpose(0, 1)
    out = torch.einsum("nhd,hde->nhe", wide_q * since, state)
    out = out + torch.einsum("ijh,jhe->ihe", read, torch.cat([old.v, written]))
    out = out.masked_fill((seen & lost).any(1)[:, None, None], torch.nan)
    marked = decay[m:].masked_fill(lost[m:, None, None], torch.nan)
    return out, torch.cat([k[m:].flatten(1), written.flatten(1), marked.flatten(1)], 1)


def _pairs(
    q: Tensor, keys: Tensor | None, k: Tensor, decay: Tensor, seen: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(decayed products of `keys` with k, and of q with k, [n, all, H]; decays from the border [n, H, 1 or Dk]).

    Decays between two nodes are added up over the path from one to the other, and are never a difference of sums.
    """
    rows = max(1, MOST // decay.numel())
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for at in range(0, len(q), rows):
        here = slice(at, at + rows)
        path = seen[here, :, None, None]
        behind = torch.where(path, decay, 0.0).flip(1).cumsum(1).flip(1)  # [rows, all, H, 1 or Dk]
        after = torch.cat([behind[:, 1:], torch.zeros_like(behind[:, :1])], 1)
        decayed = torch.where(path, after.exp(), 0.0)
        read = _products(q[here], k, decayed, heads)
        alike = read if keys is None else _products(keys[here], k, decayed, heads)
        found.append((alike, read, behind[:, 0].exp()))
    alike, read, since = (torch.cat(parts) for parts in zip(*found, strict=True))
    return alike, read, since


def _products(a: Tensor, b: Tensor, decayed: Tensor, heads: int) -> Tensor:
    """a [n, Hk, Dk], b [m, Hk, Dk], decayed [n, m, H, 1 or Dk] -> sums over Dk [n, m, H]."""
    if decayed.shape[3] == 1:
        found = torch.einsum("ihd,jhd->ijh", a, b)
        wide = found if found.shape[2] == heads else found.repeat_interleave(heads // found.shape[2], 2)
        return wide * decayed[..., 0]
    return torch.einsum("ihd,ijhd->ijh", for_every_head(a, heads), decayed * for_every_head(b, heads))


TREE_RECURRENCE: OpOverload = implement(ops.tree_recurrence, "treespec_aten", tree_recurrence)
