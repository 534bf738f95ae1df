"""How far a right program may be from its model: as far as the model's own rounding, which is measured.

The measure costs a wider copy of the model and a run of it, so it is taken only where a difference is larger than
`TOLERANCE`, and once for all rows of a path.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..capture.call import CallSpec, run_logits
from ..ir.device import profile
from ..ir.specs import EVERY_ROW, LogitsSpec
from ..logs import logger

log = logger(__name__)

# Largest difference to the eager logits, relative to their largest magnitude, that needs no measure.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
LOOSE = 5e-2  # float16 and bfloat16
# A program sums in another order than the model: its error is another draw of the same size, and draws differ.
DRAWS = 4
# Times the tolerance, where the model cannot be copied; half precision's is loose already.
UNMEASURED = {torch.float64: 10, torch.float32: 10}
LOOSE_UNMEASURED = 2
MOST_BYTES = 2**33  # of a copy in float64


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of what is expected."""
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((got - expected).abs().max() / scale).item())


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, LOOSE)


@dataclass(frozen=True)
class Judged:
    """A row of a program beside the model's own."""

    rounded: bool
    """Whether they differ by rounding alone."""
    error: float = 0.0
    """Their difference, relative to the model's largest logit."""
    allowed: float = 0.0
    """The largest difference that would be taken for rounding: from the model or, where `own` is, from float64."""
    own: float | None = None
    """How far the model is from float64; None: it was not needed, or could not be measured."""


class Exact:
    """What a model computes without its rounding, as far as a copy in a wider type tells: made when first asked."""

    def __init__(self, model: nn.Module, call: CallSpec, spec: LogitsSpec) -> None:
        self._model, self._call, self._spec = model, call, spec
        self._wide: nn.Module | None = None
        self._rows: dict[tuple[int, ...], Tensor | None] = {}

    def row(self, ids: list[int], at: int, device: torch.device) -> Tensor | None:
        """The logits [V] after `ids[at]` in float64; None where there can be none. One run gives all that it can."""
        key = tuple(ids[: at + 1] if self._spec.last else ids)
        if key not in self._rows:
            self._rows[key] = self._run([*key], device)
        rows = self._rows[key]
        return None if rows is None else rows[at - len(key)]

    def _run(self, ids: list[int], device: torch.device) -> Tensor | None:
        try:
            if self._wide is None:
                if 8 * sum(p.numel() for p in self._model.parameters()) > _room(device):
                    return None
                self._wide = copy.deepcopy(self._model).double()
            with torch.no_grad():
                there = self._call.with_tokens(torch.tensor([ids], device=device))
                return self._spec.rows(run_logits(self._wide, there.args, there.kwargs)).double()
        except Exception:  # code of the user's that is of one dtype, or cannot be copied
            log.debug("no measure in float64", exc_info=True)
            return None


def is_rounding(
    model: nn.Module,
    call: CallSpec,
    ids: list[int],
    got: Tensor,
    expected: Tensor,
    spec: LogitsSpec = EVERY_ROW,
) -> bool:
    """Whether `got` and the eager `expected`, logits [V] after `ids`, differ by rounding alone."""
    return only_rounded(Exact(model, call, spec), ids, len(ids) - 1, got, expected)


def only_rounded(exact: Exact, ids: list[int], at: int, got: Tensor, expected: Tensor) -> bool:
    """The same of the row after `ids[at]`, in runs of all of them."""
    return judged(exact, ids, at, got, expected).rounded


def judged(exact: Exact, ids: list[int], at: int, got: Tensor, expected: Tensor) -> Judged:
    """How far the row after `ids[at]` is from the model's, in runs of all `ids`, and whether that is rounding."""
    if expected.isnan().any():
        return Judged(True)  # the model says nothing itself
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return Judged(False, float("inf"))
    if not finite.any():
        return Judged(True)
    device, (got, expected) = expected.device, (got[finite], expected[finite])
    error, most = relative_error(got, expected), tolerance(expected.dtype)
    if error <= most:
        return Judged(True, error, most)
    true = exact.row(ids, at, device)
    if true is None:
        most *= UNMEASURED.get(expected.dtype, LOOSE_UNMEASURED)
        return Judged(error <= most, error, most)
    true = true[finite]
    own, theirs = relative_error(expected.double(), true), relative_error(got.double(), true)
    log.debug("%d tokens: the model is %.1e away from float64, the program %.1e", at + 1, own, theirs)
    most += DRAWS * own
    return Judged(theirs <= most, theirs, most, own)


def _room(device: torch.device) -> int:
    """Bytes that a copy may take: half of what is free, and no more than a run of it is worth."""
    return min(MOST_BYTES, profile(device).free_bytes(device) // 2)
