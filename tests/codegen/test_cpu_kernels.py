"""The C++ kernels: numbers, bitwise promises, the build and its cache, and how Inductor calls them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from forest_cases import check, forests
from hypothesis import given, settings
from torch._inductor.utils import run_and_get_code
from tree_cases import CASES, Case, attention_inputs, chain

from treespec_compiler.codegen import cpu
from treespec_compiler.codegen.cpu import build
from treespec_compiler.ir import ops, registry

compiled = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_attention(name, threads, with_threads):
    with_threads(threads)
    check(cpu.TREE_ATTENTION, CASES[name])


@compiled
@settings(max_examples=60, deadline=None)
@given(forests())
def test_attention_of_random_forests(case):
    check(cpu.TREE_ATTENTION, case)


@compiled
def test_attention_takes_any_strides():
    case = CASES["extend"]
    for change in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        other = Case(case.requests)
        other.q, other.k, other.v = change(case.q), change(case.k), change(case.v)
        check(cpu.TREE_ATTENTION, other)


@compiled
def test_values_that_nobody_sees_do_not_leak():
    case = CASES["ragged forest"]
    seen = torch.zeros(case.pool_k.shape[0], case.page_size, dtype=torch.bool)
    for r, (prefix, parents, _) in enumerate(case.requests):
        seen[case.meta.page_table[r, 0], : prefix + len(parents)] = True
    arguments = case.arguments()
    for pool in arguments[3:5]:
        pool[~seen.unsqueeze(1).expand(-1, case.kv_heads, -1)] = float("nan")
    torch.testing.assert_close(
        cpu.TREE_ATTENTION(*arguments).double(), case.expected()[0], atol=2e-5, rtol=2e-5, equal_nan=False
    )


@compiled
def test_large_scores_do_not_overflow():
    case = Case([(100, chain(5), 5)], page_size=128)
    case.q = case.q * 300
    arguments = case.arguments()
    torch.testing.assert_close(cpu.TREE_ATTENTION(*arguments).double(), case.expected()[0], atol=1e-3, rtol=1e-3)


@compiled
@pytest.mark.parametrize("prefix", [0, 30, 64, 200])
def test_a_chain_of_nodes_is_bitwise_the_tokens_one_by_one(prefix):
    whole = Case([(prefix, chain(40), 40)], page_size=256)
    arguments = whole.arguments()
    together = cpu.TREE_ATTENTION(*arguments)
    pools = whole.pool_k.clone(), whole.pool_v.clone()
    page = int(whole.meta.page_table[0, 0])
    for i in range(40):
        meta = Case([(prefix + i, [-1], 1)], page_size=256).meta
        alone = cpu.TREE_ATTENTION(
            whole.q[:, :, i : i + 1], whole.k[:, :, i : i + 1], whole.v[:, :, i : i + 1], *pools, meta.positions,
            torch.tensor([page * 256 + prefix + i]), meta.node_offsets, whole.meta.page_table, meta.prefix_lens,
            meta.tree_lens, meta.ancestors, whole.scale, 0,
        )  # fmt: skip
        assert torch.equal(alone[:, :, 0], together[:, :, i])


@compiled
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 13, 16, 17, 33, 64, 200])
@pytest.mark.parametrize("n,k", [(32, 32), (77, 65), (257, 300), (512, 96), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear(m, n, k, bias):
    x, weight = torch.randn(m, k), torch.randn(n, k)
    b = torch.randn(n) if bias else None
    expected = x.double() @ weight.double().T + (b if bias else 0)
    got = cpu.PACKED_LINEAR(x, ops.pack_weight(weight), b, n)
    assert got.is_contiguous() and got.shape == (m, n)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@compiled
def test_packed_linear_is_bitwise_independent_of_the_other_rows():
    x, packed, b = torch.randn(200, 300), ops.pack_weight(torch.randn(130, 300)), torch.randn(130)
    alone = torch.cat([cpu.PACKED_LINEAR(x[i : i + 1], packed, b, 130) for i in range(200)])
    for m in (2, 7, 8, 13, 16, 29, 64, 200):
        assert torch.equal(cpu.PACKED_LINEAR(x[:m], packed, b, 130), alone[:m])


@compiled
def test_packed_linear_takes_any_leading_dims_and_strides():
    weight = torch.randn(40, 24)
    packed = ops.pack_weight(weight)
    dense = [torch.randn(24), torch.randn(2, 3, 24), torch.randn(0, 24)]
    for x in (*dense, torch.randn(24, 5).T, torch.randn(6, 48)[:, ::2]):
        got = cpu.PACKED_LINEAR(x, packed, None, 40)
        torch.testing.assert_close(got, x @ weight.T, atol=1e-4, rtol=1e-5)
        assert got.is_contiguous()


@compiled
def test_errors_say_what_was_got():
    packed = ops.pack_weight(torch.randn(40, 24))
    with pytest.raises(RuntimeError, match="x has 23 features, the packed weight 24"):
        cpu.PACKED_LINEAR(torch.randn(2, 23), packed, None, 40)
    with pytest.raises(RuntimeError, match="out_features 100 does not fit 2 panels"):
        cpu.PACKED_LINEAR(torch.randn(2, 24), packed, None, 100)
    arguments = list(CASES["extend"].arguments())
    arguments[6] = arguments[6] + 10_000
    with pytest.raises(RuntimeError, match="outside a pool"):
        cpu.TREE_ATTENTION(*arguments)
    arguments = list(CASES["extend"].arguments())
    arguments[9] = arguments[9] + 10_000
    with pytest.raises(RuntimeError, match="tokens, its slot 64"):
        cpu.TREE_ATTENTION(*arguments)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_commit_path(dtype):
    pool = torch.randn(2, 3, 4, 16, 5).to(dtype)
    expected = pool.clone()
    src, dst = torch.tensor([18, 20, 21, 30, 33, 40]), torch.tensor([18, 19, 20, 21, 32, 33])
    other = torch.randn(1, 3, 2, 16, 7).to(dtype)
    expected_other = other.clone()
    ops.commit_path([expected, expected_other], src, dst)
    cpu.COMMIT_PATH([pool, other], src, dst)
    assert torch.equal(pool, expected) and torch.equal(other, expected_other)
    with pytest.raises(RuntimeError, match="no dst may be a later src"):
        cpu.COMMIT_PATH([pool], dst, src)
    with pytest.raises(RuntimeError, match="within the pool"):
        cpu.COMMIT_PATH([pool], src, dst + 48)


@compiled
def test_ops_are_wellformed():
    torch.library.opcheck(cpu.TREE_ATTENTION, CASES["extend"].arguments())
    torch.library.opcheck(
        cpu.PACKED_LINEAR, (torch.randn(3, 24), ops.pack_weight(torch.randn(40, 24)), torch.randn(40), 40)
    )
    pools = [torch.randn(1, 2, 1, 8, 4), torch.randn(2, 2, 3, 8, 6)]
    torch.library.opcheck(cpu.COMMIT_PATH, (pools, torch.tensor([3, 5]), torch.tensor([2, 3])))


@compiled
@pytest.mark.slow
def test_inductor_passes_the_pools_themselves():
    case = CASES["extend"]

    def layer(x, pool_k, pool_v, weight, *rest):
        t = x.shape[1]
        q, k, v = x.view(1, t, 3, 2, 32).transpose(1, 3).unbind(2)
        seen = cpu.TREE_ATTENTION(q, k, v, pool_k, pool_v, *rest, case.scale, 0)
        return cpu.PACKED_LINEAR(seen.transpose(1, 2).reshape(1, t, 64), weight, None, 64)

    with torch.no_grad():
        x = torch.randn(1, case.q.shape[2], 192)
        weight = ops.pack_weight(torch.randn(64, 64))
        pools = [case.pool_k.clone(), case.pool_v.clone()]
        eager = [p.clone() for p in pools]
        expected = layer(x, *eager, weight, *attention_inputs(case.meta))
        got, (code,) = run_and_get_code(
            torch.compile(layer, dynamic=True, fullgraph=True), x, *pools, weight, *attention_inputs(case.meta)
        )
    torch.testing.assert_close(got, expected)
    for mine, other in zip(pools, eager):
        assert torch.equal(mine, other)
    call = next(line for line in code.splitlines() if "treespec_cpu.tree_attention.default(" in line)
    tensors = re.findall(r"(?:reinterpret_tensor\(\w+|\b(?:arg|buf)\d+(?:_1)?)(?=,)", call.partition("default(")[2])
    assert all(t.startswith("arg") for t in tensors[3:5]), call
    assert "copy_" not in code and "clone" not in code


def in_a_process(code: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


USE = """
import torch
from treespec_compiler.codegen import cpu
from treespec_compiler.ir import ops, registry
kernel = registry.best_kernel(ops.packed_linear, "cpu", torch.float32)
x, w = torch.ones(3, 8), torch.ones(5, 8)
op = kernel.target if kernel else ops.packed_linear
print("answer", kernel and kernel.name, op(x, ops.pack_weight(w), None, 5).sum().item())
"""


@pytest.mark.rare
@compiled
@pytest.mark.slow
def test_two_processes_build_into_one_cache(tmp_path):
    quick = tmp_path / "c++"  # who is first is the question here, and not how fast the kernels are
    quick.write_text(f'#!/bin/sh\nexec {build.compiler()} "$@" -O0\n')
    quick.chmod(0o755)
    env = {"TREESPEC_CACHE_DIR": str(tmp_path), "CXX": str(quick)}
    both = [in_a_process(USE, **env) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=300)
        assert "answer native C++ 120.0" in out, out
    (library,) = (tmp_path / "cpu").iterdir()  # and nothing temporary
    before = library.stat().st_mtime_ns
    out, _ = in_a_process(USE, **env).communicate(timeout=300)
    assert "answer native C++ 120.0" in out
    assert library.stat().st_mtime_ns == before


def test_without_a_compiler_one_warning_and_the_reference(tmp_path):
    process = in_a_process(USE + USE, TREESPEC_CACHE_DIR=str(tmp_path), PATH=str(tmp_path), CXX="")
    out, _ = process.communicate(timeout=300)
    assert out.count("answer None 120.0") == 2, out
    assert out.count("no C++ compiler found") == 1, out


def test_torchs_extension_builder_is_imported_to_build_only():
    """A CUDA build of torch logs there that the machine has no GPU; every command would print it."""
    code = "import sys, treespec_compiler.codegen.cpu; print('builder', 'torch.utils.cpp_extension' in sys.modules)"
    out, _ = in_a_process(code).communicate(timeout=300)
    assert "builder False" in out, out


def test_a_failing_build_gives_its_reason(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "flags", lambda: ["-no-such-flag"])
    with caplog.at_level(logging.WARNING):
        assert not build.load.__wrapped__()
    assert "no-such-flag" in caplog.text
    assert not list((tmp_path / "cpu").iterdir())


def test_a_build_in_the_background_leaves_failures_to_load(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "flags", lambda: ["-no-such-flag"])
    with caplog.at_level(logging.WARNING):
        build.begin.__wrapped__()
        for thread in threading.enumerate():
            if thread.name == "treespec C++ kernels":
                thread.join()
        assert not caplog.text
        assert not build.load.__wrapped__()
    assert "no-such-flag" in caplog.text


def test_what_was_begun_is_not_built_twice(tmp_path, monkeypatch):
    built: list[int] = []
    done = tmp_path / "library.so"

    def slow() -> Any:
        if not done.exists():
            time.sleep(0.05)
            built.append(1)
            done.touch()
        return done

    monkeypatch.setattr(build, "_build", slow)
    build.begin.__wrapped__()
    assert build.build() == done and built == [1]


@compiled
def test_the_registry_binds_float32_on_cpu():
    assert registry.best_kernel(ops.tree_attention, "cpu", torch.float32).target is cpu.TREE_ATTENTION
    assert registry.best_kernel(ops.packed_linear, "cpu", torch.float32).target is cpu.PACKED_LINEAR
    assert registry.best_kernel(ops.tree_attention, "cpu", torch.float64).target is not cpu.TREE_ATTENTION


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
