"""`treespec::exponential_recurrence` over one whole sequence, and `treespec::tree_exponential_recurrence` over trees.

Sums whose weights are exponentials of gates that no number bounds (RWKV's time mixing, xLSTM's mLSTM): a head keeps
them divided by exp(m), where m is the largest exponent so far. A head's sums S [Dk, Dv + 1] begin with zeros, their
last column sums the weights alone, and token t does

    m_t = max(m_(t-1) + decay_t, gate_t)
    S_t = exp(m_(t-1) + decay_t - m_t) S_(t-1) + exp(gate_t - m_t) k_t [v_t, 1]^T        out_t = [S_t^T q_t, m_t]

With a bonus, what is read is not S_t but the sums before, and the token's own pair at that weight:

    o_t = max(m_(t-1), bonus_t)
    O_t = exp(m_(t-1) - o_t) S_(t-1) + exp(bonus_t - o_t) k_t [v_t, 1]^T                 out_t = [O_t^T q_t, o_t]

m begins with 0 (`from_zero`) or with minus infinity. The model divides; what it divides by may read m, as mLSTM's does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import seen_nodes
from .library import define
from .private_torch import OpOverload
from .recurrence import for_every_head
from .state_requests import request_rows

OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor decay, Tensor gate, Tensor? bonus"
SCHEMA = f"({OPERANDS}, bool from_zero) -> Tensor"
TREE_SCHEMA = (
    f"({OPERANDS}, Tensor(a!) stash, Tensor state, Tensor node_offsets, Tensor prefix_lens, Tensor tree_lens, "
    "Tensor ancestors, Tensor state_slots, Tensor state_rows, bool from_zero) -> Tensor"
)


def weight(exponent: Tensor, largest: Tensor) -> Tensor:
    """exp(exponent - largest), and 0 for minus infinity whatever the largest is."""
    return torch.where(exponent == -torch.inf, 0.0, torch.exp(exponent - largest))


def with_ones(v: Tensor) -> Tensor:
    """[.., Dv] -> [.., Dv + 1]."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def state_size(key_dim: int, value_dim: int) -> int:
    """Numbers a head: sums, the largest exponent, and 1 once there was a token."""
    return key_dim * (value_dim + 1) + 2


def unpacked(state: Tensor, key_dim: int, from_zero: bool) -> tuple[Tensor, Tensor]:
    """(sums [.., H, Dk, Dv + 1], largest [.., H]) of a state [.., H, size]; zeros are that of no tokens."""
    sums, largest, begun = state[..., :-2].unflatten(-1, (key_dim, -1)), state[..., -2], state[..., -1]
    return sums, largest if from_zero else torch.where(begun == 0, -torch.inf, largest)


def packed(sums: Tensor, largest: Tensor) -> Tensor:
    """The state [.., H, size] of `unpacked`'s two."""
    return torch.cat([sums.flatten(-2), largest[..., None], torch.ones_like(largest)[..., None]], -1)


def unstashed(stash: Tensor, key_heads: int, key_dim: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k [.., Hk, Dk], v [.., H, Dv], decay and gate [.., H] of nodes [.., width]."""
    first = key_heads * key_dim
    k, v, gates = stash[..., :first], stash[..., first : -2 * heads], stash[..., -2 * heads :]
    return k.unflatten(-1, (key_heads, key_dim)), v.unflatten(-1, (heads, -1)), gates[..., :heads], gates[..., heads:]


def stashed(k: Tensor, v: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
    """[n, width] of k [n, Hk, Dk], v [n, H, Dv], decay and gate [n, H]."""
    return torch.cat([k.flatten(1), v.flatten(1), decay, gate], 1)


Sums = tuple[Tensor, Tensor]
"""[H, Dk, Dv + 1] and [H]."""


def step(before: Sums, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor) -> Sums:
    """After a token; k [H, Dk], v [H, Dv], decay and gate [H]."""
    faded = before[1] + decay
    largest = torch.maximum(faded, gate)
    added = k[:, :, None] * with_ones(v)[:, None]
    return before[0] * weight(faded, largest)[:, None, None] + weight(gate, largest)[:, None, None] * added, largest


def read(before: Sums, after: Sums, q: Tensor, k: Tensor, v: Tensor, bonus: Tensor | None) -> Tensor:
    """[H, Dv + 2] of a token."""
    zero = torch.zeros_like(after[1])
    sums, largest = after if bonus is None else step(before, k, v, zero, bonus)
    return torch.cat([torch.einsum("hde,hd->he", sums, q), largest[:, None]], 1)


def reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor, bonus: Tensor | None, from_zero: bool
) -> Tensor:
    """q, k [1, T, Hk, Dk], v [1, T, H, Dv], decay, gate and bonus [1, T, H] -> [1, T, H, Dv + 2], token by token."""
    heads = v.shape[2]
    sums = v.new_zeros(heads, k.shape[3], v.shape[3] + 1)
    now = (sums, v.new_full((heads,), 0.0 if from_zero else -torch.inf))
    q, k = for_every_head(q[0], heads), for_every_head(k[0], heads)
    out = []
    for t in range(v.shape[1]):
        before, now = now, step(now, k[t], v[0, t], decay[0, t], gate[0, t])
        out.append(read(before, now, q[t], k[t], v[0, t], None if bonus is None else bonus[0, t]))
    return torch.stack(out).unsqueeze(0)


def tree_reference(
    q: Tensor,  # [1, T, Hk, Dk], and so is k
    k: Tensor,
    v: Tensor,  # [1, T, H, Dv]
    decay: Tensor,  # [1, T, H], and so are gate and bonus
    gate: Tensor,
    bonus: Tensor | None,
    stash: Tensor,  # [rows, Hk Dk + H Dv + 2 H]: k, v, decay and gate of a node; written
    state: Tensor,  # [slots, H, `state_size`]
    node_offsets: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    state_slots: Tensor,
    state_rows: Tensor,
    from_zero: bool,
) -> Tensor:  # [1, T, H, Dv + 2]
    """Along each node's path from the committed state; rows of no request give 0."""
    heads, key_heads, key_dim = v.shape[2], *k.shape[2:]
    out = fake(q, k, v).zero_()
    for r in request_rows(state, node_offsets, prefix_lens, tree_lens, state_slots, state_rows):
        stash[r.rows[r.old :]] = stashed(*(x[0, r.begin : r.end] for x in (k, v, decay, gate))).to(stash.dtype)
        for i in range(r.begin, r.end):
            before = now = unpacked(r.committed.to(v.dtype), key_dim, from_zero)
            for each in seen_nodes(ancestors, i, r.nodes - r.end + i):
                keys, *rest = unstashed(stash[r.rows[each]].to(v.dtype), key_heads, key_dim, heads)
                before, now = now, step(now, for_every_head(keys, heads), *rest)
            own_q, own_k = (for_every_head(x[0, i], heads) for x in (q, k))
            out[0, i] = read(before, now, own_q, own_k, v[0, i], None if bonus is None else bonus[0, i])
    return out


def fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return v.new_empty((*v.shape[:3], v.shape[3] + 2))


def exponents(decay: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(of each token of a path at its end, and of what lay before it): [.., n, H] -> [.., n, H], [.., H].

    Decays are added up over the tokens behind, and are never a difference of sums.
    """
    behind = decay.flip(-2).cumsum(-2).flip(-2)
    after = torch.cat([behind[..., 1:, :], torch.zeros_like(behind[..., :1, :])], -2)
    return after + gate, behind[..., 0, :]


def advance(state: Tensor, nodes: Tensor, key_heads: int, key_dim: int, from_zero: bool) -> Tensor:
    """state [sites, H, size] after nodes [sites, n, width] of one path were committed."""
    heads = state.shape[1]
    sums, largest = unpacked(state, key_dim, from_zero)
    k, v, decay, gate = unstashed(nodes, key_heads, key_dim, heads)
    own, faded = exponents(decay, gate)
    faded = faded + largest
    top = torch.maximum(own.amax(1), faded)
    keys = for_every_head(k, heads) * weight(own, top[:, None])[..., None]
    added = torch.einsum("snhd,snhe->shde", keys, with_ones(v))
    return packed(sums * weight(faded, top)[..., None, None] + added, top)


exponential_recurrence: OpOverload = define("exponential_recurrence", SCHEMA, reference, fake)
tree_exponential_recurrence: OpOverload = define("tree_exponential_recurrence", TREE_SCHEMA, tree_reference, fake)
