"""The kernels of Triton against the references at the edges of the contract: the calls of `conformance`."""

from __future__ import annotations

import pytest
import torch
from bfloat16 import exact_bfloat16
from conformance import check, conforming, dtypes_of

import treespec_compiler.codegen  # noqa: F401  (enters the kernels)

# NumPy warns of rows whose result nobody stores or reads.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")


@pytest.mark.family
@exact_bfloat16()
@pytest.mark.parametrize(
    ("kernel", "what"), conforming(interpreted=True), ids=lambda x: x if isinstance(x, str) else x.op._schema.name
)
def test_a_kernel_does_what_its_reference_does(kernel, what):
    for dtype in dtypes_of(kernel, (torch.float32, torch.float16)):
        check(kernel, what, dtype)
