"""How likely the target thought the tokens of the output, and what else it thought likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, int64


@dataclass(frozen=True, slots=True)
class TokenLikelihood:
    """Natural logarithms of probabilities by the model's own logits, before temperature and its like."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the likeliest ones, the likeliest first."""


def likelihoods(logits: Tensor, tokens: Sequence[int], top: int | None) -> list[TokenLikelihood]:
    """Of `tokens`, token i after row i of logits [n, V], with the `top` likeliest beside each; None: nothing."""
    if top is None:
        return []
    rows = logits[: len(tokens)].float().log_softmax(-1)
    chosen = rows.gather(1, rows.new_tensor(tokens, dtype=int64)[:, None])[:, 0].tolist()
    best = rows.topk(min(top, rows.shape[1]))
    ids, values = best.indices.tolist(), best.values.tolist()
    return [
        TokenLikelihood(token, logprob, tuple(zip(ids[i], values[i], strict=True)))
        for i, (token, logprob) in enumerate(zip(tokens, chosen, strict=True))
    ]
