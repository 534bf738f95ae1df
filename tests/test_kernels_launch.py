"""Launchers of the fixed kernels bind their arguments as on a GPU: Triton's own launcher up to the launch itself."""

from __future__ import annotations

import os
import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET makes no kernels to launch", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from treespec_compiler.codegen.gpu import accept, append, commit, stochastic_accept
from treespec_compiler.codegen.gpu.kernels import accept as accept_kernels
from treespec_compiler.codegen.gpu.kernels import append as append_kernels
from treespec_compiler.codegen.gpu.kernels import commit as commit_kernels
from treespec_compiler.codegen.gpu.kernels import stochastic_accept as stochastic_kernels

BF16, F64 = torch.bfloat16, torch.float64


class Driver:
    """An H200 that is not there."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132}
    )

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: Any) -> Any:
    """Names of the kernels that were bound and compiled, and their grids."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    class Bound:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                self.kernel.warmup(*args, grid=grid, **options)
                calls.append((self.kernel.fn.__name__, grid))

            return launch

    for module in (accept_kernels, append_kernels, commit_kernels, stochastic_kernels):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Bound(kernel))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return calls


def test_append(launched: Any) -> None:
    k, pool = torch.zeros(1, 7, 2, 128, dtype=BF16).transpose(1, 2), torch.zeros(2, 2, 64, 128, dtype=BF16)
    append.append(k, k, pool, pool.clone(), torch.arange(7))
    angles = torch.zeros(1, 7, 1, 64)[0, :, 0]
    append.rope_append(k, k, k, pool, pool.clone(), torch.arange(7), angles, angles, "interleaved", 64)
    assert launched == [("append_kernel", (1, 2)), ("rope_append_kernel", (1, 4))]


@pytest.mark.parametrize("moves", [1, 16])
def test_commit(launched: Any, moves: int) -> None:
    pools = [torch.zeros(4, 1, 2, 64, 128, dtype=BF16), torch.zeros(2, 1, 2, 64, 5, dtype=BF16)]
    commit.commit_path(pools, torch.arange(moves) + 9, torch.arange(moves) + 8)
    assert launched == [("commit_kernel", (12,))]


@pytest.mark.parametrize("nodes", [1, 64])
def test_greedy_accept(launched: Any, nodes: int) -> None:
    zeros = torch.zeros(nodes, dtype=torch.int64)
    accept.greedy_accept(torch.zeros(nodes, 50_257, dtype=BF16), zeros, zeros, torch.tensor([0, nodes]), 2.0**-7)
    assert [name for name, _ in launched] == ["row_best_kernel", "greedy_walk_kernel"]


@pytest.mark.parametrize("rule", ["naive", "multi-step", "recursive", "traversal"])
def test_stochastic_accept(launched: Any, rule: str) -> None:
    p = torch.zeros(2, 1000, dtype=F64)
    integers = [torch.tensor(numbers) for numbers in ([1, 2], [-1, 0], [0, 2], [0, 1, 1], [1], [0])]
    stochastic_accept.stochastic_accept(p, p[:1], *integers, torch.zeros(1, 3, dtype=F64), rule, 2)
    residuals = [("residual_kernel", (2,))] * (2 if rule == "traversal" else 1)
    assert launched == [*residuals, ("traversal_kernel" if rule == "traversal" else "chance_walk_kernel", (1,))]
