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
from treespec_compiler.ir.recurrence import advance, for_every_head, unstashed

from .aten import topology

BLOCK = 64
"""Nodes of a chain that are solved together: the work grows with the square."""


@dataclass(frozen=True)
class _Nodes:
    """Of n nodes: k [n, Hk, Dk], v or w [n, H, Dv], decay [n, H]."""

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
    out = torch.zeros_like(v)
    wide = torch.promote_types(v.dtype, torch.float32)
    bounds, first = node_offsets.tolist(), 0
    slots, prefixes, lengths = state_slots.tolist(), prefix_lens.tolist(), tree_lens.tolist()
    for r, (slot, prefix, nodes) in enumerate(zip(slots, prefixes, lengths, strict=True)):
        begin, end = bounds[r], bounds[r + 1]
        rows = state_rows[first : first + nodes]
        first += nodes
        if begin == end:
            continue
        before = (state[slot] if prefix else torch.zeros_like(state[slot])).to(wide)
        whole = not ancestors.shape[1] and end - begin == nodes  # a chain, all of it new
        size = BLOCK if whole else end - begin
        for at in range(begin, end, size):
            here = slice(at, min(at + size, end))
            kept = rows[: nodes - (end - begin)]
            old = _Nodes(*unstashed(stash[kept].to(wide), k.shape[2], before.shape))
            new = _Nodes(k[0, here].to(wide), v[0, here].to(wide), decay[0, here].to(wide))
            path = ancestors[here] if not whole else ancestors.new_empty(here.stop - at, 0)
            seen = topology(path, len(kept) + here.stop - at).bool()
            rates = None if beta is None else beta[0, here].to(wide)
            found, written = _solved(q[0, here].to(wide), new, rates, old, before, seen)
            out[0, here] = found.to(out.dtype)
            own = rows[nodes - end + at : nodes - end + here.stop]
            stash[own] = written.to(stash.dtype)
            if here.stop < end:
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
    parts = [new.k, new.v, new.decay] + ([] if beta is None else [beta])
    bad = torch.stack([~(p.isfinite() | (p == -torch.inf)).flatten(1).all(1) for p in parts]).any(0)
    lost = torch.cat([old.decay.isnan().any(1), bad | new.decay.isnan().any(1)])
    k = torch.cat([old.k, new.k]).masked_fill(lost[:, None, None], 0.0)
    v = new.v.masked_fill(lost[m:, None, None], 0.0)
    decay = torch.cat([old.decay, new.decay]).masked_fill(lost[:, None], 0.0)
    rate = None if beta is None else beta.masked_fill(lost[m:, None], 0.0)

    behind = torch.where(seen[..., None], decay, 0.0).flip(1).cumsum(1).flip(1)  # [n, m + n, H]
    after = torch.cat([behind[:, 1:], torch.zeros_like(behind[:, :1])], 1)
    decayed = torch.where(seen[..., None], after.exp(), 0.0)  # from a node's write to the other node
    since = behind[:, 0].exp()  # [n, H], from the border

    wide_k = for_every_head(k, heads)
    written = v
    if rate is not None:
        alike = _products(new.k.masked_fill(lost[m:, None, None], 0.0), k, heads) * decayed  # [n, m + n, H]
        target = v - since[..., None] * torch.einsum("nhd,hde->nhe", wide_k[m:], state)
        target = target - torch.einsum("ijh,jhe->ihe", alike[:, :m], old.v)
        system = (rate[:, None] * alike[:, m:]).permute(2, 0, 1).tril(-1)  # [H, n, n]
        wanted = (rate[..., None] * target).transpose(0, 1)  # [H, n, Dv]
        written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True).transpose(0, 1)
    read = _products(q, k, heads) * decayed
    out = since[..., None] * torch.einsum("nhd,hde->nhe", for_every_head(q, heads), state)
    out = out + torch.einsum("ijh,jhe->ihe", read, torch.cat([old.v, written]))
    out = out.masked_fill((seen & lost).any(1)[:, None, None], torch.nan)
    marked = decay[m:].masked_fill(lost[m:, None], torch.nan)
    return out, torch.cat([k[m:].flatten(1), written.flatten(1), marked], 1)


def _products(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """[n, Hk, D], [m, Hk, D] -> [n, m, H]."""
    found = torch.einsum("ihd,jhd->ijh", a, b)
    return found if found.shape[2] == heads else found.repeat_interleave(heads // found.shape[2], 2)


TREE_RECURRENCE: OpOverload = implement(ops.tree_recurrence, "treespec_aten", tree_recurrence)
