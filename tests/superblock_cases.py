"""Matrices in GGUF's blocks of 256 values, drawn bit by bit: what gguf makes of them, and their headers."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

KINDS = {"q4_k": gguf.GGMLQuantizationType.Q4_K, "q6_k": gguf.GGMLQuantizationType.Q6_K}
HEADERS = {"q4_k": slice(0, 16), "q6_k": slice(192, 210)}
STEPS = {"q4_k": (0, 2), "q6_k": (208,)}
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
    raw = raw_blocks(form, n, k, seed)
    values = gguf.quants.dequantize(raw.reshape(n, -1), KINDS[form])
    return torch.from_numpy(values), torch.from_numpy(raw[..., HEADERS[form]].copy())
