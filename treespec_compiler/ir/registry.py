"""Who implements which op: `treespec::X` in a graph is bound to the best kernel for its device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._ops import OpOverload


@dataclass(frozen=True)
class Kernel:
    """An implementation of `op` with the same schema, under the name `target`."""

    op: OpOverload
    target: OpOverload
    name: str
    device: str  # a device type, or "any"
    dtypes: frozenset[torch.dtype] | None  # None: any floating-point dtype
    priority: int
    available: Callable[[], bool]  # may be slow the first time (a build); asked only for kernels that fit
    capturable: bool = False  # never waits for the device, and writes no K/V where write_index is negative

    def fits(self, device: str, dtype: torch.dtype) -> bool:
        return self.device in (device, "any") and (self.dtypes is None or dtype in self.dtypes)


_KERNELS: dict[OpOverload, list[Kernel]] = {}


def register_kernel(
    op: OpOverload,
    *,
    device: str,
    dtypes: frozenset[torch.dtype] | None,
    priority: int,
    name: str,
    target: OpOverload,
    available: Callable[[], bool] = lambda: True,
    capturable: bool = False,
) -> Kernel:
    """Enter a kernel; one of the same name for the same op is replaced.

    `capturable`: whether a CUDA graph may hold it, with inputs that are padded (see `Kernel`).
    """
    kernel = Kernel(op, target, name, device, dtypes, priority, available, capturable)
    others = [k for k in _KERNELS.get(op, []) if k.name != name]
    _KERNELS[op] = sorted([*others, kernel], key=lambda k: -k.priority)
    return kernel


def kernels(op: OpOverload) -> tuple[Kernel, ...]:
    """Every kernel entered for `op`, best first, available or not."""
    return tuple(_KERNELS.get(op, ()))


def best_kernel(
    op: OpOverload, device: torch.device | str, dtype: torch.dtype, *, portable: bool = False
) -> Kernel | None:
    """The available kernel of highest priority; None: only the reference, which is `op` itself.

    `portable`: among those for any device.
    """
    kind = torch.device(device).type
    found = (k for k in kernels(op) if k.fits(kind, dtype) and (k.device == "any" or not portable))
    return next((k for k in found if k.available()), None)


def kernel_of(target: OpOverload) -> Kernel | None:
    """The kernel that was entered under this name."""
    return next((k for entered in _KERNELS.values() for k in entered if k.target is target), None)
