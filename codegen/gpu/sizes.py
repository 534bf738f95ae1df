"""Sizes that kernels are compiled for."""

from __future__ import annotations

PROMPT_CHUNK = 2048
"""Tokens of a prompt that a GPU takes at once: it reads weights for about 200 rows in the time it computes with them
(H200, bfloat16), and needs several times that to be busy with computing. Measured on none yet."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n; 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()
