"""Counts the steps of every optimizer: fused ones write weights without counting a version of the tensors."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_count = 0
_hook: Any = None


def steps() -> int:
    """Optimizer steps in this process since this was first called."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    return _count


def _after_step(*_: Any) -> None:
    global _count
    _count += 1
