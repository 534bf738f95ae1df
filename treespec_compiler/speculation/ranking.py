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
    if logits.dtype is not float32 or not logits.is_cpu or k > SMALL_K:
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


def unusable(logits: Tensor, best: Sequence[int], rows: Sequence[int] | None = None) -> list[int]:
    """Which of `rows` (default: all) of [n, V] are NaN or infinite, given each one's likeliest id: places in `best`.

    An argmax points at NaN or +inf if there is one, and at -inf if there is nothing else.
    """
    if rows is None:
        rows = range(len(best))
    if logits.dtype is not float32 or not logits.is_cpu:
        return logits[rows, best].isfinite().logical_not().nonzero().flatten().tolist()
    item = logits.numpy().item
    return [i for i, (row, token) in enumerate(zip(rows, best)) if not isfinite(item(row, token))]
