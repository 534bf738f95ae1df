"""What a tree attention kernel is generated for, and the numbers it can be launched with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from treespec_compiler.codegen.gpu.sizes import power_of_two
from treespec_compiler.ir.specs import MaskSpec

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The dtypes there are kernels for, as Triton spells them."""


_CAUSAL = MaskSpec()


@dataclass(frozen=True)
class AttentionKernel:
    """What the source of a kernel depends on. Dims are of a head; slopes, bias and sinks: whether there are any."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    pool_dtype: torch.dtype
    mask: MaskSpec = _CAUSAL
    softcap: float = 0.0
    slopes: bool = False
    bias: bool = False
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def scored(self) -> bool:
        """Whether scores are changed by more than the scale."""
        return bool(self.softcap) or self.slopes or self.bias

    @property
    def largest_piece(self) -> int:
        """Of a dimension: float32 products without tensor cores keep a whole piece in registers."""
        return 32 if self.dtype == torch.float32 else 512

    def key(self) -> dict[str, str | int | float]:
        """As headers of generated source show it."""
        changes = [name for name in ("slopes", "bias", "sinks") if getattr(self, name)]
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "dtype": DTYPES[self.dtype],
            "pool": DTYPES[self.pool_dtype],
            "mask": self.mask.formula,
            "softcap": self.softcap,
            "also": "+".join(changes) or "nothing",
        }

    def tuning_key(self, nodes: int, requests: int, capacity: int) -> dict[str, str | int | float]:
        """What the best configuration depends on. `nodes`: of each request; `capacity`: tokens of a slot."""
        kind = "dense" if not (self.mask.window or self.mask.chunk) else "window"
        return {
            "dtype": DTYPES[self.dtype],
            "group": self.group,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "kind": f"scored {kind}" if self.scored else kind,
            "rows": nodes * self.group,
            "requests": requests * self.kv_heads,
            "capacity": min(capacity, self.mask.window or capacity, self.mask.chunk or capacity),
        }


@dataclass(frozen=True)
class Config:
    """A program's block of rows (nodes x heads of a group) and of keys, and how Triton compiles it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def as_dict(self) -> dict[str, int]:
        """As tuning tables hold it."""
        return {**{name.lower(): value for name, value in self.constexprs().items()}, **self.options()}


@dataclass(frozen=True)
class Piece:
    """Part of a head's dimensions: `size` is a power of two, of which `valid` exist."""

    start: int
    size: int
    valid: int


SMALLEST = 16  # tensor cores multiply along 16 numbers at least


def pieces(dim: int, largest: int = 512) -> tuple[Piece, ...]:
    """A head dimension as powers of two up to `largest`, few of them smaller: 192 = 128 + 64; 256 would load zeros."""
    out: list[Piece] = []
    start = small = 0
    while start < dim:
        rest = dim - start
        size = min(max(SMALLEST, 1 << (rest.bit_length() - 1)), largest)
        small += size < largest
        if rest > size and size < largest and small == 3:
            size *= 2
        out.append(Piece(start, size, min(size, rest)))
        start += size
    return tuple(out)


def default_config(spec: AttentionKernel, rows: int, arch: str = "sm_90") -> Config:
    """A configuration for `rows` rows of a request. In 16 bits it compiles without spills on every target."""
    wide = max(_padded(spec.key_dim), _padded(spec.value_dim))
    block_m = max(SMALLEST, power_of_two(rows))
    if torch.float32 in (spec.dtype, spec.pool_dtype):
        block_m = min(block_m, 32 if wide <= 128 and not spec.bias else 16)
        return Config(block_m, 32 if wide <= 128 else 16, 4, 1 if wide > 128 and arch.startswith("gfx") else 2)
    block_m = min(block_m, 128 if wide <= 128 else 64 if wide <= 256 else 16)
    block_n = 64 if wide <= 128 else 32 if wide <= 256 else 16
    num_warps = 8 if block_m * wide >= 128 * 64 or wide > 128 else 4
    if arch.startswith("sm_9"):
        return Config(block_m, block_n, num_warps, 3 if wide <= 128 else 2)
    # Without wgmma the products' operands lie in registers too.
    if arch.startswith("sm_8"):
        block_m = min(block_m, 64 if wide <= 128 else 32)
        num_warps = 8 if block_m == 64 or (wide > 128 and block_m == 16) else 4
        return Config(block_m, block_n if block_m == 16 else 32, num_warps, 3 if block_m == 64 else 2)
    if block_m >= 64:
        return Config(block_m, min(block_n, 32), num_warps, 2)
    return Config(block_m, block_n, 4, 2)


def search_space(spec: AttentionKernel) -> Iterator[Config]:
    """Every configuration worth compiling; which ones fit and use tensor cores is known after that."""
    wide = max(_padded(spec.key_dim), _padded(spec.value_dim))
    for block_m in (16, 32, 64, 128):
        for block_n in (16, 32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4):
                    if block_m * block_n >= 64 * num_warps and block_n * wide <= 128 * 256:
                        yield Config(block_m, block_n, num_warps, num_stages)


def split_count(programs: int, capacity: int, config: Config, processors: int) -> int:
    """How many programs share the committed tokens of a block of rows.

    `programs`: what is launched without splits; `capacity`: the most tokens there can be. Enough to fill the GPU once,
    or twice where blocks are small enough for two programs on a processor, but never less than a few blocks of keys for
    each: what a program gains must be more than what merging its part costs.
    """
    waves = 2 if config.block_m <= 32 else 1
    wanted = waves * processors // max(1, programs)
    return max(1, min(wanted, math.ceil(capacity / (4 * config.block_n)), MAX_SPLITS))


def merge_warps(parts: int) -> int:
    """Warps of a program of `merge`: every thread holds numbers of some of the parts."""
    return 8 if parts > 32 else 4


MAX_PARTS = 64
MAX_SPLITS = MAX_PARTS - 1  # the tree is one more part


def _padded(dim: int) -> int:
    return sum(piece.size for piece in pieces(dim))
