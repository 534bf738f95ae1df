"""What a program is made of in one state of its model's code, so that it can be taken again when the state returns."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..capture.call import CallSpec
from ..pipeline import Converted
from .executor import Bound, Executor
from .weights import WeightWatch


@dataclass(frozen=True)
class Made:
    """What was made of a model in one state of its code: the attributes of a program that go together."""

    _converted: Converted
    _watch: WeightWatch
    _bound: Bound
    _executor: Executor
    _variants: dict[Hashable, Executor]
    _commit: Any
    dtype: torch.dtype
    device: torch.device
    vocab_size: int

    def suits(self, model: nn.Module, call: CallSpec) -> bool:
        """Whether the model is again what this was made of, but for the contents of weights."""
        reads = self._converted.reads
        if reads is None or self._watch.incompatible() or self._watch.deep_mode_changed():
            return False
        return reads.changed(model, call) is None

    def rest(self) -> None:
        """Give up packed weights, which are made again when it is needed."""
        weights = self._converted.state.weights
        weights.changed(weights.sources)
        self._bound.tensors = {}
