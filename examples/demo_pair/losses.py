"""Cross-entropy against a mix of the text and the target's distribution, with a hand-written gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        logp = torch.log_softmax(logits.float(), -1)
        loss = -(torch.dot(wanted.flatten(), logp.flatten())) / logits.shape[0]
        ctx.save_for_backward(logp.exp_().sub_(wanted).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (grads[0] / difference.shape[0]), None


def soft_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """-mean_n sum_v wanted[n, v] log softmax(logits[n])[v]; logits and wanted [N, V], rows of `wanted` sum to 1"""
    return _SoftCrossEntropy.apply(logits, wanted)


def mixed_distribution(teacher_probs: Tensor, labels: Tensor, text_share: float) -> Tensor:
    """(1 - text_share) * teacher + text_share * one-hot label: [N, V], [N] -> [N, V]"""
    mixed = teacher_probs * (1.0 - text_share)
    mixed.scatter_add_(1, labels[:, None], torch.full_like(mixed[:, :1], text_share).expand(-1, 1))
    return mixed


def one_hot(labels: Tensor, vocab: int) -> Tensor:
    """[N] -> float32 [N, V]"""
    return torch.zeros(labels.shape[0], vocab, device=labels.device).scatter_(1, labels[:, None], 1.0)
