"""The table of program inputs against those who must agree with it: schemas, batches, lowering."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from treespec_compiler.ir import ops
from treespec_compiler.ir.inputs import (
    ATTENTION,
    BY_NAME,
    COMMITTED,
    INPUTS,
    POOL,
    STASH,
    STATE,
    SYMBOLS,
    TreeMeta,
    input_of,
    pool_names,
    state_names,
)
from treespec_compiler.ir.states import KINDS
from treespec_compiler.program.batch import CallSizes, Part, lay_out
from treespec_compiler.program.lowering import EXAMPLE
from treespec_compiler.tree import TokenTree


def test_attention_takes_them_in_this_order():
    arguments = [a.name for a in ops.tree_attention._schema.arguments]
    first = arguments.index(ATTENTION[0])
    assert tuple(arguments[first : first + len(ATTENTION)]) == ATTENTION


@pytest.mark.parametrize("kind", KINDS)
def test_ops_with_a_state_take_them_in_this_order(kind):
    op = KINDS[kind]
    arguments = [a.name for a in op.over_trees._schema.arguments]
    shared = [a.name for a in op.over_sequence._schema.arguments]
    own = ["stash", "state", *STATE]
    assert arguments == [*shared[: op.operands], *own, *shared[op.operands :]]


def test_names_and_symbols():
    assert [f.name for f in fields(TreeMeta)] == [each.name for each in INPUTS if each.name != "tokens"]
    assert {s for each in (*INPUTS, POOL, STASH, COMMITTED) for s in each.symbols.values()} == SYMBOLS
    assert POOL.symbols == {0: "pages", 2: "page_size"}


def test_example_sizes_are_all_different():
    assert EXAMPLE.keys() == SYMBOLS and len(set(EXAMPLE.values())) == len(SYMBOLS)


@pytest.mark.parametrize("name", pool_names(3))
def test_pools_are_inputs_and_weights_are_not(name):
    assert input_of(name) is POOL and input_of("rows") is BY_NAME["rows"]
    stash, committed = state_names(3)
    assert input_of(stash) is STASH and input_of(committed) is COMMITTED
    assert input_of("") is None and input_of("layers_0_weight") is None


class _Cache:
    page_size, _pages, states = 100, None, None

    def __init__(self, lengths):
        self._lengths, self._tables = lengths, [[slot] for slot in range(len(lengths))]


@pytest.mark.parametrize("aligned", [False, True])
def test_a_call_is_laid_out_in_the_table_s_order(aligned):
    parts = [Part(1, TokenTree([7, 8, 9], [-1, 0, 0])), Part(0, TokenTree([5], [-1]))]
    shape, numbers = lay_out(parts, _Cache([10, 20]), aligned=aligned)
    batch = CallSizes(*shape).split(torch.frombuffer(numbers, dtype=torch.int64), aligned)
    expected = {
        "tokens": [[7, 8, 9, 5]],
        "positions": [20, 21, 21, 10],
        "write_index": [120, 121, 122, 10],
        "node_offsets": [0, 3, 4],
        "page_table": [[1], [0]],
        "prefix_lens": [20, 10],
        "tree_lens": [3, 1],
        "rows": [0, 1, 2, 3],
        "ancestors": [[0b1], [0b11], [0b101], [0b1]],
        "state_slots": [],
        "state_rows": [],
    }
    assert {name: value.tolist() for name, value in batch.named().items()} == expected
