"""What a tree attention kernel is generated for, and the numbers it can be launched with."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from treespec_compiler.ir.specs import MaskSpec

from .sizes import power_of_two

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The dtypes there are kernels for, as Triton spells them."""


def takes(call: Mapping[str, Any]) -> bool:
    """Whether there is a kernel for a call of tree attention: for none whose nodes have a bias of their own each."""
    return call["bias"] is None or call["bias"].dim() == 2


_CAUSAL = MaskSpec()
SMALLEST, LARGEST = 16, 256
"""Of a block: tensor cores multiply along 16 numbers at least, and scores lie in registers."""


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
    def tables(self) -> tuple[str, ...]:
        """The tensors that change scores, as arguments of the kernel."""
        return tuple(name for name in ("slopes", "bias", "sinks") if getattr(self, name))

    @property
    def key_pieces(self) -> tuple[Piece, ...]:
        return pieces(self.key_dim, *self._piece_sizes)

    @property
    def value_pieces(self) -> tuple[Piece, ...]:
        return pieces(self.value_dim, *self._piece_sizes)

    @property
    def _piece_sizes(self) -> tuple[int, int]:
        """The smallest and the largest.

        NOTE pieces of a head of 16 bits have 64 numbers at least, unless keys and values have the same 16 or 32. On an
        H200, Triton 3.6 multiplied smaller pieces of values wrongly where their loads were not pipelined (80 = 64 + 16,
        96 = 64 + 32, values of 32 with keys of 64), or read outside of shared memory (40 = 32 + 16).
        """
        if self.dtype == torch.float32:
            return SMALLEST, 32  # products without tensor cores keep a whole piece in registers
        small = self.key_dim == self.value_dim and self.key_dim in (16, 32)
        return (SMALLEST if small else 64), 512

    def key(self) -> dict[str, str | int | float]:
        """As headers of generated source show it."""
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "dtype": DTYPES[self.dtype],
            "pool": DTYPES[self.pool_dtype],
            "mask": self.mask.formula,
            "softcap": self.softcap,
            "also": "+".join(self.tables) or "nothing",
        }

    def tuning_key(self, nodes: int, requests: int, capacity: int, chain: bool = False) -> dict[str, str | int | float]:
        """What the best configuration depends on. `nodes`: of each request; `capacity`: tokens of a slot.

        `chain`: the kernel of prompts, which a configuration that was measured with trees says nothing about.
        """
        kind = "dense" if not (self.mask.window or self.mask.chunk) else "window"
        kind = f"chain {kind}" if chain else kind
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

    @classmethod
    def parse(cls, numbers: Mapping[str, int]) -> Config:
        """What a tuning table holds; raises ValueError, which says what was expected, where it is no configuration."""
        names = [field.name for field in fields(cls)]
        if set(numbers) != set(names):
            raise ValueError(" ".join(names))
        found = cls(**numbers)
        blocks, powers = (found.block_m, found.block_n), (found.block_m, found.block_n, found.num_warps)
        if any(n < 1 or n & (n - 1) for n in powers) or not all(SMALLEST <= n <= LARGEST for n in blocks):
            raise ValueError(f"powers of two, blocks from {SMALLEST} to {LARGEST}")
        if found.num_warps > 32 or not 1 <= found.num_stages <= 8:
            raise ValueError("at most 32 warps, and 1 to 8 stages")
        return found

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


def pieces(dim: int, smallest: int = SMALLEST, largest: int = 512) -> tuple[Piece, ...]:
    """A head dimension as powers of two from `smallest` to `largest`, the last one filled up: 192 = 128 + 64."""
    out: list[Piece] = []
    start = 0
    while start < dim:
        rest = dim - start
        size = 1 << (rest.bit_length() - 1)
        if size < rest and size <= smallest:  # what would be left is smaller
            size *= 2
        size = min(max(size, smallest), largest)
        out.append(Piece(start, size, min(size, rest)))
        start += size
    return tuple(out)


def default_config(spec: AttentionKernel, rows: int, arch: str = "sm_90") -> Config:
    """A configuration for `rows` rows of a request.

    In 16 bits the model families of tests/codegen/test_tree_attention_compiles.py compile without spills on every
    target, with Triton 3.6 and 3.9.
    """
    wide = max(_padded(spec.key_pieces), _padded(spec.value_pieces))
    block_m = max(SMALLEST, power_of_two(rows))
    if torch.float32 in (spec.dtype, spec.pool_dtype):
        return _exact_config(spec, block_m, wide, arch)
    block_m = min(block_m, 128 if wide <= 128 else 64 if wide <= 256 else 16)
    block_n = 64 if wide <= 128 else 32 if wide <= 256 else 16
    num_warps = 8 if block_m * wide >= 128 * 64 or wide > 128 else 4
    if arch.startswith("gfx") and (spec.bias or wide > 256):
        # One stage: Triton 3.6 cannot pipeline loads at computed places for AMD, nor do 576 numbers twice fit.
        return Config(min(block_m, 64 if wide <= 128 else 32), block_n if block_m < 64 else min(block_n, 32), 4, 1)
    if arch.startswith("gfx"):
        return Config(block_m, min(block_n, 32), num_warps, 2) if block_m >= 64 else Config(block_m, block_n, 4, 2)
    hopper, ampere = arch.startswith("sm_9"), arch.startswith("sm_8")
    in_pieces = len(spec.key_pieces) > 1 or len(spec.value_pieces) > 1
    if block_m <= 32 and in_pieces:
        block_n = min(block_n, 32)
    if hopper and block_m == 16 and wide == 128 and not in_pieces:
        return Config(block_m, 128, 4, 3)
    if (hopper or ampere) and block_m == 16 and 64 < wide <= 128:
        return Config(block_m, 32, 4, 4)  # 64 keys: Triton 3.6 spills 8 bytes
    masked = bool(spec.mask.window or spec.mask.chunk)
    if hopper and wide <= 128 and block_m >= 64:
        if wide > 64 and masked:
            block_n = 32  # comparing positions takes registers
        return Config(64, block_n, 4, 3)  # one warp group, so that a processor holds two programs
    if hopper:
        if block_m == 32 and in_pieces and min(spec.key_dim, spec.value_dim) > 128:
            block_m = 64  # 32 rows do not use warp groups' products, and spill
        return Config(block_m, block_n, num_warps, 3 if wide <= 128 else 2)
    # Without wgmma the products' operands lie in registers too.
    if ampere and wide > 128:
        if block_m == 16:
            return Config(16, block_n, 8, 2)
        # With a mask there is one pipeline instead of two, which takes fewer registers.
        if masked or wide <= 192:
            return Config(32, 32, 8 if len(spec.value_pieces) > 1 else 4, 2)
        return Config(32, 16, 8, 2)
    if ampere:
        block_m = min(block_m, 64 if wide <= 64 else 32)
        block_n = block_n if block_m == 16 else 32
        return Config(block_m, block_n, 8 if block_m == 64 else 4, 3 if block_m > 16 and not in_pieces else 2)
    if wide > 128:
        return Config(16 if block_m == 16 else 64, block_n, 8, 2)  # 32 rows spill, and have no tensor memory
    if block_m >= 64:
        return Config(block_m, min(block_n, 32), num_warps, 2)
    return Config(block_m, block_n, 4, 2)


def _exact_config(spec: AttentionKernel, block_m: int, wide: int, arch: str) -> Config:
    """In float32, without tensor cores: few rows, as a thread holds whole products."""
    block_m = min(block_m, 32 if wide <= 128 and not spec.bias else 16)
    block_n = 32 if wide <= 128 else 16
    if arch.startswith("gfx"):
        return Config(block_m, block_n, 4, 1 if wide > 128 or spec.bias else 2)
    ampere = arch.startswith("sm_8")
    if block_m == 16 and ampere == (wide > 64):
        block_n = 16  # 32 keys: 8 bytes are spilled
    return Config(block_m, block_n, 8 if ampere and block_m == 32 and wide <= 64 else 4, 2)


def search_space(spec: AttentionKernel) -> Iterator[Config]:
    """Every configuration worth compiling; which ones fit and use tensor cores is known after that."""
    wide = max(_padded(spec.key_pieces), _padded(spec.value_pieces))
    for block_m in (16, 32, 64, 128):
        for block_n in (16, 32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4):
                    if block_m * block_n >= 64 * num_warps and block_n * wide <= 128 * 256:
                        yield Config(block_m, block_n, num_warps, num_stages)


# What `split_count` estimates with: an H200 (132 processors), fitted to 13 sweeps over split counts, of 1 to 256 nodes
# behind 2048 to 131072 tokens. A processor is a multiprocessor, or a compute unit of AMD's.
SHARED_BYTES = 227 * 1024
"""Shared memory of a processor, which its resident programs share."""
REGISTER_FILE = 65536
"""Registers of a processor."""
FEW_REGISTERS, MANY_REGISTERS = 128, 255
"""A thread's, as the default configurations compile with 16 rows a program and with more."""
MEMORY_RATE = 35.6
"""Bytes a nanosecond and processor that memory gives when all of them read."""
PROCESSOR_RATE = 40.0
"""Bytes a nanosecond that one processor takes at most: of a few that have more to read than the others."""
PROGRAM_RATE = 27.0
"""Bytes a nanosecond that one program reads: products and softmax leave gaps, which another resident one fills."""
START = 4500.0
"""Nanoseconds until a kernel's programs are at work: its launch, and first loads that wait for each other."""
MERGE = 3000.0
"""Nanoseconds of `merge` with nothing to read."""
PART = 100.0
"""Nanoseconds that one more part takes beside its bytes: its programs start later, and `merge` weights more."""
MAX_WAVES = 4
"""Of resident programs: tokens at hand are fewer than `capacity`, and shares without any cost their start as well."""


@functools.lru_cache(4096)
def split_count(spec: AttentionKernel, programs: int, capacity: int, config: Config, processors: int) -> int:
    """How many programs share the committed tokens of a block of rows: the count of least estimated time.

    `programs`: what is launched without splits; `capacity`: the most tokens there can be. `attend` launches
    programs * (splits + 1), as the tree is one more part: the tokens of 16 programs, where each of 132 processors holds
    one, are shared by 7 rather than 8, whose trees would wait for a second wave. No share is below a block of keys, and
    of counts that give the same shares the smallest is taken.
    """
    blocks = max(1, math.ceil(capacity / config.block_n))
    in_waves = MAX_WAVES * resident_programs(spec, config) * processors // max(1, programs) - 1
    counts = range(1, max(1, min(in_waves, blocks, MAX_SPLITS)) + 1)
    return min(counts, key=lambda splits: (_attention_time(spec, programs, blocks, config, processors, splits), splits))


def resident_programs(spec: AttentionKernel, config: Config) -> int:
    """Programs of `attend` that a processor holds at once: by registers, and by shared memory for q and buffers."""
    registers = FEW_REGISTERS if config.block_m <= SMALLEST else MANY_REGISTERS
    q_bytes = config.block_m * _padded(spec.key_pieces) * spec.dtype.itemsize
    shared = q_bytes + config.num_stages * _block_bytes(spec, config)
    return max(1, min(REGISTER_FILE // (registers * config.num_warps * 32), SHARED_BYTES // shared))


def _attention_time(
    spec: AttentionKernel, programs: int, blocks: int, config: Config, processors: int, splits: int
) -> float:
    """Nanoseconds of `attend` and of `merge`. `blocks`: of keys, that each of `programs` is to read.

    The busiest processor takes its shares as fast as its resident programs can, all of them together not faster than
    memory gives them. The trees are launched last, each taken for one block: they cost nothing where the last wave has
    room for them. A part's rows are written in float32 by one kernel and read by the next.
    """
    bandwidth = processors * MEMORY_RATE
    resident = resident_programs(spec, config)
    block_bytes = _block_bytes(spec, config)
    share_bytes = math.ceil(blocks / splits) * block_bytes

    def rate(together: int) -> float:
        return min(together * PROGRAM_RATE, PROCESSOR_RATE)

    full, rest = divmod(math.ceil(programs * splits / processors), resident)
    busiest = share_bytes * (full * resident / rate(resident) + (rest / rate(rest) if rest else 0.0))
    memory = programs * splits * share_bytes / bandwidth
    attend = START + (busiest**6 + memory**6) ** (1 / 6)  # the larger, and more where they are alike
    if splits == 1:
        return attend
    late = math.ceil(math.ceil(programs * (splits + 1) / processors) / resident) - full - (rest > 0)
    attend += late * block_bytes / PROGRAM_RATE
    part_bytes = config.block_m * spec.value_dim * 4
    return attend + MERGE + (splits + 1) * (PART + 2 * programs * part_bytes / bandwidth)


def _block_bytes(spec: AttentionKernel, config: Config) -> int:
    """Of a block of keys and their values."""
    return config.block_n * (_padded(spec.key_pieces) + _padded(spec.value_pieces)) * spec.pool_dtype.itemsize


def merge_warps(spec: AttentionKernel, parts: int) -> int:
    """Warps of a program of `merge`: as few as hold the parts of a row, at most 64 numbers a thread.

    More would exchange sums through shared memory, and 64 nodes make 2048 programs.
    """
    numbers = power_of_two(parts) * power_of_two(spec.value_dim)
    return min(8, max(1, numbers // (64 * 32)))


MAX_PARTS = 64
MAX_SPLITS = MAX_PARTS - 1  # the tree is one more part


def _padded(parts: tuple[Piece, ...]) -> int:
    return sum(piece.size for piece in parts)
