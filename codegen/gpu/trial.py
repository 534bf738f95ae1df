"""What tree attention is tried on: shapes, random K/V and trees, and the readable reference in float64."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.errors import InvalidOption
from treespec_compiler.ir import attention

from .tree_attention_spec import AttentionKernel

# Of ‖out - reference‖ / ‖reference‖: sums of rounded products, and a softmax in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Workload:
    """New nodes of each of `requests` trees behind `context` committed tokens each."""

    nodes: int
    requests: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """`64x1x2048`: nodes, requests, context."""
        try:
            nodes, requests, context = map(int, text.split("x"))
        except ValueError:
            nodes = requests = context = 0
        if min(nodes, requests, context) < 1:
            raise InvalidOption(name="shape", got=text, expected="NODESxREQUESTSxCONTEXT, such as 64x1x2048")
        return cls(nodes, requests, context)

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for."""
        return self.context + max(64, self.nodes)

    def __str__(self) -> str:
        return f"{self.nodes}x{self.requests}x{self.context}"


class Trial:
    """A random forest behind random K/V: `requests` binary trees, or chains, of `nodes` nodes, all of them new."""

    def __init__(
        self, spec: AttentionKernel, shape: Workload, device: torch.device, seed: int = 0, chain: bool = False
    ) -> None:
        self.spec, self.shape = spec, shape
        self.scale = 1 / math.sqrt(spec.key_dim)
        random = torch.Generator(device).manual_seed(seed)
        nodes, requests, context = shape.nodes, shape.requests, shape.context
        total = nodes * requests

        def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(size, generator=random, device=device, dtype=torch.float32).to(dtype)

        def pool(dim: int) -> Tensor:  # [requests, kv_heads, capacity, dim]
            return normal(requests, spec.kv_heads, shape.capacity, dim, dtype=spec.pool_dtype)

        self.q = normal(1, total, spec.heads, spec.key_dim, dtype=spec.dtype).transpose(1, 2)
        self.pool_k, self.pool_v = pool(spec.key_dim), pool(spec.value_dim)
        rows, depths = ([[]] * nodes, [*range(nodes)]) if chain else binary_tree(nodes)

        def integers(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.ancestors = integers(rows * requests)
        self.positions = integers([context + d for d in depths] * requests)
        self.write_index = integers([r * shape.capacity + context + i for r in range(requests) for i in range(nodes)])
        self.node_offsets = integers([r * nodes for r in range(requests + 1)])
        self.page_table = integers([[r] for r in range(requests)])
        self.prefix_lens, self.tree_lens = integers([context] * requests), integers([nodes] * requests)
        self.slopes = normal(spec.heads).abs() * 0.01 if spec.slopes else None
        self.bias = normal(spec.heads, 128) if spec.bias else None
        self.sinks = normal(spec.heads) if spec.sinks else None

    def changes(self) -> tuple[Any, ...]:
        """Arguments from the window on."""
        spec = self.spec
        return spec.mask.window, spec.mask.chunk, spec.softcap, self.slopes, self.bias, self.sinks

    def arguments(self) -> tuple[Any, ...]:
        """Of `tree_attention.attend`, in its order."""
        return (
            self.q, self.pool_k, self.pool_v, self.positions, self.node_offsets, self.page_table, self.prefix_lens,
            self.tree_lens, self.ancestors, self.scale, *self.changes(),
        )  # fmt: skip

    def expected(self) -> Tensor:
        """The op's reference in float64; on the CPU, since it reads every node's ancestors."""
        at = self.prefix_lens[:, None].cpu() + torch.arange(self.shape.nodes)  # [R, nodes]
        request = torch.arange(self.shape.requests)[:, None]
        q, pool_k, pool_v = (x.cpu().double() for x in (self.q, self.pool_k, self.pool_v))
        # What lies there is written there again.
        k, v = (p[request, :, at].flatten(0, 1).transpose(0, 1).unsqueeze(0) for p in (pool_k, pool_v))
        meta: list[Any] = [
            self.positions, self.write_index, self.node_offsets, self.page_table, self.prefix_lens, self.tree_lens,
            self.ancestors, self.scale, *self.changes(),
        ]  # fmt: skip
        meta = [x.cpu() if isinstance(x, Tensor) else x for x in meta]
        return attention.reference(q, k, v, pool_k, pool_v, *meta)

    @property
    def bytes(self) -> int:
        """The fewest that must move: seen keys and values once, queries, and the output."""
        spec, shape = self.spec, self.shape
        seen = min(shape.context, spec.mask.window or shape.context, spec.mask.chunk or shape.context) + shape.nodes
        tokens = seen * shape.requests * spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.pool_dtype.itemsize
        rows = shape.nodes * shape.requests * spec.heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize
        return tokens + rows


@functools.cache
def binary_tree(nodes: int) -> tuple[list[list[int]], list[int]]:
    """Packed ancestor rows and depths; node i hangs below node (i - 1) // 2."""
    words = -(-nodes // 64)
    rows: list[list[int]] = []
    depths: list[int] = []
    for node in range(nodes):
        path = []
        at = node
        while at >= 0:
            path.append(at)
            at = (at + 1) // 2 - 1
        bits = [sum(1 << (j % 64) for j in path if j // 64 == w) for w in range(words)]
        rows.append([b - (1 << 64) if b >> 63 else b for b in bits])
        depths.append(len(path) - 1)
    return rows, depths


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64, on the CPU; NaN where `found` has one."""
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
