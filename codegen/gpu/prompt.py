"""Prompts into an empty slot: causal attention of the new nodes among themselves, by PyTorch's own flash kernels.

Where scores are more than a scaled product, or the prompt is longer than a window, the generated kernel runs instead.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Left to itself PyTorch prefers cuDNN on Hopper, which makes a plan for every new length of a prompt.
# NOTE not flash alone, though it is what runs: the setting is the whole process's, and other threads attend too.
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def is_causal_prompt(page_table: Tensor, ancestors: Tensor, scale: float, window: int = 0, chunk: int = 0,
                     softcap: float = 0.0, *changes: Tensor | None) -> bool:  # fmt: skip
    """Whether each new node sees exactly the new nodes up to itself, by plain scores: known from shapes alone.

    `changes`: slopes, bias and sinks.
    """
    nodes, words = ancestors.shape
    within = all(not size or nodes <= size for size in (window, chunk))
    plain = scale > 0 and not softcap and all(x is None for x in changes)
    return page_table.shape[1] == 0 and words == 0 and within and plain


def flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a flash kernel takes q [1, Hq, T, D], k and v [1, Hkv, T, D]: others would write all T x T scores."""
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1]))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[1, Hq, T, Dv], laid out as [1, T, Hq, Dv]."""
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(WITHOUT_CUDNN, set_priority=True):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # moves nothing where the kernel wrote it so
