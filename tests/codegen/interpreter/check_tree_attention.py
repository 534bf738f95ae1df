"""Generated tree attention against float64: every kind of mask and score, ragged requests, pages and splits."""

from __future__ import annotations

import itertools
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parents[2]))

from bfloat16 import exact_bfloat16
from forest_cases import forests
from scored_cases import scored
from tree_cases import CASES, Case, attention_inputs, chain, random_tree

from treespec_compiler.codegen.gpu.append import append
from treespec_compiler.codegen.gpu.tree_attention import TREE_ATTENTION, attend
from treespec_compiler.codegen.gpu.tree_attention_spec import Config, pieces
from treespec_compiler.ir import ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}

# NumPy warns of rows whose result nobody stores or reads.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


def run(case: Case, *rest, config=None, splits=None):
    """`attend` on pools that hold the new nodes already, as `append` leaves them."""
    append(case.k, case.v, case.pool_k, case.pool_v, case.meta.write_index)
    positions, _, *meta = attention_inputs(case.meta)
    rest = rest or (case.window,)
    return attend(case.q, case.pool_k, case.pool_v, positions, *meta, case.scale, *rest, config=config, splits=splits)


def compare(got, expected, dtype=torch.float32):
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


SMALL = {name: case for name, case in CASES.items() if case.q.shape[1] * case.q.shape[2] <= 130}


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    compare(run(CASES[name], config=Config(32, 64, 4, 1), splits=1), CASES[name].expected()[0])


@pytest.mark.family
@pytest.mark.parametrize("name", SMALL)
def test_attention_in_splits(name):
    compare(run(CASES[name], config=Config(16, 32, 4, 1), splits=3), CASES[name].expected()[0])


@pytest.mark.parametrize("prefix", [95, 96, 97])
def test_shares_of_whole_blocks(prefix):
    case = Case([(prefix, [-1, 0], 2)], page_size=128)
    compare(run(case, config=Config(16, 32, 4, 1), splits=3), case.expected()[0])


@pytest.mark.parametrize("config", [Config(16, 16, 4, 1), Config(64, 32, 4, 1), Config(16, 128, 4, 1)], ids=str)
def test_blocks_of_any_size(config):
    for name in ("window over many words", "ragged forest"):
        compare(run(CASES[name], config=config, splits=1), CASES[name].expected()[0])


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_groups_and_dtypes(group, dtype):
    case = Case(
        [(21, random_tree(9, 3), 9), (0, random_tree(5, 1), 2)], heads=2 * group, kv_heads=2, dk=80, dv=48, dtype=dtype
    )
    compare(run(case, splits=2 if dtype is torch.float16 else 1), case.expected()[0], dtype)


@settings(max_examples=5)
@given(forests())
def test_random_forests(case):
    compare(run(case, config=Config(16, 32, 4, 1), splits=1), case.expected()[0])


@pytest.mark.parametrize("dim", [8, 20, 112, 192, 256])
def test_head_dimensions(dim):
    case = Case([(40, random_tree(6, 3), 6)], heads=2, kv_heads=1, dk=dim, dv=dim - 4, dtype=torch.float16)
    compare(run(case, config=Config(16, 32, 4, 1), splits=1), case.expected()[0], torch.float16)


MASKS = {"causal": (0, 0), "window": (6, 0), "long window": (60, 0), "chunk": (0, 8), "both": (9, 5)}
SCORES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes": torch.rand(4) + 0.1},
    "bias": {"bias": torch.randn(4, 17)},
    "sinks": {"sinks": torch.randn(4) + 2},
    "all": {"softcap": 3.0, "slopes": torch.rand(4), "bias": torch.randn(4, 50), "sinks": torch.randn(4)},
}
FORESTS = {
    "forest": [(21, random_tree(9, 7), 9), (0, random_tree(6, 8), 6)],
    "extend": [(37, random_tree(17, 8), 4)],
    "two words": [(10, [-1, *range(69)], 3)],
}


# Masks and scores are parts of the kernel that know nothing of each other: each mask with no score and with all of
# them, each score with the plainest mask and with the fullest one.
COMBINED = [
    *(("forest", mask, score) for mask in MASKS for score in ("plain", "all")),
    *(("forest", mask, score) for mask in ("causal", "both") for score in SCORES if score not in ("plain", "all")),
    *((forest, mask, "all") for forest in ("extend", "two words") for mask in MASKS),
    *((forest, "causal", "plain") for forest in ("extend", "two words")),
]


@pytest.mark.family
@pytest.mark.parametrize(("forest", "mask", "score"), COMBINED)
def test_scores(forest, mask, score):
    window, chunk = MASKS[mask]
    case = Case(FORESTS[forest], dk=16, dv=16, window=window, page_size=96)
    changes = {"softcap": 0.0, "slopes": None, "bias": None, "sinks": None, **SCORES[score]}
    splits = 2 if mask in ("window", "chunk") else 1
    got = run(case, window, chunk, *changes.values(), config=Config(16, 32, 4, 1), splits=splits)
    compare(got, scored(case, chunk=chunk, **SCORES[score]))


UNIT = 2.0**-8  # the largest relative error of rounding to bfloat16
BRAIN_CASES = {
    "plain": {},
    "window": {"mask": (6, 0)},
    "chunk": {"mask": (0, 8), "splits": 2},
    "softcap": {"score": "softcap"},
    "slopes": {"score": "slopes"},
    "bias": {"score": "bias"},
    "sinks": {"score": "sinks"},
    "sinks in splits": {"score": "sinks", "splits": 3},
    "everything": {"mask": (9, 5), "score": "all", "splits": 2},
    "splits": {"splits": 3},
    "one head each": {"heads": 2},
    "one head for all": {"heads": 7, "kv_heads": 1},
    "keys longer than values": {"dk": 192, "dv": 128, "heads": 2, "kv_heads": 1},
    "odd dimensions": {"dk": 20, "dv": 36, "splits": 2},
    "pools of float16": {"pool_dtype": torch.float16},
}


@pytest.mark.family
@exact_bfloat16()
@pytest.mark.parametrize("name", BRAIN_CASES)
def test_bfloat16(name):
    brain_case(**BRAIN_CASES[name])


def brain_case(*, mask=(0, 0), score="plain", splits=1, pool_dtype=torch.bfloat16, **shape):
    """Inputs are bfloat16 numbers exactly, so two roundings remain: of the weights and of the result.

    The first one's error is UNIT times the mean of |v| at most, the second's UNIT times |out|, which is not more; sums
    and scores, in float32, add little.
    """
    window, chunk = mask
    shape = {"dk": 32, "dv": 16, "page_size": 96, **shape}
    case = Case(FORESTS["forest"], window=window, dtype=torch.bfloat16, **shape)
    case.pool_k, case.pool_v = case.pool_k.to(pool_dtype), case.pool_v.to(pool_dtype)
    changes = {"softcap": 0.0, "slopes": None, "bias": None, "sinks": None, **SCORES[score]}
    got = run(case, window, chunk, *changes.values(), config=Config(16, 32, 4, 1), splits=splits)
    expected = scored(case, chunk=chunk, **SCORES[score])
    assert got.dtype == torch.bfloat16
    case.pool_v = case.pool_v.abs()
    mean = scored(case, chunk=chunk, **SCORES[score])
    assert ((got.double() - expected).abs() <= 2.01 * UNIT * mean + 1e-5).all()


@exact_bfloat16()
def test_errors_of_bfloat16_have_no_bias():
    """Cutting bits off, of weights or of results, would make means of positive values 0.2 % smaller each."""
    case = Case([(200, [-1], 1)], dk=16, dv=64, page_size=256, dtype=torch.bfloat16)
    case.v, case.pool_v = case.v.abs(), case.pool_v.abs()
    out, expected = run(case, config=Config(16, 64, 4, 1), splits=2).double(), case.expected()[0]
    assert ((out - expected) / expected).mean().abs() < UNIT / 8


def test_large_scores_do_not_overflow():
    case = Case([(100, chain(5), 5)], page_size=128)
    case.q = case.q * 300
    for splits in (1, 3):
        got = run(case, splits=splits)
        torch.testing.assert_close(got.double(), case.expected()[0], atol=1e-3, rtol=1e-3)
    capped = run(case, 0, 0, 5.0, splits=1)
    torch.testing.assert_close(capped.double(), scored(case, softcap=5.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    case = Case(FORESTS["forest"], window=4)
    case.scale = scale
    compare(run(case), case.expected()[0])


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_no_request_are_zero(splits):
    case = CASES["extend"]
    arguments = list(case.arguments())
    q, pools, (positions, *_), meta = arguments[0], arguments[3:5], arguments[5:7], arguments[7:12]
    append(*arguments[1:5], arguments[6])
    whole = attend(q, *pools, positions, *meta, case.scale, splits=splits)
    meta[0] = torch.tensor([1, 4, 8])  # rows 0, 8 and 9 belong to nobody; request 0 has three new nodes
    got = attend(q, *pools, positions, *meta, case.scale, splits=splits)
    assert (got[:, :, [0, 8, 9]] == 0).all() and (whole != 0).all()
    assert got[:, :, 1:8].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_requests_without_nodes(splits):
    """As padding of a CUDA graph: requests that repeat the last offset, nodes that write nowhere."""
    case = Case([(5, random_tree(6, 6), 6), (30, random_tree(4, 2), 4)])
    rows = 16
    q, k, v = (torch.cat([x, torch.randn(1, x.shape[1], 6, x.shape[3])], 2) for x in (case.q, case.k, case.v))
    meta = case.meta
    offsets = torch.cat([meta.node_offsets, meta.node_offsets[-1:].expand(2)])
    write = torch.cat([meta.write_index, torch.full((6,), -1)])
    positions = torch.cat([meta.positions, torch.zeros(6, dtype=torch.int64)])
    table, prefixes, trees = (
        torch.cat([x, torch.zeros(2, *x.shape[1:], dtype=torch.int64)])
        for x in (meta.page_table, meta.prefix_lens, meta.tree_lens)
    )
    ancestors = torch.cat([meta.ancestors, torch.zeros(6, 1, dtype=torch.int64)])
    append(k, v, case.pool_k, case.pool_v, write)
    got = attend(
        q, case.pool_k, case.pool_v, positions, offsets, table, prefixes, trees, ancestors, case.scale, splits=splits
    )
    assert got.shape[2] == rows and (got[:, :, 10:] == 0).all()
    torch.testing.assert_close(got[:, :, :10].double(), case.expected()[0], atol=1e-5, rtol=1e-5)


def test_values_that_nobody_sees_do_not_leak():
    case = CASES["ragged forest"]
    seen = torch.zeros(case.pool_k.shape[0], case.page_size, dtype=torch.bool)
    for r, (prefix, parents, _) in enumerate(case.requests):
        seen[case.meta.page_table[r, 0], : prefix + len(parents)] = True
    arguments = case.arguments()
    for pool in arguments[3:5]:
        pool[~seen.unsqueeze(1).expand(-1, case.kv_heads, -1)] = float("nan")
    got = TREE_ATTENTION(*arguments)
    torch.testing.assert_close(got.double(), case.expected()[0], atol=1e-5, rtol=1e-5)


def test_any_strides_of_queries():
    case = CASES["extend"]
    expected = case.expected()[0]
    for change in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT, lambda x: x.repeat(1, 1, 1, 2)[..., ::2]):
        other = Case(case.requests)
        other.q = change(case.q)
        compare(run(other), expected if other.q.stride(3) == 1 or torch.equal(other.q, case.q) else other.expected()[0])


def test_any_strides_of_pools_and_metadata():
    case = CASES["extend"]
    case = Case(case.requests)
    case.pool_k, case.pool_v = (x.mT.contiguous().mT for x in (case.pool_k, case.pool_v))
    case.meta = replace(case.meta, **{f.name: apart(getattr(case.meta, f.name)) for f in fields(case.meta)})
    assert case.meta.positions.stride() == (2,)
    compare(run(case), case.expected()[0])


def apart(x):
    """The same numbers in every other place of a larger tensor."""
    return x.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]


def test_ops_equal_their_references():
    case = Case(FORESTS["extend"], dk=16, dv=16)
    for rest in ((), (8, 2.0, torch.rand(4), torch.randn(4, 9), torch.randn(4))):
        ours, theirs = case.arguments(), case.arguments()
        expected = ops.tree_attention(*theirs, *rest)
        torch.testing.assert_close(TREE_ATTENTION(*ours, *rest), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[3], theirs[3]) and torch.equal(ours[4], theirs[4])


@pytest.mark.parametrize("dim", [*range(1, 70), 80, 96, 100, 112, 192, 256, 576])
@pytest.mark.parametrize("smallest, largest", [(16, 32), (16, 512), (64, 512)])
def test_pieces_cover_a_dimension(dim, smallest, largest):
    parts = pieces(dim, smallest, largest)
    assert parts[0].start == 0 and parts[-1].start + parts[-1].valid == dim
    assert all(a.start + a.size == b.start and a.valid == a.size for a, b in itertools.pairwise(parts))
    assert all(p.size & (p.size - 1) == 0 and smallest <= p.size <= largest for p in parts)
