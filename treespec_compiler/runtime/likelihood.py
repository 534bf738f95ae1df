"""How likely the target thought the tokens of the output, and what else it thought likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, int64

from ..speculation.slots import Slot
from ..speculation.work import Nodes, Working
from ..tree import TokenTree

PROMPT_ROWS = 32
"""Tokens of a scored prompt that are run at once: each makes a row of logits."""


@dataclass(frozen=True, slots=True)
class TokenLikelihood:
    """Natural logarithms of probabilities by the model's own logits, before temperature and its like."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the likeliest ones, the likeliest first."""


def likelihoods(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLikelihood]:
    """Of `tokens`, token i after row i of logits [n, V], with the `top` likeliest beside each."""
    rows = logits[: len(tokens)].float().log_softmax(-1)
    chosen = rows.gather(1, rows.new_tensor(tokens, dtype=int64)[:, None])[:, 0].tolist()
    best = rows.topk(min(top, rows.shape[1]))
    ids, values = best.indices.tolist(), best.values.tolist()
    return [
        TokenLikelihood(token, logprob, tuple(zip(ids[i], values[i], strict=True)))
        for i, (token, logprob) in enumerate(zip(tokens, chosen, strict=True))
    ]


def scored_prompt(slot: Slot, tokens: Sequence[int], top: int) -> Working[tuple[Tensor, list[TokenLikelihood | None]]]:
    """Commit these tokens; logits [V] after the last one, and the likelihood of each (the first one has none).

    Nothing is taken over from other slots, which have K/V and no logits.
    """
    found: list[TokenLikelihood | None] = [None]
    for begin in range(0, len(tokens), PROMPT_ROWS):
        piece = tokens[begin : begin + PROMPT_ROWS]
        logits = yield Nodes(slot, TokenTree.chain(piece))  # [n, V]
        found += likelihoods(logits, tokens[begin + 1 : begin + 1 + len(piece)], top)
        last = logits[-1].clone()  # the next call's are written where these lie
        slot.commit(range(len(piece)))
    return last, found
