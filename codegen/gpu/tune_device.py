"""Checks and times tree attention on a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tables
from .source import kernel_versions
from .tree_attention import attend
from .tree_attention_spec import AttentionKernel, Config
from .trial import Trial, Workload, relative_error
from .tune import OP

CHECKED_CONTEXT = 301
"""Tokens of a check: several blocks of keys and a rest."""
CHECKED_NODES = 40


class Inputs(Trial):
    """A trial that is launched."""

    def attend(self, config: Config | None = None, splits: int | None = None) -> Tensor:
        return attend(*self.arguments(), config=config, splits=splits)


class DeviceBench:
    """`check` and `measure` of a `Tuner`, on a real device."""

    def __init__(self, spec: AttentionKernel, device: torch.device, budget: float = 0.02) -> None:
        self.spec, self.device, self.budget = spec, device, budget
        self._inputs: tuple[Workload, Inputs] | None = None
        self._expected: dict[Workload, tuple[Inputs, Tensor]] = {}

    def check(self, config: Config, shape: Workload) -> float:
        """Worst error of a smaller case, with the keys shared out and not."""
        small = Workload(min(shape.nodes, CHECKED_NODES), min(shape.requests, 2), min(shape.context, CHECKED_CONTEXT))
        if small not in self._expected:
            inputs = Inputs(self.spec, small, self.device, seed=1)
            self._expected[small] = inputs, inputs.expected()
        inputs, expected = self._expected[small]
        errors = [relative_error(inputs.attend(config, splits), expected) for splits in (1, 3)]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def measure(self, config: Config, shape: Workload) -> float:
        from .timing import microseconds

        if self._inputs is None or self._inputs[0] != shape:
            self._inputs = None  # two of them may not fit
            self._inputs = shape, Inputs(self.spec, shape, self.device)
        inputs = self._inputs[1]
        return microseconds(lambda: inputs.attend(config), self.device, self.budget)


def empty_table(arch: str, device: torch.device) -> tables.TuningTable:
    """A table for this device without entries yet."""
    meta = {"device": torch.cuda.get_device_name(device), "versions": kernel_versions()}
    return tables.TuningTable(OP, arch, tables.kernel_hash(OP), (), meta)
