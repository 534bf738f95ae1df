"""Cross-entropy with the target's distribution, of which the likeliest ids are known."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """[R]: -sum_k p_k log q_k in nats, over the target's likeliest `ids` [R, K] with these log probabilities.

    `logits` [R, V] are q's; an id that is negative has no row among them, and its share of p is left out: nothing
    can be learned of it, and a place where it is large counts little.
    """
    known = ids >= 0
    wanted = log_probabilities.exp() * known
    q = logits.gather(1, ids.clamp(min=0)) - logits.logsumexp(1, keepdim=True)
    return -(wanted * q.masked_fill(~known, 0.0)).sum(1)


def rows_of(ids: Tensor | None, vocab: int) -> Tensor | None:
    """For each of the target's `vocab` ids, its row in a reduced vocabulary, or -1 [vocab]; None: all are there."""
    if ids is None:
        return None
    rows = torch.full((vocab,), -1, dtype=torch.int64, device=ids.device)
    rows[ids] = torch.arange(len(ids), device=ids.device)
    return rows
