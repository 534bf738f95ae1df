"""How much of the target's own text a draft would have guessed, place by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldOut:
    """Of chains of the likeliest guesses, grown at every place of held-out texts."""

    tokens_per_step: float
    """1 and the guesses that are right before the first wrong one."""
    by_depth: tuple[float, ...]
    """How many of the guesses at depth 1, 2, ... are right where all before them are."""
    places: int


def acceptance(hits: Sequence[Tensor]) -> HeldOut:
    """`hits` [roots, depth] bool of each text: whether the guess at a depth behind a root is the target's."""
    depth = hits[0].shape[1] if hits else 0
    right = torch.zeros(depth, dtype=torch.int64)
    places = 0
    for each in hits:
        whole = each[: max(0, len(each) - depth + 1)].cpu()  # behind the others the text ends sooner
        right += whole.long().cumprod(1).sum(0)
        places += len(whole)
    reached = [places, *right.tolist()]
    by_depth = tuple(now / before if before else 0.0 for before, now in pairwise(reached))
    return HeldOut(1 + int(right.sum()) / max(1, places), by_depth, places)


def shifted(correct: Tensor, depth: int) -> Tensor:
    """[R, depth]: of guesses [R] that know all tokens before them, those behind each root; False behind the end."""
    found = torch.zeros(len(correct), depth, dtype=torch.bool, device=correct.device)
    for d in range(min(depth, len(correct))):
        found[: len(correct) - d, d] = correct[d:]
    return found
