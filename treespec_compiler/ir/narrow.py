"""Forms of packed weights: float32, and narrower ones for weights whose every value they hold exactly.

A packed weight is [panels, blocks of k, a block]: panel p holds outputs 32 p .. 32 p + 31, zeros past the last output.

| form | a block | bits a weight |
|---|---|---|
| float32 | 32 outputs of one k | 32 |
| bfloat16 | the same, output j beside output j + 16, so that both are one word of 32 bits | 16 |
| float16 | the same in order; finite values only | 16 |
| q8_0 | 32 k: a float16 step an output, then 32 outputs of each k in eight bits: q d | 8.5 |
| q4_1 | 32 k: a float16 step and minimum an output, then words of eight k for every output: q d + m | 5 |
| q4_0 | 32 k: a float16 step an output, then such words: (q - 8) d | 4.5 |

The last three are GGUF's block types of these names (ggml-quants.c), laid out for panels. Which form a weight has is
found from its values: what a quantized file holds can be read off the numbers that it was blown up to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 32
GROUP = 32
"""Values along k that share a step."""
CHUNK = 1 << 17
"""Values that are looked at and packed at a time: what stays in a core's cache, and bounds the memory it takes."""
SOON = 2
"""After so many further levels none of a weight's groups fits: a quantizer uses its outermost ones nearly always."""


@dataclass(frozen=True)
class StorageForm:
    """How a weight is stored. `encode` takes [32 p, K] and gives [p, blocks, width], or None where that loses a bit."""

    name: str
    dtype: torch.dtype
    k_block: int
    """Values of k in a block."""
    width: int
    """Elements of a block."""
    encode: Callable[[Tensor], Tensor | None]
    decode: Callable[[Tensor], Tensor]
    """[p, blocks, width] -> [32 p, K] float32."""

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Of a packed weight [rows, columns]."""
        return (-(-rows // PANEL), columns // self.k_block, self.width)

    def takes(self, columns: int) -> bool:
        return columns % self.k_block == 0


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    return a.view(torch.int32) == b.view(torch.int32)


def _all_same_bits(made: Tensor, values: Tensor) -> Tensor:
    """[G] of groups [G, 32]. NOTE a look at all of them first: where the form is the right one, all are the same."""
    if torch.equal(made.view(torch.int32), values.view(torch.int32)):
        return torch.ones(len(made), dtype=torch.bool, device=made.device)
    return _same_bits(made, values).all(1)


# -- 16 bits ----------------------------------------------------------------------------------------------------------


def _by_panel(rows: Tensor) -> Tensor:
    """[32 p, K] -> [p, K, 32]."""
    return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()


def _by_row(panels: Tensor) -> Tensor:
    """[p, K, 32] -> [32 p, K]."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])


def _encode_bfloat16(rows: Tensor) -> Tensor | None:
    if (rows.view(torch.int32) & 0xFFFF).any():
        return None
    # NOTE bits are moved, not converted: NaN stays the NaN it is.
    high = (rows.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return _by_panel(high).unflatten(2, (2, 16)).transpose(2, 3).flatten(2).contiguous()


def _decode_bfloat16(panels: Tensor) -> Tensor:
    in_order = panels.unflatten(2, (16, 2)).transpose(2, 3).flatten(2).contiguous()
    return _by_row((in_order.view(torch.int16).to(torch.int32) << 16).view(torch.float32))


def _encode_float16(rows: Tensor) -> Tensor | None:
    half = rows.half()
    if not (half.isfinite() & _same_bits(half.float(), rows)).all():
        return None
    return _by_panel(half)


# -- blocks -----------------------------------------------------------------------------------------------------------


class _Fit:
    """What is found of groups [G, 32]: their steps, minima and levels; and which groups are left."""

    def __init__(self, groups: Tensor) -> None:
        self.groups = groups
        self.left: Tensor | None = None  # None: all of them
        self.step = self.least = self.levels = groups

    def of(self, numbers: Tensor) -> Tensor:
        """Those of the groups that are left."""
        return numbers if self.left is None else numbers[self.left]

    def take(self, holds: Tensor, step: Tensor, least: Tensor, levels: Tensor) -> bool:
        """Keep these of the groups that are left, where they hold; whether none is left."""
        if self.left is None:
            self.step, self.least, self.levels = step, least, levels
            self.left = (~holds).nonzero().view(-1)
        else:
            there = self.left[holds]
            self.step[there], self.least[there], self.levels[there] = step[holds], least[holds], levels[holds]
            self.left = self.left[~holds]
        return not len(self.left)

    def none(self) -> bool:
        """Whether every group is left."""
        return self.left is not None and len(self.left) == len(self.groups)


def _divisor(d: Tensor) -> Tensor:
    return d.masked_fill(d == 0, 1.0)


def _rounded(quotients: Tensor, least: int, most: int) -> Tensor:
    """In place. NOTE + 0.0: an integer has no negative zero."""
    return quotients.round_().clamp_(least, most).add_(0.0)


def _steps(groups: Tensor, levels: Sequence[int], least: int, most: int) -> tuple[Tensor, Tensor] | None:
    """d and q of groups [G, 32] that are q d with a float16 d and least <= q <= most; None where one group is not.

    The value furthest from zero has one of the `levels`, likeliest first: its step follows by a division that is exact.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)  # NOTE each is vectorised, aminmax is not
    if not (low.isfinite() & high.isfinite()).all():
        return None
    fit = _Fit(groups)
    for tries, level in enumerate(levels):
        values, bottom, top = fit.of(groups), fit.of(low), fit.of(high)
        d = (torch.where(-bottom > top, bottom, top) / level).half().float()
        q = _rounded(values / _divisor(d), least, most)
        if fit.take(_all_same_bits(q * d, values) & d.isfinite().view(-1), d, torch.zeros_like(d), q):
            return fit.step, fit.levels
        if tries == SOON and fit.none():
            return None
    return None


def _affine(groups: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """d, m and q of groups [G, 32] that are q d + m, rounded once, with float16 d and m and 0 <= q <= 15; or None.

    The least value has q = 0 and the largest q = 15 where a quantizer has taken both from the weights; further pairs of
    levels are tried for groups in which it has not.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)  # NOTE each is vectorised, aminmax is not
    if not (low.isfinite() & high.isfinite()).all():
        return None
    fit = _Fit(groups)
    for tries, (below, above) in enumerate(_PAIRS):
        values, bottom, top = fit.of(groups), fit.of(low), fit.of(high)
        d = ((top - bottom) / (above - below)).half().float()
        m = (bottom - below * d).half().float()
        q = _rounded((values - m).div_(_divisor(d)), 0, 15)
        # NOTE the product is exact (11 and 4 bits), so that a fused multiplication and addition gives the same
        holds = _all_same_bits((q * d).add_(m), values) & (d.isfinite() & m.isfinite()).view(-1)
        if fit.take(holds, d, m, q):
            return fit.step, fit.least, fit.levels
        if tries == SOON and fit.none():
            return None
    return None


_PAIRS = [(0, top) for top in range(15, 0, -1)] + [(below, 15) for below in range(1, 15)]


def _groups(rows: Tensor) -> Tensor:
    return rows.reshape(-1, GROUP)


def _halves(numbers: Tensor, panels: int) -> Tensor:
    """One number a group [G, 1], float16 exactly -> [p, blocks, 64] bytes."""
    return numbers.half().view(panels, PANEL, -1).transpose(1, 2).contiguous().view(torch.uint8)


def _numbers(part: Tensor) -> Tensor:
    """The inverse: [p, blocks, 64] bytes -> [p, blocks, 32] float32."""
    return part.contiguous().view(torch.float16).float()


def _nibbles(q: Tensor, panels: int) -> Tensor:
    """0 .. 15 of groups [G, 32] -> [p, blocks, 512] bytes: a word an output for every eighth k, its first one low."""
    eighths = q.to(torch.int32).view(panels, PANEL, -1, 4, 8)
    words = eighths[..., 0].clone()
    for i in range(1, 8):
        words |= eighths[..., i] << 4 * i
    return words.permute(0, 2, 3, 1).contiguous().view(panels, -1, 4 * PANEL).view(torch.uint8)


def _from_nibbles(part: Tensor) -> Tensor:
    """The inverse: [p, blocks, 512] bytes -> [p, blocks, 32 k, 32 outputs] float32."""
    words = part.contiguous().view(torch.int32).unflatten(2, (4, 1, PANEL))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=part.device).view(8, 1)
    return ((words >> shifts) & 15).flatten(2, 3).float()


def _rows_of(blocks: Tensor) -> Tensor:
    """[p, blocks, 32 k, 32 outputs] -> [32 p, K]."""
    return _by_row(blocks.flatten(1, 2))


def _encode_q8_0(rows: Tensor) -> Tensor | None:
    found = _steps(_groups(rows), _EIGHT_BITS, -128, 127)
    if found is None:
        return None
    step, q = found
    panels = len(rows) // PANEL
    whole = q.to(torch.int8).view(panels, PANEL, -1, GROUP).permute(0, 2, 3, 1)
    return torch.cat([_halves(step, panels), whole.contiguous().view(torch.uint8).flatten(2)], 2)


_EIGHT_BITS = [127, -127, -128]


def _decode_q8_0(packed: Tensor) -> Tensor:
    q = packed[..., 64:].contiguous().view(torch.int8).unflatten(2, (GROUP, PANEL)).float()
    return _rows_of(q * _numbers(packed[..., :64]).unsqueeze(2))


def _encode_q4_0(rows: Tensor) -> Tensor | None:
    found = _steps(_groups(rows), _FOUR_BITS, -8, 7)
    if found is None:
        return None
    step, q = found
    panels = len(rows) // PANEL
    return torch.cat([_halves(step, panels), _nibbles(q + 8, panels)], 2)


_FOUR_BITS = [-8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1]


def _decode_q4_0(packed: Tensor) -> Tensor:
    return _rows_of((_from_nibbles(packed[..., 64:]) - 8) * _numbers(packed[..., :64]).unsqueeze(2))


def _encode_q4_1(rows: Tensor) -> Tensor | None:
    found = _affine(_groups(rows))
    if found is None:
        return None
    step, least, q = found
    panels = len(rows) // PANEL
    return torch.cat([_halves(step, panels), _halves(least, panels), _nibbles(q, panels)], 2)


def _decode_q4_1(packed: Tensor) -> Tensor:
    step, least = _numbers(packed[..., :64]).unsqueeze(2), _numbers(packed[..., 64:128]).unsqueeze(2)
    return _rows_of(_from_nibbles(packed[..., 128:]) * step + least)


FORMS: dict[str, StorageForm] = {
    form.name: form
    for form in (  # narrowest first, and of equal ones the one that is widened faster
        StorageForm("q4_0", torch.uint8, GROUP, 576, _encode_q4_0, _decode_q4_0),
        StorageForm("q4_1", torch.uint8, GROUP, 640, _encode_q4_1, _decode_q4_1),
        StorageForm("q8_0", torch.uint8, GROUP, 1088, _encode_q8_0, _decode_q8_0),
        StorageForm("bfloat16", torch.bfloat16, 1, PANEL, _encode_bfloat16, _decode_bfloat16),
        StorageForm("float16", torch.float16, 1, PANEL, _encode_float16, lambda packed: _by_row(packed.float())),
    )
}
"""The narrow ones by name, in the order in which they are tried."""


def narrowest(weight: Tensor) -> str:
    """The first form that holds every value of a float32 weight [N, K], bit by bit; "float32" where no other does."""
    assert weight.dtype is torch.float32
    n, k = weight.shape
    if not weight.numel():
        return "float32"
    sample = weight[:: max(1, n // PANEL)][:PANEL]  # of all the rows: most forms are refused by a few of them
    for form in FORMS.values():
        if form.takes(k) and form.encode(_filled(sample)) is not None:
            if all(form.encode(rows) is not None for _, rows in _pieces(weight)):
                return form.name
    return "float32"


def encode(weight: Tensor, form: StorageForm) -> Tensor | None:
    """[N, K] float32 -> packed; None where the form does not hold every value."""
    packed = torch.empty(form.shape(*weight.shape), dtype=form.dtype, device=weight.device)
    for panel, rows in _pieces(weight):
        part = form.encode(rows)
        if part is None:
            return None
        packed[panel : panel + len(part)] = part
    return packed


def _pieces(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Whole panels of the weight, and the number of the first."""
    n, k = weight.shape
    panels = max(1, CHUNK // (PANEL * max(1, k)))
    for panel in range(0, -(-n // PANEL), panels):
        yield panel, _filled(weight[panel * PANEL : (panel + panels) * PANEL])


def _filled(rows: Tensor) -> Tensor:
    """Contiguous, with rows of zeros up to a whole panel."""
    missing = -len(rows) % PANEL
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()
