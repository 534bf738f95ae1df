"""The C++ product on narrow weights: bitwise the product on float32 ones, for any number of rows, beside any others."""

from __future__ import annotations

import pytest
import torch
from superblock_cases import superblocks
from torch import Tensor

from treespec_compiler.codegen import cpu
from treespec_compiler.ir import encoders, ops
from treespec_compiler.ir.narrow import FORMS, _compiled, encode, narrowest

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")

SIZES = [(32, 32), (77, 64), (257, 320), (130, 96), (1, 32)]
LARGE = [(77, 256), (33, 768)]
ODD = [(77, 65), (5, 3), (1, 1)]  # of k too: no blocks


def exactly(form: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight that the form holds, with its smallest and largest numbers; and the weight packed."""
    if FORMS[form].header:
        weight, headers = superblocks(form, n, k)
        return weight, ops.pack_weight(weight, form, headers)
    weight = by_value(form, n, k)
    return weight, ops.pack_weight(weight, form)


def by_value(form: str, n: int, k: int) -> Tensor:
    random = torch.Generator().manual_seed(n * k)
    if form in ("bfloat16", "float16"):
        dtype = FORMS[form].dtype
        weight = torch.randn(n, k, generator=random).to(dtype)
        weight.view(-1)[:2] = torch.tensor([torch.finfo(dtype).smallest_normal / 4, -0.0])[: weight.numel()]
        return weight.float()
    groups = n * k // 32
    d = (torch.rand(groups, 1, generator=random) - 0.5).mul(0.1).half().float()
    d[0] = 2.0**-24
    if form == "q8_0":
        q = torch.randint(-127, 128, (groups, 32), generator=random).float()
        q[:, 3] = 127
        return (q * d.abs()).view(n, k)
    top = 31 if form.startswith("q5") else 15
    q = torch.randint(0, top + 1, (groups, 32), generator=random).float()
    q[:, 1], q[:, 2] = 0, top
    if form.endswith("_0"):
        return ((q - (top + 1) // 2) * d).view(n, k)
    m = torch.randn(groups, 1, generator=random).half().float()
    m[0] = 2.0**-23
    return (q * d.abs() + m).view(n, k)


@pytest.mark.parametrize("form", FORMS)
def test_every_number_of_rows(form: str) -> None:
    for n, k in {1: SIZES + ODD, 32: SIZES, 256: LARGE}[FORMS[form].k_block]:
        weight, narrow = exactly(form, n, k)
        assert n * k < 3000 or FORMS[form].header or narrowest(weight) == form
        wide, b = ops.pack_weight(weight), torch.randn(n)
        for m in (*range(1, 34), 42, 56, 57, 64, 65, 130):
            x = torch.randn(m, k)
            got = cpu.PACKED_LINEAR(x, narrow, b, n, form)
            assert torch.equal(got, cpu.PACKED_LINEAR(x, wide, b, n)), (n, k, m)
            want = x.double() @ weight.double().T + b
            torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_its_neighbours(form: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        k = 512 if FORMS[form].header else 320
        x, (_, packed) = torch.randn(65, k), exactly(form, 257, k)
        alone = torch.cat([cpu.PACKED_LINEAR(row[None], packed, None, 257, form) for row in x])
        for m in range(1, 66):
            assert torch.equal(cpu.PACKED_LINEAR(x[:m], packed, None, 257, form), alone[:m])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_such_weight_is_an_error(form: str) -> None:
    k = 256 if FORMS[form].header else 64
    (_, packed), x = exactly(form, 40, k), torch.randn(2, k)
    with pytest.raises(RuntimeError, match=f"x has 32 features, the packed weight {k}"):
        cpu.PACKED_LINEAR(x[:, :32], packed, None, 40, form)
    with pytest.raises(RuntimeError, match="out_features 100 does not fit 2 panels"):
        cpu.PACKED_LINEAR(x, packed, None, 100, form)
    with pytest.raises(RuntimeError, match=f'must come from pack_weight\\(weight, "{form}"\\)'):
        cpu.PACKED_LINEAR(x, torch.randn(2, 64, 32), None, 40, form)
    with pytest.raises(RuntimeError, match="knows no form int3"):
        cpu.PACKED_LINEAR(x, packed, None, 40, "int3")


LEVELS = [form for form, each in FORMS.items() if each.levels is not None]


def in_torch(weight: Tensor, form: str, monkeypatch: pytest.MonkeyPatch) -> Tensor | None:
    with monkeypatch.context() as without:
        without.setattr(encoders, "_ENCODERS", {})
        return encode(weight, FORMS[form])


@pytest.mark.parametrize("form", LEVELS)
def test_compiled_code_finds_the_same_blocks(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, k in SIZES:
        weight = by_value(form, n, k)
        weight[n // 2] = 0.0
        found, expected = _compiled(weight, FORMS[form]), in_torch(weight, form, monkeypatch)
        assert found is not None and expected is not None and torch.equal(found, expected)
        assert torch.equal(ops.unpack_weight(found, n, form).view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1.0 + 2**-20])
def test_compiled_code_finds_nothing_for_another_number(
    form: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = by_value(form, 33, 64)
    weight[32, 40] = value
    assert _compiled(weight, FORMS[form]) is None and in_torch(weight, form, monkeypatch) is None
    assert encode(weight, FORMS[form]) is None


@pytest.mark.parametrize("form", LEVELS)
def test_compiled_code_tells_zeros_of_either_sign_apart(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = by_value(form, 33, 64)
    weight[32, 40] = -0.0  # a negative step has that for its level 0, where the group has no other zero
    found, expected = _compiled(weight, FORMS[form]), in_torch(weight, form, monkeypatch)
    assert (found is None) is (expected is None)
    assert found is None or expected is None or torch.equal(found, expected)
