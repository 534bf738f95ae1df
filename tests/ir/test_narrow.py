"""Forms of packed weights: each round trip is exact, the narrowest that fits is found, and what does not is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treespec_compiler.errors import InvalidWeight
from treespec_compiler.ir.linear import pack_weight, packed_bytes, packed_linear, unpack_weight
from treespec_compiler.ir.narrow import FORMS, narrowest
from treespec_compiler.ir.stored_weights import Pack
from treespec_compiler.ir.weights import Source, Transpose

BITS = {"q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "bfloat16": 16, "float16": 16}
ROWS = st.sampled_from([1, 5, 31, 32, 33, 70])


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def from_bits(numbers: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32).to(torch.int16).view(dtype).float()


def exact(weight: Tensor, form: str) -> None:
    n, k = weight.shape
    packed = pack_weight(weight, form)
    assert packed.shape == FORMS[form].shape(n, k) and packed.dtype is FORMS[form].dtype
    assert packed_bytes(packed) == BITS[form] / 8 * -(-n // 32) * 32 * k
    assert torch.equal(bits(unpack_weight(packed, n, form)), bits(weight))


def refused(weight: Tensor, form: str) -> None:
    assert narrowest(weight) != form
    with pytest.raises(InvalidWeight, match=f"a float32 matrix that {form} holds exactly"):
        pack_weight(weight, form)


def random(seed: int, *shape: int, low: int = 0, high: int = 2) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def half(seed: int, count: int, denormal: bool) -> Tensor:
    """Finite float16 numbers of either sign but zero, [count, 1]."""
    top = 0x400 if denormal else 0x7C00
    sign = random(seed + 1, count, 1).int() << 15
    return from_bits((random(seed, count, 1, low=1, high=top).int() | sign).flatten().tolist(), torch.float16).view(
        count, 1
    )


def of_levels(seed: int, n: int, form: str, denormal: bool = False) -> Tensor:
    """[n, 64] of random blocks, in which a quantizer's outermost levels occur."""
    groups = 2 * n
    d = half(seed, groups, denormal)
    if form == "q8_0":
        q = random(seed + 2, groups, 32, low=-127, high=128)
        q[:, 5] = 127
        return (q * d.abs()).view(n, 64)
    top = 31 if form.startswith("q5") else 15
    q = random(seed + 2, groups, 32, high=top + 1)
    q[:, 7], q[:, 9] = 0, top
    if form.endswith("_0"):
        return ((q - (top + 1) // 2) * d).view(n, 64)
    return (q * d.abs() + half(seed + 3, groups, denormal)).view(n, 64)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), ROWS, st.sampled_from(["q4_0", "q5_0", "q8_0"]), st.booleans())
def test_blocks_come_back_bit_by_bit(seed: int, n: int, form: str, denormal: bool) -> None:
    """With a step that is a normal or a denormal number of float16; negative ones make zeros negative."""
    exact(of_levels(seed, n, form, denormal), form)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), ROWS, st.sampled_from(["q4_1", "q5_1"]))
def test_blocks_with_a_minimum_come_back_bit_by_bit(seed: int, n: int, form: str) -> None:
    """Steps are at least a 2^12th of the minimum: below that float32 has lost what they were."""
    values = of_levels(seed, n, form).view(-1, 32)
    d = half(seed, len(values), False).abs()
    m = half(seed + 3, len(values), False)
    weight = torch.where(m.abs() < 4096 * d, values, 15 * torch.ones_like(values)).view(n, 64)
    exact(weight, form)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=70), st.integers(1, 3))
def test_bfloat16_holds_every_number_of_16_bits(numbers: list[int], k: int) -> None:
    """Denormals, both zeros, infinities and every NaN."""
    exact(from_bits(numbers, torch.bfloat16).repeat(k, 1).t().contiguous(), "bfloat16")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=70), st.integers(1, 3))
def test_float16_holds_every_finite_number_of_16_bits(numbers: list[int], k: int) -> None:
    weight = from_bits(numbers, torch.float16).repeat(k, 1).t().contiguous()
    if weight.isfinite().all():
        exact(weight, "float16")
    else:
        refused(weight, "float16")


BY_VALUE = [form.name for form in FORMS.values() if not form.header]


def held_by(form: str) -> Tensor:
    """[45, 64] that this form holds and no narrower one."""
    if form in ("bfloat16", "float16"):
        return torch.randn(45, 64).to(FORMS[form].dtype).float()
    if not form.endswith("_1"):
        return of_levels(3, 45, form)
    top = 31 if form == "q5_1" else 15
    q = random(1, 90, 32, high=top + 1)
    q[:, 0], q[:, 1] = 0, top
    return (q / 64 + 1).view(45, 64)


@pytest.mark.parametrize("form", BY_VALUE)
def test_the_narrowest_form_is_found(form: str) -> None:
    weight = held_by(form)
    assert narrowest(weight) == form
    exact(weight, form)
    # one value that it does not hold, in the last row, past every sample
    weight[-1, -1] = 0.1
    refused(weight, form)
    assert narrowest(weight) == "float32"


def test_more_than_one_piece_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treespec_compiler.ir.narrow.CHUNK", 32 * 64)
    weight = of_levels(9, 300, "q4_0")
    assert narrowest(weight) == "q4_0"
    exact(weight, "q4_0")
    weight[290, 3] = 1 / 3
    assert narrowest(weight) == "float32"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("form", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "float16"])
def test_numbers_that_are_not_finite_are_refused(form: str, value: float) -> None:
    weight = torch.zeros(32, 32)
    weight[3, 4] = value
    refused(weight, form)


def test_zeros_keep_their_sign() -> None:
    for weight in (torch.zeros(32, 64), -torch.zeros(32, 64)):
        assert narrowest(weight) == "q4_0"
        exact(weight, "q4_0")
    mixed = torch.zeros(32, 64)
    mixed[:, ::2] *= -1
    assert narrowest(mixed) == "bfloat16"
    exact(mixed, "bfloat16")


def test_blocks_need_columns_in_blocks() -> None:
    weight = torch.ones(32, 40)
    assert narrowest(weight) == "bfloat16"
    refused(weight, "q4_0")


def test_a_step_that_float16_does_not_hold_is_refused() -> None:
    q = random(1, 64, 32, low=-8, high=8)
    q[:, 0] = -8
    refused((q * 0.1).view(32, 64), "q4_0")
    refused((q * 1e6).view(32, 64), "q4_0")


@pytest.mark.parametrize("form", BY_VALUE)
def test_the_product_is_that_of_the_float32_weights(form: str) -> None:
    weight = held_by(form)
    x, b = torch.randn(3, 64), torch.randn(45)
    want = packed_linear(x, pack_weight(weight), b, 45)
    got = packed_linear(x, pack_weight(weight, form), b, 45, form)
    assert torch.equal(got, want)
    torch.library.opcheck(packed_linear, (x, pack_weight(weight, form), b, 45, form))


def test_pack_expressions_say_what_they_make() -> None:
    tensors = {"w": of_levels(2, 45, "q8_0"), "x": torch.randn(64, 40)}
    w, x = (Source.of(name, tensor) for name, tensor in tensors.items())
    made = Pack(w, "q8_0")
    built = made.build(tensors.__getitem__)
    assert (tuple(built.shape), built.dtype) == (made.shape, made.dtype) and str(made) == "pack(w, q8_0)"
    assert Pack(w) != made and Pack(w).dtype is torch.float32
    with pytest.raises(InvalidWeight, match="holds exactly"):
        Pack(Transpose(x), "bfloat16").build(tensors.__getitem__)
    with pytest.raises(InvalidWeight, match="columns in blocks of 32"):
        Pack(x, "q4_0")
    with pytest.raises(InvalidWeight, match="got int3"):
        Pack(w, "int3")
