"""What the loop asks after a forward pass of the target: the first token, and which nodes are accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload

from ..errors import InvalidLogits
from .chance import Chance, Row
from .on_device import accept_greedily
from .proposal import Proposal
from .ranking import likeliest
from .sampling import Processor, Sampling
from .verifier import GreedyVerifier, Verdict, Verifier
from .verifiers import StochasticVerifier


class Judge(Protocol):
    """A verifier bound to one request."""

    needs_q: bool

    def first(self, logits: Tensor) -> int:
        """The token after the prompt, from its logits [V]."""
        ...

    def verify(self, proposal: Proposal, logits: Tensor) -> Verdict: ...

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens are final, the prompt first; the last one is the next tree's root."""
        ...


class GreedyJudge:
    """The likeliest token, always."""

    def __init__(self, verifier: Verifier) -> None:
        self.needs_q = verifier.needs_q
        self._verifier = verifier
        self._length = 0
        self.kernel: OpOverload | None = None
        """An implementation of `treespec::greedy_accept` for the target's logits; None: they are read here."""

    def first(self, logits: Tensor) -> int:
        bad: list[int] = []
        (token,) = likeliest(logits[None], 1, bad)
        if bad:
            raise InvalidLogits(position=self._length - 1)
        return token

    def verify(self, proposal: Proposal, logits: Tensor) -> Verdict:
        if self.kernel is not None and type(self._verifier) is GreedyVerifier:
            verdict = accept_greedily(self.kernel, proposal, logits)
        else:
            verdict = self._verifier.verify(proposal, logits)
        if verdict.unusable >= 0:
            raise InvalidLogits(position=self._length - 1 + verdict.unusable)
        return verdict

    def accept(self, tokens: Sequence[int]) -> None:
        self._length += len(tokens)


class SamplingJudge:
    """A stochastic rule on the processed distributions of the paths it looks at."""

    def __init__(self, verifier: StochasticVerifier, sampling: Sampling, chance: Chance) -> None:
        self.needs_q = verifier.needs_q
        self._verifier, self._chance = verifier, chance
        self._processor = Processor(sampling)
        self._length = 0

    def first(self, logits: Tensor) -> int:
        return self._chance.choose(self._row(_rows(logits[None])[0], (), self._length - 1))

    def verify(self, proposal: Proposal, logits: Tensor) -> Verdict:
        read, depths = row_reader(logits), proposal.depths

        def target(node: int) -> Row:
            path = proposal.path_tokens(node) if self._processor.needs_paths else ()
            return self._row(read(node), path, self._length - 1 + depths[node])

        return self._verifier.verify(proposal, target, self._chance)

    def accept(self, tokens: Sequence[int]) -> None:
        self._length += len(tokens)
        self._processor.accept(tokens)

    def _row(self, logits: NDArray[np.float32], path: Sequence[int], position: int) -> Row:
        row = self._processor.row(logits, path)
        if row is None:
            raise InvalidLogits(position=position, problem="NaN, infinite or only -inf logits")
        return row


def row_reader(logits: Tensor) -> Callable[[int], NDArray[np.float32]]:
    """Rows of logits [N, V] as they are asked for: most rules look at the path's rows only."""
    if logits.is_cpu:
        return _rows(logits).__getitem__
    # NOTE: from another device one row at a time; all rows of 64 nodes and 128000 ids would be 33 MB a step
    return lambda node: _rows(logits[node])


def _rows(logits: Tensor) -> NDArray[np.float32]:
    return logits.float().cpu().numpy()
