"""A head's products: packed where the target runs with kernels, a plain product where gradients are wanted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from treespec_compiler.speculation.drafts.heads.products import HeadProduct, product_kernel


def target(kernels="auto", dtype=torch.float32):
    return SimpleNamespace(options=SimpleNamespace(kernels=kernels), device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(scope="module")
def kernel():
    found = product_kernel(target())
    assert found is not None
    return found


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_product_is_the_product(kernel, rows, biased):
    torch.manual_seed(0)
    weight, x = torch.randn(70, 96).bfloat16().float(), torch.randn(96, rows).t()
    bias = torch.randn(70) if biased else None
    product = HeadProduct(weight, bias, kernel)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product(x).double(), wanted, rtol=1e-5, atol=1e-4)


def test_what_a_file_has_in_sixteen_bits_is_read_in_sixteen(kernel):
    weight = torch.randn(64, 96)
    assert HeadProduct(weight.bfloat16().float(), None, kernel).bytes == 2 * weight.numel()
    assert HeadProduct(weight, None, kernel).bytes == 4 * weight.numel(), "no narrower form holds it"


def test_gradients_reach_a_weight_that_is_not_packed():
    weight = torch.randn(8, 4, requires_grad=True)
    HeadProduct(weight)(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((8, 4), 2.0))


@pytest.mark.parametrize("other", [target(kernels="reference"), target(dtype=torch.bfloat16)], ids=["option", "dtype"])
def test_no_kernel_where_none_is_wanted_or_fits(other):
    assert product_kernel(other) is None
