"""What is different between devices, but for kernels (`ir.registry`): one record a backend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

UNKNOWN_BYTES = 2**32
"""Taken to be free where the machine does not say."""


@dataclass(frozen=True)
class DeviceProfile:
    """What the compiler and the runtime know of a kind of device. A device without a record is taken as `OTHER`."""

    kind: str
    prompt_chunk: int = 2048
    """Tokens of a prompt that run in one call."""
    synchronous: bool = False
    """Whether a call has ended when it returns: its inputs may be written again, reading its results waits for nothing,
    and sizes that only the device knows are known here."""
    records: bool = False
    """Whether steps can be recorded as CUDA graphs."""
    host_memory: bool = False
    """Whether its tensors are memory of the host: rows of logits are read as they are, and all at once."""
    empty_tables: bool = True
    """Whether kernels take an empty slot from a page table without pages, instead of looking at its page number."""
    pinned_copies: bool = False
    """Whether integers go to the device from pinned memory, without waiting."""
    direct_calls: bool = False
    """Whether the wrappers around Inductor's code are worth leaving out."""
    repeats: bool = False
    """Whether layers that are alike are compiled once and called in turn, which takes some 10 us a call."""
    packs: frozenset[torch.dtype] = frozenset()
    """Dtypes of weights that products read faster in an order of their own."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's settings, beside those of every device."""

    def describe(self, device: torch.device) -> str:
        """The device, as a table of measurements names it."""
        return f"{self.kind}, {os.cpu_count()} cores"

    def synchronize(self) -> None:
        """Wait until everything that was started has ended."""

    def free_bytes(self, device: torch.device) -> int:
        """Of its memory; 0 where that is not known, or nothing large is to be put there."""
        return 0

    def number(self, device: torch.device) -> int:
        """Which of several it is; -1 where there is one."""
        return -1

    def capability(self, device: torch.device) -> int:
        """NVIDIA's major number of what it can compute; 0: another maker's."""
        return 0


class _Cpu(DeviceProfile):
    def free_bytes(self, device: torch.device) -> int:
        try:
            with open("/proc/meminfo") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return UNKNOWN_BYTES


class _Cuda(DeviceProfile):
    def describe(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self, device: torch.device) -> int:
        return torch.cuda.mem_get_info(device)[0]

    def number(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def capability(self, device: torch.device) -> int:
        return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


CPU = _Cpu(
    "cpu",
    # A CPU computes at its peak from some dozens of rows on, and more are more scores at a time.
    prompt_chunk=256,
    synchronous=True,
    host_memory=True,
    empty_tables=False,
    direct_calls=True,
    repeats=True,
    packs=frozenset({torch.float32}),
    # Between the matrix products a step has only microseconds of work: a barrier costs more than it saves, and far more
    # when a core is busy. Measured, 11.5M parameters, 2 threads, one node: 0.92 ms with Inductor's own threads, 0.72
    # with one; the C++ wrapper takes a 0.5M-parameter draft from 0.118 to 0.093 ms.
    inductor={"cpp.threads": 1, "cpp_wrapper": True},
)
# It reads weights for about 200 rows in the time it computes with them (H200, bfloat16), and needs several times that
# to be busy with computing. Measured on none yet.
CUDA = _Cuda("cuda", prompt_chunk=2048, records=True, pinned_copies=True)
OTHER = DeviceProfile("other")

_PROFILES = {each.kind: each for each in (CPU, CUDA)}


@cache  # asked several times a step
def profile(device: torch.device | str) -> DeviceProfile:
    """The record of the device's backend."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    found = _PROFILES.get(kind)
    return replace(OTHER, kind=kind) if found is None else found
