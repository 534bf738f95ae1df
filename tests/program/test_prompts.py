"""Prompts: no ancestor words for a chain, no pages for an empty slot, and the same numbers as with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from modules import NanoGPT
from oracles import EAGER
from scored_cases import scored
from tree_cases import Case, chain

import treespec_compiler as treespec
from treespec_compiler.codegen import aten, cpu
from treespec_compiler.codegen.gpu import prompt, tree_attention
from treespec_compiler.ir import attention, ops
from treespec_compiler.program.batch import CallSizes, Part, lay_out
from treespec_compiler.tree import TokenTree

KERNELS = [ops.tree_attention, aten.TREE_ATTENTION, cpu.TREE_ATTENTION]
CALLS = [*((op, False) for op in KERNELS), *((op, True) for op in KERNELS[:2])]
CHANGES = {"softcap": 3.0, "slopes": torch.tensor([0.5, 0.25, 0.1, 0.7]), "bias": torch.randn(4, 9)}
# committed tokens, nodes, of these new: a prompt, a later chunk, one behind nodes that are there, more than two words
CHAINS = [(0, 9, 9), (13, 40, 40), (5, 30, 12), (3, 150, 140)]


def without_words(case: Case, pages: bool = True) -> Case:
    table = case.meta.page_table if pages else case.meta.page_table[:, :0]
    case.meta = replace(case.meta, ancestors=case.meta.ancestors[:, :0], page_table=table)
    return case


def expected_of(case: Case, **changes):
    if not changes:
        return case.expected()[0]
    attention.append(case.k, case.v, case.pool_k, case.pool_v, case.meta.write_index)
    return scored(case, **changes)


@pytest.mark.parametrize(("op", "changed"), CALLS, ids=str)
@pytest.mark.parametrize("window", [0, 7, 70])
@pytest.mark.parametrize(("prefix", "nodes", "new"), CHAINS)
def test_a_chain_needs_no_words(op, changed, window, prefix, nodes, new):
    if op is cpu.TREE_ATTENTION and not cpu.load():
        pytest.skip("no C++ compiler")
    case = Case([(prefix, chain(nodes), new)], window=window, page_size=192)
    changes = {"chunk": 6, **CHANGES} if changed else {}
    expected = expected_of(case, **changes)
    arguments = without_words(case).arguments()
    torch.testing.assert_close(op(*arguments, **changes).double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("op", KERNELS, ids=str)
@pytest.mark.parametrize("nodes", [1, 50])
def test_an_empty_slot_needs_no_pages(op, nodes):
    if op is cpu.TREE_ATTENTION and not cpu.load():
        pytest.skip("no C++ compiler")
    case = Case([(0, chain(nodes), nodes)], window=9, page_size=16, slot_pages=5)
    expected, pool_k, pool_v = case.expected()
    arguments = without_words(case, pages=False).arguments()
    torch.testing.assert_close(op(*arguments).double(), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(arguments[3].double(), pool_k) and torch.equal(arguments[4].double(), pool_v)


@pytest.mark.parametrize("op", KERNELS, ids=str)
def test_several_requests_need_their_pages(op):
    if op is cpu.TREE_ATTENTION and not cpu.load():
        pytest.skip("no C++ compiler")
    case = Case([(0, chain(3), 3), (0, chain(2), 2)])
    with pytest.raises((ValueError, RuntimeError), match="got no pages for 2 requests, expected one request"):
        op(*without_words(case, pages=False).arguments())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NanoGPT().eval()


@pytest.fixture(scope="module")
def program(model):
    return treespec.tree_program(model, options=EAGER)


def test_prompts_are_laid_out_without_words_and_pages(program):
    cache = program.new_cache(max_tokens=64, slots=2)
    tree = TokenTree.chain([1, 2, 3])
    shape, numbers = lay_out([Part(1, tree, chain=True, pages=0)], cache, rows=[2], aligned=True)
    assert shape == (3, 1, 1, 0, 0, 0) and len(numbers) == CallSizes(*shape).integers
    meta = CallSizes(*shape).split(torch.frombuffer(numbers, dtype=torch.int64), aligned=True).meta
    assert meta.ancestors.shape == (3, 0) and meta.page_table.shape == (1, 0)
    assert meta.write_index.tolist() == [64, 65, 66] and meta.tree_lens.tolist() == [3]
    cache._lengths[1] = 4
    shape, _ = lay_out([Part(1, tree, chain=True)], cache, rows=[2])
    assert shape == (3, 1, 1, 0, 1, 0)


def test_chunks_of_a_prompt_equal_the_whole(model, program):
    ids = [(7 * i + 3) % 23 for i in range(20)]
    chunked = treespec.tree_program(model, options={**EAGER, "prefill_chunk": 7})
    whole = program.prefill(ids, program.new_cache(32)).clone()
    torch.testing.assert_close(chunked.prefill(ids, chunked.new_cache(32)), whole, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(torch.tensor([ids]))[0][0, -1], atol=1e-4, rtol=1e-4)


# -- PyTorch's flash attention, where a GPU has it -------------------------------------------------------------------

PROMPT = Case([(0, chain(21), 21)], heads=4, kv_heads=2, page_size=32)


@pytest.mark.parametrize(
    ("change", "causal"),
    [
        ({}, True),
        ({"window": 21}, True),
        ({"window": 20}, False),
        ({"chunk": 21}, True),
        ({"chunk": 20}, False),
        ({"softcap": 1.0}, False),
        ({"scale": -1.0}, False),
    ],
    ids=str,
)
def test_which_prompts_are_causal_attention_alone(change, causal):
    meta = without_words(Case([(0, chain(21), 21)]), pages=False).meta
    arguments = {"scale": 0.3, "window": 0, "chunk": 0, "softcap": 0.0, **change}
    assert prompt.is_causal_prompt(meta.page_table, meta.ancestors, *arguments.values()) == causal
    sinks = torch.zeros(4)
    assert not prompt.is_causal_prompt(meta.page_table, meta.ancestors, 0.3, 0, 0, 0.0, None, None, sinks)
    assert not prompt.is_causal_prompt(PROMPT.meta.page_table, meta.ancestors, 0.3)
    assert not prompt.is_causal_prompt(meta.page_table, PROMPT.meta.ancestors, 0.3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flash_gives_what_the_definition_gives(kv_heads, monkeypatch):
    """The call itself; which of its kernels PyTorch takes is up to the device."""
    case = Case([(0, chain(21), 21)], heads=4, kv_heads=kv_heads, page_size=32)
    expected = case.expected()[0]
    q, k, v, *pools, positions, write, offsets, table, prefixes, trees, words, scale, window = without_words(
        case, pages=False
    ).arguments()
    attention.append(k, v, *pools, write)
    asked = []
    monkeypatch.setattr(prompt, "flash_takes", lambda *tensors: asked.append(tensors) or True)
    real, cudnn = prompt.scaled_dot_product_attention, []

    def watched(*arguments, **options):
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*arguments, **options)

    monkeypatch.setattr(prompt, "scaled_dot_product_attention", watched)
    got = tree_attention.attend_stored(
        q, *pools, positions, write, offsets, table, prefixes, trees, words, scale, window
    )
    assert got.shape == expected.shape and got.transpose(1, 2).is_contiguous() and len(asked) == 1
    assert cudnn == [False] and torch.backends.cuda.cudnn_sdp_enabled()
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


def test_the_device_is_asked_for_a_flash_kernel():
    q = torch.zeros(1, 4, 21, 32)
    assert prompt.flash_takes(q, q, q) is False  # there is none on a CPU
