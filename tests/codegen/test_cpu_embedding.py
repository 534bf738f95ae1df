"""Rows of packed tables in C++: bit by bit those of the table; other ids and tables are errors."""

from __future__ import annotations

import pytest
import torch
from superblock_cases import superblocks

from treespec_compiler.codegen import cpu
from treespec_compiler.ir import ops
from treespec_compiler.ir.narrow import FORMS

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")


@pytest.mark.parametrize("form", ["float32", "bfloat16", *(name for name, form in FORMS.items() if form.header)])
def test_rows_are_those_of_the_table(form: str) -> None:
    if form in ("float32", "bfloat16"):
        table, headers = torch.randn(77, 65).to(getattr(torch, form)).float(), None
    else:
        table, headers = superblocks(form, 77, 512)
    packed, ids = ops.pack_weight(table, form, headers), torch.arange(77).flip(0).view(7, 11)
    for op in (cpu.PACKED_EMBEDDING, ops.packed_embedding):
        assert torch.equal(op(ids, packed, 77, form), table[ids])
    torch.library.opcheck(ops.packed_embedding, (ids, packed, 77, form))


def test_what_is_no_row_is_an_error() -> None:
    packed = ops.pack_weight(torch.randn(77, 65))
    for op in (cpu.PACKED_EMBEDDING, ops.packed_embedding):
        for wrong in (-1, 77):
            with pytest.raises(IndexError, match="expected 0 to 76"):
                op(torch.tensor([3, wrong]), packed, 77)
    with pytest.raises(RuntimeError, match="ids must be int64"):
        cpu.PACKED_EMBEDDING(torch.ones(2, dtype=torch.int32), packed, 77)
    with pytest.raises(RuntimeError, match="out_features 99 does not fit 3 panels"):
        cpu.PACKED_EMBEDDING(torch.ones(2, dtype=torch.int64), packed, 99)
