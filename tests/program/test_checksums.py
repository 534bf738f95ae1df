"""Checksums of weights: what they must notice, and that both kinds do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treespec_compiler.codegen import cpu
from treespec_compiler.program.checksums import checksums


def by_torch(tensor: Tensor) -> int:
    return checksums([tensor], native=False)[0]


native = pytest.param(
    lambda t: cpu.CHECKSUMS([t.contiguous()])[0],
    id="native",
    marks=pytest.mark.skipif(not cpu.load(), reason="no C++ compiler"),
)
kinds = pytest.mark.parametrize("checksum", [native, pytest.param(by_torch, id="torch")])


def changes(x: Tensor):
    """`x` with the smallest changes, or the same numbers elsewhere."""
    for place in (0, x.numel() // 2, x.numel() - 1):
        other = x.clone()
        other.view(-1)[place] += 1
        yield other
    yield x.flip(0)
    yield x.flip(1)
    yield x.mT
    yield x.roll(1, 0)
    yield torch.zeros_like(x)


@kinds
@pytest.mark.parametrize("size", [2, 5, 33, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_changes_are_noticed(checksum, size, dtype):
    x = torch.randint(-100, 100, (size, size)).to(dtype)
    known = checksum(x)
    assert checksum(x.clone()) == known
    for other in changes(x):
        assert torch.equal(other, x) or checksum(other.contiguous()) != known


@kinds
def test_any_number_of_bytes(checksum):
    seen = {checksum(torch.zeros(n, dtype=torch.uint8)) for n in range(1, 700)}
    if checksum is not by_torch:
        assert len(seen) == 699
    assert isinstance(checksum(torch.zeros(0)), int)


@pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")
def test_threads_and_neighbours_change_nothing():
    tensors = [torch.randn(n) for n in (1, 100, 70_000, 1_000_000)]
    together = cpu.CHECKSUMS(tensors)
    assert together == [cpu.CHECKSUMS([t])[0] for t in tensors]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert cpu.CHECKSUMS(tensors) == together
    finally:
        torch.set_num_threads(threads)
