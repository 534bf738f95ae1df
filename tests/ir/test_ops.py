"""The IR's ops: references against independent code in float64, and what torch demands of an op."""

from __future__ import annotations

import dataclasses

import modules
import pytest
import torch
from forest_cases import check, forests
from hypothesis import given, settings
from tree_cases import CASES, Case

import treespec_compiler as treespec
from treespec_compiler.codegen import cpu
from treespec_compiler.ir import library, ops, registry

ATEN = torch.ops.treespec_aten.tree_attention.default


@pytest.mark.parametrize("op", [ops.tree_attention, ATEN], ids=["reference", "aten"])
@pytest.mark.parametrize("name", CASES)
def test_attention(op, name):
    check(op, CASES[name])


@pytest.mark.parametrize("op", [ops.tree_attention, ATEN], ids=["reference", "aten"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 6])
def test_attention_dtypes(op, dtype, window):
    case = CASES["ragged forest"]
    check(op, Case(case.requests, page_size=case.page_size, dtype=dtype, window=window))


@settings(max_examples=15, deadline=None)
@given(forests())
def test_attention_of_random_forests(case):
    check(ops.tree_attention, case)
    check(ATEN, case)


def test_rows_of_no_request_are_zero():
    case = CASES["extend"]
    arguments = list(case.arguments())
    arguments[7] = torch.tensor([0, 4, 8])  # two of ten rows belong to nobody
    for op in (ops.tree_attention, ATEN):
        assert (op(*arguments)[:, :, 8:] == 0).all()


@pytest.mark.parametrize("op", [ops.tree_attention, ATEN], ids=["reference", "aten"])
def test_attention_is_a_wellformed_op(op):
    torch.library.opcheck(op, CASES["extend"].arguments())


@pytest.mark.parametrize("n,k", [(32, 8), (1, 1), (33, 5), (100, 64)])
def test_pack_round_trip(n, k):
    weight = torch.randn(n, k)
    packed = ops.pack_weight(weight)
    assert torch.equal(ops.unpack_weight(packed, n), weight)
    assert ops.packed_bytes(packed) == -(-n // 32) * 32 * k * 4


@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear(bias):
    x, weight = torch.randn(2, 3, 20), torch.randn(45, 20)
    b = torch.randn(45) if bias else None
    expected = x.double() @ weight.double().T + (b if bias else 0)
    got = ops.packed_linear(x, ops.pack_weight(weight), b, 45)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    torch.library.opcheck(ops.packed_linear, (x, ops.pack_weight(weight), b, 45))


def test_commit_path_moves_tokens_of_every_site():
    pools = [torch.randn(2, 3, 4, 16, 5), torch.randn(1, 3, 2, 16, 8)]
    before = [pool.clone() for pool in pools]
    src, dst = torch.tensor([18, 20, 21, 30, 33, 40]), torch.tensor([18, 19, 20, 21, 32, 33])
    ops.commit_path(pools, src, dst)
    for pool, old in zip(pools, before):
        expected = old.clone()
        for s, d in zip(src.tolist(), dst.tolist()):
            expected[:, d // 16, :, d % 16] = old[:, s // 16, :, s % 16]
        assert torch.equal(pool, expected)


@pytest.mark.parametrize(
    ("choice", "namespace"), [("auto", "treespec_cpu"), ("aten", "treespec_aten"), ("reference", "treespec")]
)
def test_the_option_says_which_kernels_are_bound(choice, namespace):
    if choice == "auto" and not cpu.load():
        pytest.skip("no C++ compiler")
    program = treespec.tree_program(modules.NanoGPT().eval(), options={"lowering": "eager", "kernels": choice})
    targets = [str(node.target) for node in program.graph_module.graph.nodes if "tree_attention" in str(node.target)]
    assert targets == [f"{namespace}.tree_attention.default"] * len(program.sites)
    packed = any("packed_linear" in str(node.target) for node in program.graph_module.graph.nodes)
    assert packed == (choice == "auto")


def test_registry_prefers_available_kernels_of_high_priority():
    op = ops.tree_attention
    names = [k.name for k in registry.kernels(op)]
    assert names.index("native C++") < names.index("aten")
    assert registry.best_kernel(op, "cpu", torch.bfloat16).target is ATEN
    assert registry.best_kernel(op, torch.device("meta"), torch.float32).target is ATEN
    assert registry.best_kernel(ops.packed_linear, "cpu", torch.bfloat16) is None
    assert registry.best_kernel(op, "cpu", torch.float32, portable=True).target is ATEN
    assert registry.best_kernel(ops.packed_linear, "cpu", torch.float32, portable=True) is None

    def register(name, available):
        registry.register_kernel(op, op, device="meta", priority=99, name=name, available=lambda: available)

    before = registry._KERNELS[op]
    try:
        register("absent", False)
        assert registry.best_kernel(op, "meta", torch.float32).target is ATEN
        register("absent", True)
        assert registry.best_kernel(op, "meta", torch.float32).target is op
        assert registry.best_kernel(op, "cpu", torch.float16).target is ATEN
    finally:
        registry._KERNELS[op] = before


def test_on_cuda_a_cache_is_committed_by_one_triton_launch():
    pytest.importorskip("triton", reason="needs triton")
    kernel = registry.best_kernel(ops.commit_path, "cuda", torch.bfloat16)
    assert kernel is not None and kernel.name == "triton"


def test_another_schema_is_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is part of the key of what Inductor keeps on disk."""
    before = library.fingerprint()
    assert before == library.fingerprint()
    made = library._DEFINITIONS[ops.packed_linear]
    other = dataclasses.replace(made, schema=made.schema.replace(", str form", ""))
    monkeypatch.setitem(library._DEFINITIONS, ops.packed_linear, other)
    assert library.fingerprint() != before
