"""Forms with headers: numbers of such blocks are packed to these very blocks, and other numbers are refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from superblock_cases import superblocks
from torch import Tensor

from treespec_compiler.errors import InvalidWeight
from treespec_compiler.ir.kept_blocks import Headers, keep, kept
from treespec_compiler.ir.linear import pack_weight, packed_bytes, unpack_weight
from treespec_compiler.ir.narrow import FORMS, narrowest
from treespec_compiler.ir.stored_weights import Pack, headers_of
from treespec_compiler.ir.weights import Join, Shard, Slice, Source, Transpose

BITS = {"q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "i4": 5, "i8": 9}
form_names = pytest.mark.parametrize("form", BITS)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([1, 31, 33, 70]), st.sampled_from([256, 768]), st.sampled_from(list(BITS))
)
def test_blocks_come_back_bit_by_bit(seed: int, n: int, k: int, form: str) -> None:
    weight, headers = superblocks(form, n, k, seed)
    packed = pack_weight(weight, form, headers)
    assert packed_bytes(packed) == BITS[form] / 8 * -(-n // 32) * 32 * k
    assert torch.equal(unpack_weight(packed, n, form).view(torch.int32), weight.view(torch.int32))
    assert narrowest(weight, (form, headers)) == form


@form_names
def test_other_numbers_are_refused(form: str) -> None:
    weight, headers = superblocks(form, 40, 512)
    changed = weight.clone()
    changed[39, 511] = 0.1234567
    infinite = headers.clone()
    infinite[3, 1, {"q6_k": 16, "i4": 2, "i8": 2}.get(form, 0) :][:2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    for values, known in ((changed, headers), (weight, headers.roll(1, 0)), (weight, None), (weight, infinite)):
        with pytest.raises(InvalidWeight, match=f"a float32 matrix that {form} holds exactly"):
            pack_weight(values, form, known)
    assert narrowest(changed, (form, headers)) == "float32"
    with pytest.raises(InvalidWeight, match=f"that {form} holds"):
        pack_weight(weight[:, :330], form, headers)


def source(name: str, form: str, n: int, tensors: dict[str, Tensor]) -> Source:
    tensors[name], headers = superblocks(form, n, 512, seed=n)
    keep(tensors[name], Headers(form, headers))
    return Source.of(name, tensors[name])


@form_names
def test_headers_follow_what_is_made_of_their_tensors(form: str) -> None:
    tensors: dict[str, Tensor] = {"plain": torch.randn(8, 512)}
    a, b = source("a", form, 40, tensors), source("b", form, 24, tensors)
    other = source("c", "q6_k" if form == "q4_k" else "q4_k", 16, tensors)
    for made in (a, Join((a, b)), Shard(b, 0, 1, 3), Shard(a, 1, 1, 2), Slice(Join((a, b)), 0, 30, 50)):
        found = Pack(made, form).build(tensors.__getitem__)
        want = made.build(tensors.__getitem__).contiguous()
        assert torch.equal(unpack_weight(found, made.shape[0], form), want)
    plain = Source.of("plain", tensors["plain"])
    for unknown in (plain, Join((a, plain)), Join((a, other)), Shard(a, 1, 0, 32), Transpose(a), Join((a, a), 1)):
        assert headers_of(unknown, tensors.__getitem__) is None


def test_headers_go_with_their_tensor() -> None:
    weight, headers = superblocks("q4_k", 32, 256)
    keep(weight, Headers("q4_k", headers))
    found = kept(weight)
    assert found is not None and found.bytes is headers and kept(weight.clone()) is None
    gone = weakref.ref(found)
    del weight, found
    gc.collect()
    assert gone() is None


@form_names
def test_the_form_is_among_the_forms(form: str) -> None:
    assert FORMS[form].header and FORMS[form].takes(512) and not FORMS[form].takes(330)
