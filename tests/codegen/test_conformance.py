"""Every registered kernel of every op against the op's reference at the edges of the contract (`conformance`).

Kernels of Triton run the same calls in its interpreter: tests/codegen/interpreter/check_conformance.py.
"""

from __future__ import annotations

import pytest
import torch
from conformance import CALLS, check, conforming, dtypes_of, name_of, promised, takes

import treespec_compiler.codegen  # noqa: F401  (enters the kernels)
from treespec_compiler.ir import library
from treespec_compiler.ir.registry import Kernel, kernels

HERE = [(kernel, what) for kernel, what in conforming(interpreted=False) if kernel.target is not kernel.op]


@pytest.mark.parametrize(("kernel", "what"), HERE, ids=lambda x: x if isinstance(x, str) else x.name)
def test_a_kernel_does_what_its_reference_does(kernel: Kernel, what: str) -> None:
    if not kernel.available():
        pytest.skip("no C++ compiler")
    for dtype in dtypes_of(kernel, (torch.float32, torch.float16, torch.bfloat16, torch.float64)):
        check(kernel, what, dtype)


@pytest.mark.parametrize("what", CALLS["tree_attention"])
def test_a_reference_keeps_the_promises(what: str) -> None:
    call = CALLS["tree_attention"][what](torch.float64)
    promised(call, call.run(library.defined()["tree_attention"])[0])


def test_every_op_with_a_kernel_has_calls() -> None:
    assert {name for name, op in library.defined().items() if kernels(op)} == set(CALLS)


def test_every_kernel_has_calls() -> None:
    every = {(name_of(k.op), k.name) for op in library.defined().values() for k in kernels(op)}
    assert every == {(name_of(k.op), k.name) for interpreted in (False, True) for k, _ in conforming(interpreted)}


def test_what_a_kernel_does_not_take_is_left_out() -> None:
    (native,) = (k for k in kernels(library.defined()["tree_attention"]) if k.name == "native C++")
    assert not takes(native, CALLS["tree_attention"]["weights by relu"](torch.float32))
    assert takes(native, CALLS["tree_attention"]["a window of 2"](torch.float32))


def test_a_kernel_that_lets_nan_through_is_found() -> None:
    (aten,) = (k for k in kernels(library.defined()["tree_attention"]) if k.name == "aten")
    call = CALLS["tree_attention"]["a value of NaN"](torch.float32)
    result, _ = call.run(aten.target)
    result[:, :, 0] = torch.nan
    with pytest.raises(AssertionError, match="row 0"):
        promised(call, result)
