"""`treespec::recurrence` over one whole sequence, and `treespec::tree_recurrence` over the nodes of trees.

A head's state S [Dk, Dv] begins with zeros, and token t moves it by its decay, its key and what it writes:

    S_t = exp(decay_t) S_(t-1) + k_t w_t^T,    out_t = S_t^T q_t
    w_t = v_t                                        without beta: linear attention, Mamba-2's scalar decays
    w_t = beta_t (v_t - exp(decay_t) S_(t-1)^T k_t)  with beta: the gated delta rule

A decay is a number a head, or one for each of the Dk rows of S (Mamba-1, Kimi's delta attention). What a token writes
depends on its path alone, so a node keeps k, w and decay, and a state moves by an accepted path without any of it being
computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import seen_nodes
from .library import define
from .private_torch import OpOverload
from .state_requests import request_rows

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta) -> Tensor"
TREE_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta, Tensor(a!) stash, Tensor state, Tensor node_offsets, "
    "Tensor prefix_lens, Tensor tree_lens, Tensor ancestors, Tensor state_slots, Tensor state_rows) -> Tensor"
)


def step(state: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """(state [H, Dk, Dv] after a token, what it wrote [H, Dv]); k [H, Dk], v [H, Dv], decay [H, 1 or Dk], beta [H]."""
    state = state * decay.exp()[:, :, None]
    written = v if beta is None else beta[:, None] * (v - torch.einsum("hde,hd->he", state, k))
    return state + k[:, :, None] * written[:, None, :], written


def reference(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> Tensor:
    """q, k [1, T, Hk, Dk], v [1, T, H, Dv], beta [1, T, H] -> [1, T, H, Dv], token by token.

    H is a multiple of Hk: key head h // (H / Hk) is that of head h. `decay`: logarithms [1, T, H] or [1, T, H, Dk].
    """
    heads, decay = v.shape[2], by_row(decay)
    state = v.new_zeros(heads, k.shape[3], v.shape[3])
    q, k = for_every_head(q[0], heads), for_every_head(k[0], heads)
    out = []
    for t in range(v.shape[1]):
        state, _ = step(state, k[t], v[0, t], decay[0, t], None if beta is None else beta[0, t])
        out.append(torch.einsum("hde,hd->he", state, q[t]))
    return torch.stack(out).unsqueeze(0)


def by_row(decay: Tensor) -> Tensor:
    """[1, T, H] or [1, T, H, Dk] -> [1, T, H, 1 or Dk]."""
    return decay.unsqueeze(3) if decay.dim() == 3 else decay


def for_every_head(x: Tensor, heads: int) -> Tensor:
    """[.., Hk, D] -> [.., H, D]."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def unstashed(stash: Tensor, key_heads: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """k [.., Hk, Dk], w [.., H, Dv] and decay [.., H, 1 or Dk] of nodes [.., width]; `shape`: [H, Dk, Dv]."""
    heads, key_dim, value_dim = shape
    first, second = key_heads * key_dim, heads * value_dim
    k, w, decay = stash.split([first, second, stash.shape[-1] - first - second], -1)
    return k.unflatten(-1, (key_heads, key_dim)), w.unflatten(-1, (heads, value_dim)), decay.unflatten(-1, (heads, -1))


def tree_reference(
    q: Tensor,  # [1, T, Hk, Dk], and so is k
    k: Tensor,
    v: Tensor,  # [1, T, H, Dv]
    decay: Tensor,  # [1, T, H] or [1, T, H, Dk]
    beta: Tensor | None,  # [1, T, H]
    stash: Tensor,  # [rows, Hk Dk + H Dv + H or H Dk]: k, w and decay of a node; written
    state: Tensor,  # [slots, H, Dk, Dv]
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
) -> Tensor:  # [1, T, H, Dv]
    """Along each node's path from the committed state; rows of no request give 0."""
    heads, key_heads, decay = v.shape[2], k.shape[2], by_row(decay)
    out = v.new_zeros(v.shape)  # NOTE contiguous, as the fake: zeros_like keeps strides
    for r in request_rows(state, node_offsets, prefix_lens, tree_lens, state_slots, state_rows):
        for i in range(r.begin, r.end):
            node = r.nodes - r.end + i
            now = r.committed.to(v.dtype)
            for each in seen_nodes(ancestors, i, node)[:-1]:
                old, w, g = unstashed(stash[r.rows[each]].to(v.dtype), key_heads, state.shape[1:])
                now, _ = step(now, for_every_head(old, heads), w, g, None)
            key = for_every_head(k[0, i], heads)
            now, w = step(now, key, v[0, i], decay[0, i], None if beta is None else beta[0, i])
            stash[r.rows[node]] = torch.cat([k[0, i].flatten(), w.flatten(), decay[0, i].flatten()]).to(stash.dtype)
            out[0, i] = torch.einsum("hde,hd->he", now, for_every_head(q[0, i], heads))
    return out


def fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return v.new_empty(v.shape)


def advance(state: Tensor, nodes: Tensor, key_heads: int) -> Tensor:
    """state [sites, H, Dk, Dv] after nodes [sites, n, width] of one path were committed.

    S = exp(sum of decays) S + sum_i exp(sum of the decays behind i) k_i w_i^T.
    """
    k, w, decay = unstashed(nodes, key_heads, state.shape[1:])
    behind = decay.flip(1).cumsum(1).flip(1)  # [sites, n, H, 1 or Dk], of the node's own and all behind it
    after = torch.cat([behind[:, 1:], torch.zeros_like(behind[:, :1])], 1).exp()
    written = torch.einsum("snhd,snhe->shde", for_every_head(k, w.shape[2]) * after, w)
    return state * behind[:, 0].exp()[..., None] + written


recurrence: OpOverload = define("recurrence", SCHEMA, reference, fake)
tree_recurrence: OpOverload = define("tree_recurrence", TREE_SCHEMA, tree_reference, fake)
