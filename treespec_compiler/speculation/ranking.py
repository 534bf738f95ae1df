"""The likeliest ids of logits rows, as Python integers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
from torch import Tensor, float32

# NOTE: torch's CPU argmax is not vectorised over a row: 8 rows of 4096 take 36 us, numpy's 2.4 us (one thread,
# AVX-512), and k argmaxes are faster than torch's topk for small k (3 of 4096: 5 us against 9).
SMALL_K = 6
FEW_ROWS = 2


def likeliest(logits: Tensor, k: int = 1) -> list[int]:
    """The k ids with the largest logits of every row of [n, V], flat, best first; k = 1 takes the lowest of a tie."""
    if logits.dtype is not float32 or logits.device.type != "cpu" or k > SMALL_K:
        ids = logits.argmax(-1) if k == 1 else logits.topk(k).indices
        return ids.flatten().tolist()
    rows = logits.numpy()
    if k == 1:
        return rows.argmax(-1).tolist()
    rows = rows.copy()
    if len(rows) <= FEW_ROWS:
        found = []
        for row in rows:
            for _ in range(k):
                token = int(row.argmax())
                row[token] = -np.inf
                found.append(token)
        return found
    every = np.arange(len(rows))
    columns = []
    for _ in range(k):
        column = rows.argmax(-1)
        rows[every, column] = -np.inf
        columns.append(column)
    return np.stack(columns, axis=1).ravel().tolist()


def unusable(logits: Tensor, best: Sequence[int]) -> list[int]:
    """Rows of [n, V] that are NaN or infinite, given the likeliest id of each: an argmax points at NaN and +inf."""
    if logits.dtype is not float32 or logits.device.type != "cpu":
        found = logits[range(len(best)), best].isfinite().logical_not().nonzero()
        return found.flatten().tolist()
    item = logits.numpy().item
    return [row for row, token in enumerate(best) if not isfinite(item(row, token))]
