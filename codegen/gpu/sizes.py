"""Sizes that kernels are compiled for."""

from __future__ import annotations

from treespec_compiler.ir.device import CUDA

PROMPT_CHUNK = CUDA.prompt_chunk
"""Tokens of a prompt that a GPU takes at once."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n; 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()
