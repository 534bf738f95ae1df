"""A dense float64 answer for attention whose scores are changed, written apart from the ops' references."""

from __future__ import annotations

import torch
from torch import Tensor
from tree_cases import Case


def scored(
    case: Case,
    *,
    chunk: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[1, H, T, Dv] for a case's requests, with the case's window; its pools must hold the new nodes' K/V already."""
    pool_k, pool_v, q = case.pool_k.double(), case.pool_v.double(), case.q.double()
    out = torch.zeros(1, case.heads, q.shape[2], case.dv, dtype=torch.float64)
    row = 0
    for r, (prefix, parents, new) in enumerate(case.requests):
        pages = case.meta.page_table[r].tolist()
        keys = torch.cat([pool_k[p] for p in pages], 1)
        values = torch.cat([pool_v[p] for p in pages], 1)
        for node in range(len(parents) - new, len(parents)):
            slots = [*range(prefix), *(prefix + j for j in case.path(parents, node))]  # by position
            here = len(slots) - 1
            seen = [
                position
                for position in range(len(slots))
                if (not case.window or here - position < case.window)
                and (not chunk or here // chunk == position // chunk)
            ]
            for h in range(case.heads):
                kv = h // (case.heads // case.kv_heads)
                weights = torch.zeros(len(seen), dtype=torch.float64)
                for n, position in enumerate(seen):
                    s = q[0, h, row] @ keys[kv, slots[position]] * case.scale
                    if softcap:
                        s = softcap * torch.tanh(s / softcap)
                    if slopes is not None:
                        s = s - slopes[h].double() * (here - position)
                    if bias is not None:
                        s = s + bias[h, min(here - position, bias.shape[1] - 1)].double()
                    weights[n] = s.exp()
                total = weights.sum() + (sinks[h].double().exp() if sinks is not None else 0)
                out[0, h, row] = weights / total @ values[kv, [slots[position] for position in seen]]
            row += 1
    return out
