"""The likeliest ids of logits rows, as Python integers."""

from __future__ import annotations

from math import isfinite

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, arange, cat, float32

from ...ir.device import profile

# NOTE: torch's CPU argmax is not vectorised over a row: 8 rows of 4096 take 36 us, numpy's 2.4 us (one thread,
# AVX-512), and k argmaxes are faster than torch's topk for small k (3 of 4096: 5 us against 9).
SMALL_K = 6
FEW_ROWS = 2
BLOCK = 128


def likeliest(logits: Tensor, k: int = 1, bad: list[int] | None = None) -> list[int]:
    """The k ids with the largest logits of every row of [n, V], flat, best first; k = 1 takes the lowest of a tie.

    `bad`: gets the rows that are NaN or infinite appended. Their largest logit tells: NaN and +inf are above all
    others, and -inf is the largest if there is nothing else.
    """
    if logits.dtype is not float32 or not profile(logits.device).host_memory or k > SMALL_K:
        ids = logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices
        if bad is None:
            return ids.flatten().tolist()
        # one tensor: on a GPU every readback waits
        usable = logits.gather(-1, ids[:, :1]).isfinite()
        read = cat([usable.long(), ids], 1).flatten().tolist()
        bad += [row for row, good in enumerate(read[:: k + 1]) if not good]
        del read[:: k + 1]
        return read
    rows = logits.numpy()
    if k == 1:
        found = rows.argmax(-1).tolist()
        if bad is not None:
            _unusable(rows, found, bad)
        return found
    original, rows = rows, rows.copy()
    if len(rows) <= FEW_ROWS:
        found = []
        for row in rows:
            for _ in range(k):
                token = int(row.argmax())
                row[token] = -np.inf
                found.append(token)
    else:
        every = np.arange(len(rows))
        columns = []
        for _ in range(k):
            column = rows.argmax(-1)
            rows[every, column] = -np.inf
            columns.append(column)
        found = np.stack(columns, axis=1).ravel().tolist()
    if bad is not None:
        _unusable(original, found[::k], bad)
    return found


def largest(logits: Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The k ids with the largest logits of every row of [n, V], best first [n, k], and whether these are finite [n].

    The largest k lie in the k blocks with the largest maxima, so few numbers are looked at more closely.
    """
    if logits.dtype is float32 and profile(logits.device).host_memory:
        return _largest_on_host(logits.numpy(), k)
    blocks = logits.shape[1] // BLOCK
    if blocks > 2 * k:
        best = logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1).topk(k).indices  # [n, k]
        places = (best[..., None] * BLOCK + arange(BLOCK, device=logits.device)).flatten(1)
        rest = arange(blocks * BLOCK, logits.shape[1], device=logits.device).expand(len(logits), -1)
        places = cat([places, rest], 1)
        values, found = logits.gather(1, places).topk(k)
        ids = places.gather(1, found)
    else:
        values, ids = logits.topk(k)
    return ids.cpu().numpy(), values.isfinite().all(-1).cpu().numpy()


def _largest_on_host(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """By numpy: torch's ten ops take five times as long for a row, most of it in waking threads. A block is every
    `blocks`-th id, so that maxima are taken of whole vectors. NaN counts as the largest, as it does for torch.
    """
    n, width = logits.shape
    blocks = width // BLOCK
    whole = blocks * BLOCK if blocks > 2 * k else 0
    within, rest = np.arange(BLOCK)[:, None] * blocks, np.arange(whole, width)
    ids = np.empty((n, k), np.int64)
    for row, out in zip(logits, ids, strict=True):
        places = rest
        if whole:
            best = np.argpartition(row[:whole].reshape(BLOCK, blocks).max(0), blocks - k)[blocks - k :]
            places = np.concatenate([(within + best).ravel(), rest])
        values = row[places]
        top = np.argpartition(values, len(values) - k)[len(values) - k :]
        out[:] = places[top[np.argsort(values[top])[::-1]]]
    return ids, np.logical_and.reduce(np.isfinite(np.take_along_axis(logits, ids, 1)), axis=1)


def _unusable(rows: NDArray[np.float32], best: list[int], bad: list[int]) -> None:
    item = rows.item
    if isfinite(sum(map(item, range(len(best)), best))):  # all of them; float32 numbers do not overflow a float64
        return
    for row, token in enumerate(best):
        if not isfinite(item(row, token)):
            bad.append(row)
