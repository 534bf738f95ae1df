"""Checks each variant of a recurrence's kernels on the device before its first use, as `self_check` attention's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.errors import WrongKernel
from treespec_compiler.ir.recurrence import by_row

from .. import aten_recurrence
from .source import kernel_versions
from .trial import TOLERANCE, binary_tree, relative_error

NODES = 37
"""Two blocks and a part of one."""


@dataclass(frozen=True)
class RecurrenceShape:
    """Of a site: a state [heads, key_dim, value_dim], `rows` of which decay apart; what a kernel is compiled for."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    rows: int
    delta: bool
    dtype: torch.dtype
    kept: torch.dtype
    """Of the stash and the state."""

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> RecurrenceShape:
        """Of the arguments of `tree_recurrence`, by name."""
        (heads, value_dim), (key_heads, key_dim) = call["v"].shape[2:], call["k"].shape[2:]
        rows, delta = by_row(call["decay"]).shape[3], call["beta"] is not None
        return cls(heads, key_heads, key_dim, value_dim, rows, delta, call["v"].dtype, call["stash"].dtype)

    @property
    def width(self) -> int:
        return self.key_heads * self.key_dim + self.heads * self.value_dim + self.heads * self.rows


@dataclass(frozen=True)
class Requested:
    """A request of a trial. `seen`: of each node, the bits of its ancestors and its own; new ones from `start` on."""

    seen: Sequence[int]
    start: int
    committed: bool = True


def trial(
    shape: RecurrenceShape, requests: Sequence[Requested], chain: bool, device: torch.device, fade: float = 0.5
) -> list[Any]:
    """Arguments of `tree_recurrence`: random ones, keys of length 1, decays down to -fade. A `chain` needs no bits."""
    random = torch.Generator(device).manual_seed(1)
    total, new = sum(len(r.seen) for r in requests), sum(len(r.seen) - r.start for r in requests)

    def normal(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(size, generator=random, device=device, dtype=torch.float32).to(dtype)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=random, device=device, dtype=torch.float32)

    def integers(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    q, k = (torch.nn.functional.normalize(normal(1, new, shape.key_heads, shape.key_dim), dim=3) for _ in range(2))
    rows = () if shape.rows == 1 else (shape.rows,)
    decay = -uniform(1, new, shape.heads, *rows) * fade
    beta = uniform(1, new, shape.heads).to(shape.dtype) if shape.delta else None
    stash = normal(total + 1, shape.width, dtype=shape.kept)
    stash[:, -shape.heads * shape.rows :].abs_().neg_()  # what was kept of earlier nodes are decays, too
    state = normal(len(requests) + 1, shape.heads, shape.key_dim, shape.value_dim, dtype=shape.kept)
    words = 0 if chain else -(-max(len(r.seen) for r in requests) // 64)
    bits = [[_signed(seen >> 64 * w) for w in range(words)] for r in requests for seen in r.seen[r.start :]]
    sizes = [len(r.seen) - r.start for r in requests]
    return [
        q, k, normal(1, new, shape.heads, shape.value_dim), decay.to(shape.dtype), beta, stash, state,
        integers([sum(sizes[:i]) for i in range(len(sizes) + 1)]), integers([7 * r.committed for r in requests]),
        integers([len(r.seen) for r in requests]), integers(bits).reshape(new, words),
        integers([*range(len(requests), 0, -1)]), integers([*range(total, 0, -1)]),
    ]  # fmt: skip


def _signed(word: int) -> int:
    """The low 64 bits as a signed integer."""
    return ((word & (1 << 64) - 1) ^ 1 << 63) - (1 << 63)


@functools.cache
def confirm(run: Callable[..., Tensor], shape: RecurrenceShape, chain: bool, device: torch.device) -> None:
    """Raise WrongKernel unless `run` gives and keeps what ATen's gives in float64.

    `run` is the op without this check. A request with nodes of earlier calls, and one without any.
    """
    seen = [(2 << i) - 1 if chain else binary_tree(NODES)[0][i][0] for i in range(NODES)]
    requests = [Requested(seen, NODES // 2), Requested(seen[:5], 0, committed=False)]
    with torch.inference_mode(False), torch.no_grad():
        call = trial(shape, requests, chain, device)
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in call]
        pairs = [(run(*call), aten_recurrence.tree_recurrence(*wide)), (call[5], wide[5])]
        error = max(relative_error(mine, theirs) for mine, theirs in pairs)
    tolerance = max(TOLERANCE[shape.dtype], TOLERANCE[shape.kept])
    if not error <= tolerance:  # NOTE written so that NaN is wrong too
        raise WrongKernel(
            kernel=f"a recurrence of {shape}",
            error=error,
            tolerance=tolerance,
            versions=", ".join(f"{name} {version}" for name, version in kernel_versions().items()),
        )
