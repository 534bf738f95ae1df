"""Muon: momentum whose matrix updates are orthogonalised by Newton-Schulz steps (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# One quintic repeated: singular values end between about 0.7 and 1.2. Faster schedules of coefficients (Polar Express,
# arXiv 2505.16932) leave the region of convergence through bf16 rounding unless they are damped; undamped, they let
# one key projection grow to a spectral norm of 44 here.
STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, r, c] with r <= c -> about the nearest matrices with orthonormal rows, bf16"""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x


class Muon(torch.optim.Optimizer):
    """For 2-d hidden weights only; equal shapes are orthogonalised in one batched product."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[min(weight.shape), max(weight.shape)].append(weight)
            for weights in by_shape.values():
                self._update(weights, group)

    def _update(self, weights: list[nn.Parameter], group: dict) -> None:
        directions = []
        for weight in weights:
            buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            buffer.lerp_(weight.grad, 1 - group["momentum"])
            nesterov = weight.grad.lerp(buffer, group["momentum"])
            directions.append(nesterov if weight.shape[0] <= weight.shape[1] else nesterov.mT)
        for weight, update in zip(weights, orthogonalise(torch.stack(directions)), strict=True):
            rows, columns = weight.shape
            update = update if rows <= columns else update.mT
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
