"""Launchers of the fixed kernels bind their arguments as on a GPU: Triton's own launcher up to the launch itself."""

from __future__ import annotations

import os
import types
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET makes no kernels to launch", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from treespec_compiler.codegen.gpu import (
    accept,
    append,
    commit,
    recurrence,
    recurrence_check,
    stochastic_accept,
    tree_attention,
)
from treespec_compiler.codegen.gpu.kernels import accept as accept_kernels
from treespec_compiler.codegen.gpu.kernels import append as append_kernels
from treespec_compiler.codegen.gpu.kernels import commit as commit_kernels
from treespec_compiler.codegen.gpu.kernels import recurrence_blocks, recurrence_paths
from treespec_compiler.codegen.gpu.kernels import stochastic_accept as stochastic_kernels
from treespec_compiler.speculation.verifiers import on_device

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
def variants() -> dict[str, set[str]]:
    """What was compiled of each kernel."""
    return defaultdict(set)


@pytest.fixture
def launched(monkeypatch: Any, variants: dict[str, set[str]]) -> Any:
    """Names of the kernels that were bound and compiled, and their grids."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    class Bound:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                done = self.kernel.warmup(*args, grid=grid, **options)
                variants[self.kernel.fn.__name__].add(done.hash)
                calls.append((self.kernel.fn.__name__, grid))

            return launch

    recurrences = (recurrence_blocks, recurrence_paths)
    for module in (accept_kernels, append_kernels, commit_kernels, stochastic_kernels, *recurrences):
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


def test_a_launch_is_compiled_as_it_is_launched(launched: Any) -> None:
    """Its types, constants and alignments are those that Triton's own launcher finds in the same arguments."""
    k, pool = torch.zeros(1, 7, 2, 128, dtype=BF16).transpose(1, 2), torch.zeros(2, 2, 64, 128, dtype=BF16)
    launch = append.append_launch(k, k, pool, pool, torch.arange(7))
    kernel = launch.kernel.kernel  # behind the stand-in
    types, constants, aligned = replace(launch, kernel=kernel).signature()
    assert launch.grid == (1, 2) and launch.constants["BLOCK_T"] == 8
    assert (types["k"], types["pool_v"], types["write_index"], types["nodes"]) == ("*bf16", "*bf16", "*i64", "i32")
    assert constants["k_d"] == constants["pool_k_d"] == 1 and "k_d" not in types
    assert {"k", "write_index", "page_size", "k_t", "k_h", "pool_k_page"} <= set(aligned) and "nodes" not in aligned
    odd = append.append_launch(
        k[..., :5], k[..., :5], pool[..., :5].contiguous(), pool[..., :5].contiguous(), k[0, 0, :, 0].long()
    )
    types, _, aligned = replace(odd, kernel=kernel).signature()
    assert types["pool_k_t"] == "i32" and "pool_k_t" not in aligned and "k_t" in aligned


@pytest.mark.family
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("chain", [False, True])
def test_recurrence(launched: Any, rows: int, chain: bool) -> None:
    shape = recurrence_check.RecurrenceShape(4, 2, 4, 16, rows, True, BF16, torch.float32)
    requests = [recurrence_check.Requested([1, 3, 5], 1), recurrence_check.Requested([1], 0)]
    recurrence.tree_recurrence(*recurrence_check.trial(shape, requests, chain, torch.device("cpu")))
    assert launched == [("tree_recurrence_blocks_kernel", (2, 4, 1)) if rows == 1 else
                        ("tree_recurrence_paths_kernel", (2, 1))]  # fmt: skip


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


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_trees_of_every_size_run_what_is_compiled(launched: Any, variants: Any, rule: str) -> None:
    """A compilation takes seconds, so a step of another size may not need one in the middle of a generation."""
    p = torch.zeros(40, 1000, dtype=F64)
    for nodes, draws in ((2, 1), (3, 2), (16, 15), (17, 19), (32, 31), (33, 35)):
        lists = [[1] * nodes, [-1] + [0] * (nodes - 1), [0, nodes], [0] * (nodes + 1), [1] * draws, [0] * draws]
        integers = on_device._integers(lists, torch.device("cpu"))
        numbers = torch.zeros(1, nodes + draws, dtype=F64)
        stochastic_accept.stochastic_accept(p[:nodes], p[:1], *integers, numbers, rule, 2)
    assert len(launched) == 6 * (3 if rule == "traversal" else 2)
    assert [len(found) for found in variants.values()] == [1, 1]


def test_greedy_walks_are_compiled_once_for_small_trees(launched: Any, variants: Any) -> None:
    logits = torch.zeros(1, 50_257, dtype=BF16)
    for nodes in (2, 3, 8, 9, 15, 16):
        lists = [[1] * nodes, [-1] + [0] * (nodes - 1), [0, nodes]]
        accept.greedy_accept(logits.expand(nodes, -1), *on_device._integers(lists, logits.device), 2.0**-7)
    assert len(launched) == 12 and len(variants["greedy_walk_kernel"]) == 1


def test_what_does_not_fit_32_bits_is_refused() -> None:
    """A pool of one page with tokens outermost, and queries of a very long chunk."""
    q, pool = torch.empty(1, 64, 8, 128, device="meta"), torch.empty(1, 64, 4096, 128, device="meta")
    integers = [torch.empty(*shape, dtype=torch.int64, device="meta") for shape in ((8,), (2,), (1, 1), (1,), (1,))]
    words = torch.empty(8, 1, dtype=torch.int64, device="meta")
    wide = torch.empty(1, 262_144, 64, 128, device="meta").transpose(1, 2)
    with pytest.raises(ValueError, match=r"a head's page of K or V over 2147483648 numbers.*\[pages, heads, tokens"):
        tree_attention.attend(q, wide, wide, *integers, words, 0.1)
    far = torch.empty(1, 128, 131_072, 128, device="meta")
    with pytest.raises(ValueError, match=r"got q over .* or pass fewer nodes at once"):
        tree_attention.attend(far, pool, pool, *integers, words, 0.1)
