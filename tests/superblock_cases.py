"""Matrices in forms with headers: in GGUF's blocks of 256 values, drawn bit by bit, and in integers with steps."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

KINDS = {form: getattr(gguf.GGMLQuantizationType, form.upper()) for form in ("q4_k", "q5_k", "q6_k")}
HEADERS = {"q4_k": slice(0, 16), "q5_k": slice(0, 16), "q6_k": slice(192, 210)}
STEPS = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
"""Where float16 numbers lie in a block."""


def raw_blocks(form: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """[n, blocks, bytes of a block]: any integers and scales, steps of ordinary size, and the smallest one there is."""
    random = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[KINDS[form]][1]
    raw = random.integers(0, 256, (n, k // 256, size), dtype=np.uint8)
    for at in STEPS[form]:
        steps = (random.standard_normal((n, k // 256)) / 1000).astype(np.float16)
        steps[0, 0] = 2.0**-24
        raw[..., at : at + 2] = steps[..., None].view(np.uint8)
    return raw


def superblocks(form: str, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The float32 numbers [n, k] that random blocks stand for, and their headers."""
    if form not in KINDS:
        return _integers(int(form[1:]), n, k, seed)
    raw = raw_blocks(form, n, k, seed)
    values = gguf.quants.dequantize(raw.reshape(n, -1), KINDS[form])
    return torch.from_numpy(values), torch.from_numpy(raw[..., HEADERS[form]].copy())


def _integers(bits: int, n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of so many bits, with steps of 24."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k // 32, 32), generator=random).float()
    steps = torch.rand(n, k // 32, 1, generator=random) / 100
    return (q * steps).view(n, k), steps.view(torch.uint8)
