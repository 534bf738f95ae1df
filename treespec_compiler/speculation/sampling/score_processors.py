"""Processors of scores as transformers has them: functions of the tokens so far and the next token's scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...errors import InvalidOption, WrongType
from .chance import Row

ScoreProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(ids [1, L] int64, scores [1, V] float32) -> scores [1, V]; a `LogitsProcessor` of transformers is one.

NOTE it must be a function of both: nodes of a tree are asked for in any order, and some never become output.
"""


def as_processors(given: ScoreProcessor | Iterable[ScoreProcessor] | None) -> tuple[ScoreProcessor, ...]:
    """From what `generate(logits_processor=...)` takes: one, several or none. Raises WrongType."""
    if given is None:
        return ()
    if isinstance(given, Iterable):  # before `callable`: a LogitsProcessorList is both
        found = tuple(given)
    else:
        found = (given,)
    for one in found:
        if not callable(one):
            expected = "functions (ids [1, L], scores [1, V]) -> scores"
            raise WrongType(name="logits_processor", got=one, expected=expected)
    return found


class Processed:
    """The processors of one request, with the tokens they see."""

    def __init__(self, processors: Sequence[ScoreProcessor]) -> None:
        self._processors = processors
        self._accepted = np.zeros(0, dtype=np.int64)
        self.device = torch.device("cpu")
        """Where the processors are given their tensors: the model's device, as in transformers."""

    def accept(self, tokens: Iterable[int]) -> None:
        self._accepted = np.concatenate([self._accepted, np.fromiter(tokens, dtype=np.int64)])

    def __call__(self, scores: Row, path: Sequence[int]) -> Row:
        """Of one row, scores [V] after the tokens of `path`."""
        ids = np.concatenate([self._accepted, np.array(path, dtype=np.int64)])
        # NOTE no inference mode: tensors that a processor makes and keeps must stay usable elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            given = torch.from_numpy(ids[None]).to(self.device)
            processed = torch.from_numpy(scores[None].astype(np.float32)).to(self.device)
            for processor in self._processors:
                processed = self._applied(processor, given, processed)
            return processed[0].double().cpu().numpy()

    @staticmethod
    def _applied(processor: ScoreProcessor, ids: Tensor, scores: Tensor) -> Tensor:
        processed = processor(ids, scores)
        if not isinstance(processed, Tensor) or processed.shape != scores.shape:
            got = f"{list(processed.shape)}" if isinstance(processed, Tensor) else type(processed).__name__
            expected = f"scores {list(scores.shape)} from {type(processor).__name__}"
            raise InvalidOption(name="logits_processor", got=got, expected=expected, fix="Return the changed scores.")
        return processed
