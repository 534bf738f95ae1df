"""How tokens are sampled: temperature and its companions, in the order and with the meaning transformers gives them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidOption
from .chance import Row
from .score_processors import Processed, ScoreProcessor

# Tokens sorted at first to find the top p: sorting all of 128000 takes 20 times as long as the rest of a row.
FEW = 128
TINY = 1e-200
"""Below this temperature a logit over it may overflow, so that scores are taken from the largest one first."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What turns logits into the distribution that is sampled; the default is greedy decoding.

    The order is that of transformers' `generate`: logit bias, repetition penalty, `processors`, temperature, top-k,
    top-p, min-p.
    """

    temperature: float = 0.0
    """0: the likeliest token, always."""
    top_k: int | None = None
    """Only the k likeliest tokens (and those tied with the last of them)."""
    top_p: float | None = None
    """Only the fewest likeliest tokens that hold more than this probability together."""
    min_p: float | None = None
    """Only tokens of at least this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen before, prompt included, divided by it, or times it if negative (arXiv 1909.05858)."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these ids; -inf bans one."""
    processors: tuple[ScoreProcessor, ...] = ()
    """More that changes scores, by the tokens so far; what drafts propose is not changed by it."""
    seed: int | None = None
    """None: taken from torch's global generator."""
    _bias: tuple[tuple[int, float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "a finite number of 0 or more", lambda x: 0 <= x < math.inf)
        _check("repetition_penalty", self.repetition_penalty, "a finite number above 0", lambda x: 0 < x < math.inf)
        if self.top_p is not None:
            _check("top_p", self.top_p, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _check("min_p", self.min_p, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        if self.top_k is not None and not (_is_int(self.top_k) and self.top_k >= 1):
            raise InvalidOption(name="top_k", got=self.top_k, expected="an integer of 1 or more, or None for no limit")
        if self.seed is not None and not (_is_int(self.seed) and self.seed >= 0):
            raise InvalidOption(name="seed", got=self.seed, expected="an integer of 0 or more, or None")
        bias = self.logit_bias
        if bias is None:
            bias = {}
        elif not isinstance(bias, Mapping):
            raise InvalidOption(name="logit_bias", got=bias, expected="a mapping from token id to number")
        for token, value in bias.items():
            if not _is_int(token) or token < 0:
                raise InvalidOption(name="logit_bias", got=token, expected="token ids of 0 or more as its keys")
            if not _is_number(value) or math.isnan(value) or value == math.inf:
                raise InvalidOption(name="logit_bias", got=value, expected="finite numbers, or -inf to ban a token")
        object.__setattr__(self, "_bias", tuple((int(token), float(value)) for token, value in sorted(bias.items())))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def reorders(self) -> bool:
        """Whether the likeliest token may be another one than the logits say."""
        return bool(self._bias) or self.repetition_penalty != 1.0

    @property
    def plain(self) -> bool:
        """Whether all that matters is the largest of the model's own logits."""
        return self.greedy and not self.reorders and not self.processors


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(name: str, value: float, expected: str, valid: Callable[[float], bool]) -> None:
    if not _is_number(value) or not valid(value):
        raise InvalidOption(name=name, got=value, expected=expected)


class Processor:
    """Logits of one request to the distribution that is sampled, in float64; knows which tokens were seen."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.processed = Processed(sampling.processors) if sampling.processors else None
        self._penalises = sampling.repetition_penalty != 1.0
        self.needs_paths = self._penalises or self.processed is not None
        self._seen: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._bias_ids = np.array([token for token, _ in sampling._bias], dtype=np.int64)
        self._bias_values = np.array([value for _, value in sampling._bias], dtype=np.float64)

    def accept(self, tokens: Iterable[int]) -> None:
        """These tokens are part of every path from now on."""
        if not self.needs_paths:
            return
        ids = np.fromiter(tokens, dtype=np.int64)
        if self.processed is not None:
            self.processed.accept(ids)
        if len(ids) and ids.max() >= len(self._seen):
            self._seen = np.pad(self._seen, (0, int(ids.max()) + 1 - len(self._seen)))
        self._seen[ids] = True

    def row(self, logits: NDArray[np.floating], path: Sequence[int]) -> Row | None:
        """The distribution [V] of one row of logits [V]; None if it is NaN, infinite or has nothing finite.

        `path`: the row's tokens beyond the accepted ones (read only if `needs_paths`).
        """
        # NOTE row by row: arrays of a few rows leave the caches (8 rows of 4096: 229 us together, 110 alone).
        sampling = self.sampling
        scores = logits.astype(np.float64)  # a copy
        if len(self._bias_ids):
            known = self._bias_ids < len(scores)
            scores[self._bias_ids[known]] += self._bias_values[known]
        if self._penalises:
            seen, penalty = self._mask(len(scores), path), sampling.repetition_penalty
            scores = np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)
        if self.processed is not None:
            scores = self.processed(scores, path)
        largest = float(scores.max())  # of NaN, the maximum is NaN
        if not math.isfinite(largest):
            return None
        if sampling.greedy:
            best = np.zeros_like(scores)
            best[scores.argmax()] = 1.0
            return best
        if sampling.temperature != 1.0:
            if sampling.temperature < TINY:
                scores -= largest
            with np.errstate(over="ignore"):  # to -inf, where nothing is left of a score
                scores /= sampling.temperature
        if sampling.top_k is not None and sampling.top_k < len(scores):
            scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
        if sampling.top_p is not None and sampling.top_p < 1.0:
            _keep_top_p(scores, sampling.top_p)
        if sampling.min_p:
            shares = _softmax(scores)
            scores[shares < sampling.min_p * shares.max()] = -np.inf
        return _softmax(scores)

    def _mask(self, vocab_size: int, path: Sequence[int]) -> NDArray[np.bool_]:
        """Which ids occur in the accepted tokens or in the path [V]."""
        mask = np.zeros(vocab_size, dtype=bool)
        known = self._seen[:vocab_size]
        mask[: len(known)] = known
        mask[[token for token in path if token < vocab_size]] = True
        return mask


def _keep_top_p(scores: Row, top_p: float) -> None:
    """Ban all but the likeliest tokens: one stays if those before it hold less than `top_p`. Changes `scores`."""
    weights = _softmax(scores)
    count = FEW
    while True:
        likeliest = scores.argpartition(-count)[-count:] if count < len(weights) else np.arange(len(weights))
        # of equal ones the later first, as in transformers, which sorts them the other way round
        order = likeliest[np.lexsort((likeliest, scores[likeliest]))[::-1]]
        total = weights[order].cumsum()
        if total[-1] >= top_p or count >= len(weights):
            break
        count *= 16
    kept = order[: 1 + int((total < top_p).sum())]
    values = scores[kept]
    scores[:] = -np.inf
    scores[kept] = values


def _softmax(scores: Row) -> Row:
    weights = scores - scores.max()
    np.exp(weights, out=weights)
    weights /= weights.sum()
    return weights
