"""Generated attention over prompts: chains without ancestor words, in empty slots without pages."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from scored_cases import scored
from tree_cases import Case, attention_inputs, chain

from treespec_compiler.codegen.gpu.append import append
from treespec_compiler.codegen.gpu.tree_attention import TREE_ATTENTION, attend
from treespec_compiler.codegen.gpu.tree_attention_spec import Config
from treespec_compiler.ir import ops

# NumPy warns of rows whose result nobody stores or reads.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")

CHANGES = {"softcap": 3.0, "slopes": torch.tensor([0.5, 0.25]), "bias": torch.randn(2, 9)}


def bare(case: Case, pages: bool) -> tuple:
    table = case.meta.page_table if pages else case.meta.page_table[:, :0]
    return attention_inputs(replace(case.meta, ancestors=case.meta.ancestors[:, :0], page_table=table))


FORESTS = {"later chunk": [(37, chain(70), 70)], "two": [(5, chain(20), 12), (0, chain(35), 35)]}


@pytest.mark.family
@pytest.mark.parametrize(("config", "splits"), [(Config(16, 32, 4, 1), 3), (Config(64, 64, 4, 1), 1)], ids=str)
@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (7, 0), (0, 8), (60, 24)])
@pytest.mark.parametrize("forest", FORESTS)
def test_chains(forest, window, chunk, config, splits):
    case = Case(FORESTS[forest], heads=2, kv_heads=1, dk=16, dv=16, window=window, page_size=128)
    append(case.k, case.v, case.pool_k, case.pool_v, case.meta.write_index)
    positions, _, *meta = bare(case, pages=True)
    changes = CHANGES if config.block_m == 64 else {}
    rest = (window, chunk, *changes.values())
    got = attend(case.q, case.pool_k, case.pool_v, positions, *meta, case.scale, *rest, config=config, splits=splits)
    torch.testing.assert_close(got.double(), scored(case, chunk=chunk, **changes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 9])
def test_empty_slots(window):
    case = Case([(0, chain(50), 50)], dk=16, dv=16, window=window, page_size=16, slot_pages=4)
    q, k, v, pool_k, pool_v, *_ = case.arguments()
    arguments = (q, k, v, pool_k, pool_v, *bare(case, pages=False), case.scale, window)
    expected, keys, values = case.expected()
    torch.testing.assert_close(TREE_ATTENTION(*arguments).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(pool_k.double(), keys) and torch.equal(pool_v.double(), values)
    got = TREE_ATTENTION(*arguments, sinks=torch.zeros(4))
    torch.testing.assert_close(got.double(), scored(_filled(case), sinks=torch.zeros(4)), atol=1e-5, rtol=1e-5)


def _filled(case: Case) -> Case:
    append(case.k, case.v, case.pool_k, case.pool_v, case.meta.write_index)
    return case


def test_rotated_prompts():
    case = Case([(0, chain(20), 20)], dk=16, dv=16, page_size=32)
    angles = torch.randn(20, 16)
    turn = {"cos": angles.cos(), "sin": angles.sin(), "style": "half", "rotary": 16}
    ours, theirs = case.arguments(), case.arguments()
    expected = ops.tree_attention(*theirs, **turn)
    got = TREE_ATTENTION(*ours[:5], *bare(case, pages=False), *ours[12:], **turn)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[3], theirs[3], atol=1e-6, rtol=1e-6)
