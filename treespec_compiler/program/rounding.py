"""How far a right program may be from its model: as far as the model's own rounding, which is measured.

The measure costs a copy of the model in float64 and a run of it, so it is taken only where a difference is larger than
`TOLERANCE`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..capture.call import CallSpec, run_logits
from ..ir.specs import EVERY_ROW, LogitsSpec
from ..logs import logger

log = logger(__name__)

# Largest difference to the eager logits, relative to their largest magnitude, that needs no measure.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
LOOSE = 5e-2  # float16 and bfloat16
# A program sums in another order than the model: its error is another draw of the same size, and draws differ.
DRAWS = 4
UNMEASURED = 10  # times the tolerance, where the model cannot be copied
MOST_BYTES = 2**31  # of a copy in float64


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of what is expected."""
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((got - expected).abs().max() / scale).item())


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, LOOSE)


def is_rounding(
    model: nn.Module,
    call: CallSpec,
    ids: list[int],
    got: Tensor,
    expected: Tensor,
    spec: LogitsSpec = EVERY_ROW,
) -> bool:
    """Whether `got` and the eager `expected`, logits [V] after `ids`, differ by rounding alone."""
    if expected.isnan().any():
        return True  # the model says nothing itself
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    if not finite.any():
        return True
    got, expected = got[finite], expected[finite]
    error, most = relative_error(got, expected), tolerance(expected.dtype)
    if error <= most:
        return True
    exact = _in_float64(model, call, ids, expected.device, spec)
    if exact is None:
        return error <= UNMEASURED * most
    own = relative_error(expected.double(), exact[finite])
    theirs = relative_error(got.double(), exact[finite])
    log.debug("%d tokens: the model is %.1e away from float64, the program %.1e", len(ids), own, theirs)
    return theirs <= most + DRAWS * own


def _in_float64(
    model: nn.Module, call: CallSpec, ids: list[int], device: torch.device, spec: LogitsSpec
) -> Tensor | None:
    """The logits [V] after `ids` of a copy in float64; None where there can be none."""
    if 8 * sum(p.numel() for p in model.parameters()) > MOST_BYTES or device.type not in ("cpu", "cuda"):
        return None
    try:
        with torch.no_grad():
            there = call.with_tokens(torch.tensor([ids], device=device))
            wide = copy.deepcopy(model).double()
            return spec.rows(run_logits(wide, there.args, there.kwargs))[-1].double()
    except Exception:  # code of the user's that is of one dtype, or cannot be copied
        log.debug("no measure in float64", exc_info=True)
        return None
