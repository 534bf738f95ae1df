"""GGUF's blocks of 256 values (Q4_K, Q5_K, Q6_K: ggml-quants.c), laid out for panels: the numbers are the file's own.

q4_k, 4.5 bits a weight: float16 d and dmin an output; three words an output, of eight scales s and minima m in six bits
each; then words of eight k for every output: q d s - dmin m, with s and m of 32 k.

q5_k, 5.5 bits: the same with 0 <= q < 32; a word an output of the fifth bits of every 32 k lies before their words.

q6_k, 6.5625 bits: float16 d an output, and sixteen scales s in eight bits; then, for every 32 k, four words of the low
nibbles of eight k and two words of the two high bits of sixteen k: (q - 32) d s, with s of 16 k.

A block's header (its steps, scales and minima) cannot be read off its values for certain, as those of smaller blocks
can: it comes from the file. The integers follow from values and header by a division, and every value is compared.
All products are exact in float32 (11 + 6 + 5 bits, 11 + 7 + 5), so that a value is rounded once, by the subtraction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .panels import GROUP, PANEL, StorageForm, five_bits, from_five_bits, from_nibbles, nibbles, numbers, rows_of

BLOCK = 256
_STEPS = BLOCK // 16
"""Scales of a block of q6_k."""


def _float16(two_bytes: Tensor) -> Tensor:
    """[.., 2] bytes -> [..] float32."""
    return two_bytes.contiguous().view(torch.float16).float().squeeze(-1)


def _by_output(part: Tensor, item: int) -> Tensor:
    """Bytes of headers, [32 p, blocks, items x item] -> [p, blocks, items x 32 outputs x item]."""
    items = part.unflatten(0, (-1, PANEL)).unflatten(3, (-1, item))  # [p, 32, blocks, items, item]
    return items.permute(0, 2, 3, 1, 4).flatten(2).contiguous()


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """[.., 12] bytes -> the eight scales and the eight minima, [.., 8] float32."""
    a, b, c = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([a & 63, (c & 15) | (a >> 2 & 48)], -1)
    minima = torch.cat([b & 63, (c >> 4) | (b >> 2 & 48)], -1)
    return scales.float(), minima.float()


def _integers(values: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    quotients = values / step.masked_fill(step == 0, 1.0)
    return quotients.round_().clamp_(least, most).nan_to_num_().add_(0.0)  # NOTE an integer has no negative zero


def _with_minima(bits: int, pack: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor | None]:
    def encode(rows: Tensor, headers: Tensor | None) -> Tensor | None:
        if headers is None:
            return None
        d, dmin = _float16(headers[..., :2]), _float16(headers[..., 2:4])
        if not (d.isfinite() & dmin.isfinite()).all():
            return None
        scales, minima = _six_bits(headers[..., 4:])
        step, least = (d.unsqueeze(-1) * scales).unsqueeze(-1), (dmin.unsqueeze(-1) * minima).unsqueeze(-1)
        values = rows.unflatten(1, (-1, BLOCK // GROUP, GROUP))  # [32 p, blocks, 8, 32]
        q = _integers(values + least, step, 0, (1 << bits) - 1)
        if not torch.equal((q * step).sub_(least).view(torch.int32), values.view(torch.int32)):
            return None
        words = pack(q.flatten(0, 2), len(rows) // PANEL).unflatten(1, (-1, BLOCK // GROUP)).flatten(2)
        header = [_by_output(headers[..., at:to], item) for at, to, item in ((0, 2, 2), (2, 4, 2), (4, 16, 4))]
        return torch.cat([*header, words], 2)

    return encode


def _from_minima(unpack: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def decode(packed: Tensor) -> Tensor:
        d, dmin = numbers(packed[..., :64]), numbers(packed[..., 64:128])
        words = packed[..., 128:512].unflatten(2, (3, PANEL, 4)).transpose(2, 3).flatten(3)
        scales, minima = _six_bits(words)  # [p, blocks, 32 outputs, 8]
        step = (d.unsqueeze(-1) * scales).transpose(2, 3).flatten(1, 2).unsqueeze(2)  # [p, 8 blocks, 1, 32]
        least = (dmin.unsqueeze(-1) * minima).transpose(2, 3).flatten(1, 2).unsqueeze(2)
        q = unpack(packed[..., 512:].unflatten(2, (BLOCK // GROUP, -1)).flatten(1, 2))
        return rows_of(q * step - least)

    return decode


def _encode_q6_k(rows: Tensor, headers: Tensor | None) -> Tensor | None:
    if headers is None:
        return None
    d, scales = _float16(headers[..., _STEPS:]), headers[..., :_STEPS].contiguous().view(torch.int8).float()
    if not d.isfinite().all():
        return None
    step = (d.unsqueeze(-1) * scales).unsqueeze(-1)
    values = rows.unflatten(1, (-1, _STEPS, BLOCK // _STEPS))  # [32 p, blocks, 16, 16]
    q = _integers(values, step, -32, 31)
    # NOTE of a step that is zero only the signs of its integers are left, in those of its zeros
    q = torch.where(step == 0, 0.0 - (values.signbit() != step.signbit()).float(), q)
    if not torch.equal((q * step).view(torch.int32), values.view(torch.int32)):
        return None
    panels, levels = len(rows) // PANEL, q.add_(32).to(torch.int32)
    low = nibbles((levels & 15).view(-1, GROUP), panels)  # [p, 8 blocks, 512]
    pairs = (levels >> 4).view(panels, PANEL, -1, 2, 16)  # [p, 32, 8 blocks, 2, 16 k]
    words = pairs[..., 0].clone()
    for i in range(1, 16):
        words |= pairs[..., i] << 2 * i
    high = words.permute(0, 2, 3, 1).contiguous().flatten(2).view(torch.uint8)  # [p, 8 blocks, 256]
    body = torch.cat([low, high], 2).unflatten(1, (-1, BLOCK // GROUP)).flatten(2)
    return torch.cat([_by_output(headers[..., _STEPS:], 2), _by_output(headers[..., :_STEPS], 1), body], 2)


def _decode_q6_k(packed: Tensor) -> Tensor:
    scales = packed[..., 64:576].contiguous().view(torch.int8).unflatten(2, (_STEPS, PANEL)).float()
    step = numbers(packed[..., :64]).unsqueeze(2) * scales  # [p, blocks, 16, 32]
    body = packed[..., 576:].unflatten(2, (BLOCK // GROUP, -1)).flatten(1, 2)  # [p, 8 blocks, 768]
    words = body[..., 512:].contiguous().view(torch.int32).unflatten(2, (2, 1, PANEL))
    shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=packed.device).view(16, 1)
    high = (words >> shifts & 3).flatten(2, 3)
    q = from_nibbles(body[..., :512]) + (16 * high - 32)
    blocks = q.unflatten(1, (-1, BLOCK // GROUP)).flatten(2, 3).unflatten(2, (_STEPS, -1))  # [p, blocks, 16, 16, 32]
    return rows_of((blocks * step.unsqueeze(3)).flatten(2, 3))


SUPERBLOCKS = (
    StorageForm("q4_k", torch.uint8, BLOCK, 4608, _with_minima(4, nibbles), _from_minima(from_nibbles), header=16),
    StorageForm("q5_k", torch.uint8, BLOCK, 5632, _with_minima(5, five_bits), _from_minima(from_five_bits), header=16),
    StorageForm("q6_k", torch.uint8, BLOCK, 6720, _encode_q6_k, _decode_q6_k, header=18),
)
