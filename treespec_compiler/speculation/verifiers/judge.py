"""What the loop asks after a forward pass of the target: the first token, and which nodes are accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InvalidLogits
from ...ir import ops
from ...ir.device import profile
from ...ir.private_torch import OpOverload
from ..proposal import Proposal
from ..sampling.chance import Chance, Row, SeededChance
from ..sampling.device_rows import DeviceProcessor
from ..sampling.ranking import likeliest
from ..sampling.settings import Processor, Sampling
from . import VERIFIERS, StochasticVerifier
from .greedy import GreedyVerifier, Verdict, Verifier
from .on_device import accept_by_chance, accept_greedily, accept_kernel, takes

if TYPE_CHECKING:
    from ...program.tree_program import TreeProgram


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

    def bind(self, program: TreeProgram) -> None:
        """The target's program: judge where its logits are, if there are kernels for that."""
        ...


class GreedyJudge:
    """The likeliest token, always."""

    def __init__(self, verifier: Verifier) -> None:
        self.needs_q = verifier.needs_q
        self._verifier = verifier
        self._length = 0
        self.kernel: OpOverload | None = None
        """An implementation of `treespec::greedy_accept` for the target's logits; None: they are read here."""

    def bind(self, program: TreeProgram) -> None:
        self.kernel = accept_kernel(program, ops.greedy_accept, program.dtype)

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
        self.kernel: OpOverload | None = None
        """An implementation of `treespec::stochastic_accept`; None: the rule looks at rows that are read here."""
        self._rows: DeviceProcessor | None = None

    def bind(self, program: TreeProgram) -> None:
        known = VERIFIERS.get(self._verifier.name) is self._verifier and isinstance(self._chance, SeededChance)
        if self._processor.processed is not None:  # which look at one row, and at its path
            known, self._processor.processed.device = False, program.device
        self.kernel = accept_kernel(program, ops.stochastic_accept, torch.float64) if known else None
        if self.kernel is not None:
            self._rows = DeviceProcessor(self._processor.sampling, program.device)

    def first(self, logits: Tensor) -> int:
        if self._rows is not None:
            return self._accepted("naive", Proposal.root(0), logits[None]).bonus
        return self._chance.choose(self._row(_rows(logits[None])[0], (), self._length - 1))

    def verify(self, proposal: Proposal, logits: Tensor) -> Verdict:
        if self._rows is not None and takes(self._verifier.name, proposal):
            return self._accepted(self._verifier.name, proposal, logits)
        read, depths = row_reader(logits), proposal.depths

        def target(node: int) -> Row:
            path = proposal.path_tokens(node) if self._processor.needs_paths else ()
            return self._row(read(node), path, self._length - 1 + depths[node])

        return self._verifier.verify(proposal, target, self._chance)

    def accept(self, tokens: Sequence[int]) -> None:
        self._length += len(tokens)
        self._processor.accept(tokens)
        if self._rows is not None:
            self._rows.accept(tokens)

    def _accepted(self, rule: str, proposal: Proposal, logits: Tensor) -> Verdict:
        """By the kernel, on the device's distributions."""
        assert self.kernel is not None and self._rows is not None and isinstance(self._chance, SeededChance)
        paths = [proposal.path_tokens(node) for node in range(len(proposal))] if self._rows.needs_paths else None
        p, usable = self._rows.rows(logits, paths)
        verdict = accept_by_chance(self.kernel, rule, proposal, p, usable, self._chance)
        if verdict.unusable >= 0:
            raise self._invalid(self._length - 1 + verdict.unusable)
        return verdict

    def _row(self, logits: NDArray[np.float32], path: Sequence[int], position: int) -> Row:
        row = self._processor.row(logits, path)
        if row is None:
            raise self._invalid(position)
        return row

    @staticmethod
    def _invalid(position: int) -> InvalidLogits:
        return InvalidLogits(position=position, problem="NaN, infinite or only -inf logits")


def row_reader(logits: Tensor) -> Callable[[int], NDArray[np.float32]]:
    """Rows of logits [N, V] as they are asked for: most rules look at the path's rows only."""
    if profile(logits.device).host_memory:
        return _rows(logits).__getitem__
    # NOTE: from another device one row at a time; all rows of 64 nodes and 128000 ids would be 33 MB a step
    return lambda node: _rows(logits[node])


def _rows(logits: Tensor) -> NDArray[np.float32]:
    return logits.float().cpu().numpy()
