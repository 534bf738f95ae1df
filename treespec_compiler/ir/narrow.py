"""Forms of packed weights: float32, and narrower ones for weights whose every value they hold exactly.

A packed weight is [panels, blocks of k, a block]: panel p holds outputs 32 p .. 32 p + 31, zeros past the last output.

| form | a block | bits a weight |
|---|---|---|
| float32 | 32 outputs of one k | 32 |
| bfloat16 | the same, output j beside output j + 16, so that both are one word of 32 bits | 16 |
| float16 | the same in order; finite values only | 16 |
| q8_0 | 32 k: a float16 step an output, then 32 outputs of each k in eight bits: q d | 8.5 |
| q5_1, q4_1 | 32 k: a float16 step and minimum an output, then words of eight k for every output: q d + m | 6, 5 |
| q5_0, q4_0 | 32 k: a float16 step an output, then such words: (q - 16) d, (q - 8) d | 5.5, 4.5 |
| q4_k, q5_k, q6_k | 256 k, with steps of steps: `ir.superblocks` | 4.5, 5.5, 6.5625 |
| i4, i8 | 32 k: a float32 step an output, then integers: `ir.integers` | 5, 9 |

Five bits have a word an output for the fifth bits of 32 k before the words of eight k.
The q's are GGUF's block types of these names (ggml-quants.c), laid out for panels. Which form a weight has is found
from its values: what a quantized file holds can be read off the numbers that it was blown up to. Forms with headers are
tried where these are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .encoders import encoder_of
from .integers import INTEGERS
from .panels import (
    GROUP,
    PANEL,
    StorageForm,
    by_panel,
    by_row,
    five_bits,
    from_five_bits,
    from_nibbles,
    halves,
    nibbles,
    numbers,
    rows_of,
    same_bits,
)
from .superblocks import SUPERBLOCKS

PackLevels: TypeAlias = Callable[[Tensor, int], Tensor]
UnpackLevels: TypeAlias = Callable[[Tensor], Tensor]

CHUNK = 1 << 17
"""Values that are looked at and packed at a time: what stays in a core's cache, and bounds the memory it takes."""
SOON = 2
"""After so many further levels none of a weight's groups fits: a quantizer uses its outermost ones nearly always."""


def _all_same_bits(made: Tensor, values: Tensor) -> Tensor:
    """[G] of groups [G, 32]. NOTE a look at all of them first: where the form is the right one, all are the same."""
    if torch.equal(made.view(torch.int32), values.view(torch.int32)):
        return torch.ones(len(made), dtype=torch.bool, device=made.device)
    return same_bits(made, values).all(1)


# -- 16 bits ----------------------------------------------------------------------------------------------------------


def _encode_bfloat16(rows: Tensor) -> Tensor | None:
    if (rows.view(torch.int32) & 0xFFFF).any():
        return None
    # NOTE bits are moved, not converted: NaN stays the NaN it is.
    high = (rows.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return by_panel(high).unflatten(2, (2, 16)).transpose(2, 3).flatten(2).contiguous()


def _decode_bfloat16(panels: Tensor) -> Tensor:
    in_order = panels.unflatten(2, (16, 2)).transpose(2, 3).flatten(2).contiguous()
    return by_row((in_order.view(torch.int16).to(torch.int32) << 16).view(torch.float32))


def _encode_float16(rows: Tensor) -> Tensor | None:
    half = rows.half()
    if not (half.isfinite() & same_bits(half.float(), rows)).all():
        return None
    return by_panel(half)


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


def _affine(groups: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """d, m and q of groups [G, 32] that are q d + m, rounded once, with float16 d and m and 0 <= q <= most; or None.

    The least value has q = 0 and the largest q = most where a quantizer has taken both from the weights; further pairs
    of levels are tried for groups in which it has not.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)  # NOTE each is vectorised, aminmax is not
    if not (low.isfinite() & high.isfinite()).all():
        return None
    fit = _Fit(groups)
    for tries, (below, above) in enumerate(_pairs(most)):
        values, bottom, top = fit.of(groups), fit.of(low), fit.of(high)
        d = ((top - bottom) / (above - below)).half().float()
        m = (bottom - below * d).half().float()
        q = _rounded((values - m).div_(_divisor(d)), 0, most)
        # NOTE the product is exact (11 and 5 bits), so that a fused multiplication and addition gives the same
        holds = _all_same_bits((q * d).add_(m), values) & (d.isfinite() & m.isfinite()).view(-1)
        if fit.take(holds, d, m, q):
            return fit.step, fit.least, fit.levels
        if tries == SOON and fit.none():
            return None
    return None


def _pairs(most: int) -> list[tuple[int, int]]:
    return [(0, top) for top in range(most, 0, -1)] + [(below, most) for below in range(1, most)]


def _groups(rows: Tensor) -> Tensor:
    return rows.reshape(-1, GROUP)


def _encode_q8_0(rows: Tensor) -> Tensor | None:
    found = _steps(_groups(rows), _EIGHT_BITS, -128, 127)
    if found is None:
        return None
    step, q = found
    panels = len(rows) // PANEL
    whole = q.to(torch.int8).view(panels, PANEL, -1, GROUP).permute(0, 2, 3, 1)
    return torch.cat([halves(step, panels), whole.contiguous().view(torch.uint8).flatten(2)], 2)


_EIGHT_BITS = [127, -127, -128]


def _decode_q8_0(packed: Tensor) -> Tensor:
    q = packed[..., 64:].contiguous().view(torch.int8).unflatten(2, (GROUP, PANEL)).float()
    return rows_of(q * numbers(packed[..., :64]).unsqueeze(2))


def _outermost_first(least: int) -> list[int]:
    """The levels least .. -least - 1 but zero."""
    return [level for top in range(-least, 0, -1) for level in ((-top, top) if top < -least else (-top,))]


def _signed(bits: int, pack: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], Tensor | None]:
    """Levels of either sign, stored from zero on."""
    least = -(1 << bits - 1)
    levels = _outermost_first(least)

    def encode(rows: Tensor) -> Tensor | None:
        found = _steps(_groups(rows), levels, least, -least - 1)
        if found is None:
            return None
        step, q = found
        panels = len(rows) // PANEL
        return torch.cat([halves(step, panels), pack(q - least, panels)], 2)

    return encode


def _from_signed(bits: int, unpack: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda packed: rows_of((unpack(packed[..., 64:]) - (1 << bits - 1)) * numbers(packed[..., :64]).unsqueeze(2))


def _with_minimum(bits: int, pack: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], Tensor | None]:
    def encode(rows: Tensor) -> Tensor | None:
        found = _affine(_groups(rows), (1 << bits) - 1)
        if found is None:
            return None
        step, least, q = found
        panels = len(rows) // PANEL
        return torch.cat([halves(step, panels), halves(least, panels), pack(q, panels)], 2)

    return encode


def _from_minimum(unpack: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def decode(packed: Tensor) -> Tensor:
        step, least = numbers(packed[..., :64]).unsqueeze(2), numbers(packed[..., 64:128]).unsqueeze(2)
        return rows_of(unpack(packed[..., 128:]) * step + least)

    return decode


def _of_values(encode: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor, Tensor | None], Tensor | None]:
    return lambda rows, headers: encode(rows)


def _signed_form(name: str, bits: int, width: int, pack: PackLevels, unpack: UnpackLevels) -> StorageForm:
    encode = _of_values(_signed(bits, pack))
    return StorageForm(name, torch.uint8, GROUP, width, encode, _from_signed(bits, unpack), (bits, False))


def _form_with_minimum(name: str, bits: int, width: int, pack: PackLevels, unpack: UnpackLevels) -> StorageForm:
    encode = _of_values(_with_minimum(bits, pack))
    return StorageForm(name, torch.uint8, GROUP, width, encode, _from_minimum(unpack), (bits, True))


FORMS: dict[str, StorageForm] = {
    form.name: form
    for form in (  # narrowest first, and of equal ones the one that is widened faster
        _signed_form("q4_0", 4, 576, nibbles, from_nibbles),
        _form_with_minimum("q4_1", 4, 640, nibbles, from_nibbles),
        _signed_form("q5_0", 5, 704, five_bits, from_five_bits),
        _form_with_minimum("q5_1", 5, 768, five_bits, from_five_bits),
        StorageForm("q8_0", torch.uint8, GROUP, 1088, _of_values(_encode_q8_0), _decode_q8_0, (8, False)),
        StorageForm("bfloat16", torch.bfloat16, 1, PANEL, _of_values(_encode_bfloat16), _decode_bfloat16),
        StorageForm("float16", torch.float16, 1, PANEL, _of_values(_encode_float16), lambda p: by_row(p.float())),
        *SUPERBLOCKS,
        *INTEGERS,
    )
}
"""The narrow ones by name, in the order in which they are tried."""


def narrowest(weight: Tensor, known: tuple[str, Tensor] | None = None) -> str:
    """A form that holds every value of a float32 weight [N, K], bit by bit: the one of which a file has told the
    headers (`known`: its name, and they), or the first whose blocks are found in the values; "float32" where none does.
    """
    assert weight.dtype is torch.float32
    n, k = weight.shape
    if not weight.numel():
        return "float32"
    if known is not None and _holds(FORMS[known[0]], weight, known[1]):
        return known[0]
    sample = weight[:: max(1, n // PANEL)][:PANEL]  # of all the rows: most forms are refused by a few of them
    for form in FORMS.values():
        if not form.header and form.takes(k) and form.encode(_filled(sample), None) is not None:
            if _holds(form, weight):
                return form.name
    return "float32"


def _holds(form: StorageForm, weight: Tensor, headers: Tensor | None = None) -> bool:
    if not form.takes(weight.shape[1]):
        return False
    pieces = _pieces(weight, headers)
    return _compiled(weight, form) is not None or all(form.encode(rows, part) is not None for _, rows, part in pieces)


def _compiled(weight: Tensor, form: StorageForm) -> Tensor | None:
    """The packed weight from compiled code; None: there is none for it, or it found no levels for a group."""
    encoder = encoder_of(weight) if form.levels is not None and weight.dtype is torch.float32 else None
    if encoder is None or form.levels is None:
        return None
    bits, minimum = form.levels
    if minimum:
        levels = _pairs((1 << bits) - 1)
    else:
        levels = [(0, top) for top in (_EIGHT_BITS if bits == 8 else _outermost_first(-(1 << bits - 1)))]
    return encoder(weight, bits, minimum, levels[: SOON + 1])


def encode(weight: Tensor, form: StorageForm, headers: Tensor | None = None) -> Tensor | None:
    """[N, K] float32 -> packed; None where the form does not hold every value.

    `headers`: [N, blocks, form.header] bytes, where the form has them.
    """
    found = _compiled(weight, form)
    if found is not None:
        return found
    packed = torch.empty(form.shape(*weight.shape), dtype=form.dtype, device=weight.device)
    for panel, rows, known in _pieces(weight, headers):
        part = form.encode(rows, known)
        if part is None:
            return None
        packed[panel : panel + len(part)] = part
    return packed


def _pieces(weight: Tensor, headers: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Whole panels of the weight, with the number of the first and their headers."""
    n, k = weight.shape
    panels = max(1, CHUNK // (PANEL * max(1, k)))
    for panel in range(0, -(-n // PANEL), panels):
        part = slice(panel * PANEL, (panel + panels) * PANEL)
        yield panel, _filled(weight[part]), None if headers is None else _filled(headers[part])


def _filled(rows: Tensor) -> Tensor:
    """Contiguous, with zeros up to a whole panel of rows."""
    missing = -len(rows) % PANEL
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows.contiguous()
