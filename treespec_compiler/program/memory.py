"""How much memory a process has held, and what of it a program is."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn

from ..capture.quantized_weights import own_tensors


@dataclass(frozen=True)
class Memory:
    """Of a program, in bytes."""

    peak: int = 0
    """The most that its process held at once until the program was there and compared with the model: reading the
    model, capture, packing and lowering. 0: the platform does not say."""
    model: int = 0
    """Parameters and buffers of the model, each storage once."""
    packed: int = 0
    """Weights that the program keeps beside the model's."""

    @classmethod
    def of(cls, model: nn.Module, packed: int) -> Memory:
        """As of now."""
        storages = [t.untyped_storage() for t in own_tensors((*model.parameters(), *model.buffers())) if not t.is_meta]
        return cls(peak_bytes(), sum({s.data_ptr(): s.nbytes() for s in storages}.values()), int(packed))


def peak_bytes() -> int:
    """The most memory that this process had at once; 0: the platform does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
