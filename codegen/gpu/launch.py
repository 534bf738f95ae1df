"""One launch of a kernel: what runs it on a GPU is also what compiles it where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .offline import Offline, compile_offline

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}
"""As Triton spells them."""


@dataclass(frozen=True)
class Launch:
    """A `triton.jit` function with everything it is called with; tensors may be on the meta device, to be compiled."""

    kernel: Any = field(repr=False)
    grid: tuple[int, ...]
    arguments: tuple[Any, ...] = field(repr=False)
    """In order, without the constants: tensors and numbers."""
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    """Of loops that Triton pipelines."""
    fusion: bool = True
    """Whether a product and a sum may be rounded once."""

    def run(self) -> None:
        """On the device of the first tensor."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fusion}
        with torch.cuda.device_of(next(a for a in self.arguments if isinstance(a, Tensor))):
            self.kernel[self.grid](*self.arguments, **self.constants, **options)

    def signature(self) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
        """Types of the arguments, constants, and arguments that are multiples of 16, as Triton specializes them."""
        types: dict[str, str] = {}
        constants, aligned = dict(self.constants), []
        given = [p for p in self.kernel.params if p.name not in constants]
        for parameter, value in zip(given, self.arguments, strict=True):
            specialized = not parameter.do_not_specialize
            if isinstance(value, Tensor):
                types[parameter.name] = f"*{TYPES[value.dtype]}"
            elif isinstance(value, float):
                types[parameter.name] = "fp32"
            elif value == 1 and specialized:
                constants[parameter.name] = 1
                continue
            else:
                types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            known = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
            if known and specialized and not parameter.do_not_specialize_on_alignment:
                aligned.append(parameter.name)
        return types, constants, tuple(aligned)

    def compile(self, target: str) -> Offline:
        """For a target that need not be there, tensors taken to be aligned; see `compile_offline`."""
        types, constants, aligned = self.signature()
        return compile_offline(
            self.kernel, types, constants, target, self.num_warps, self.num_stages, aligned, self.fusion
        )


def on_meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """What a launch is given that is compiled and not run."""
    return torch.empty(*shape, dtype=dtype, device="meta")
