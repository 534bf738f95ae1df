"""The kernels of recurrences against the reference in float64: grown trees, chains, committed tokens, odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bfloat16 import exact_bfloat16
from oracles import random_tree

from treespec_compiler import TokenTree
from treespec_compiler.codegen.gpu import recurrence_check
from treespec_compiler.codegen.gpu.recurrence import TREE_RECURRENCE, recurrence_launch
from treespec_compiler.codegen.gpu.recurrence_check import RecurrenceShape, Requested, trial
from treespec_compiler.errors import WrongKernel
from treespec_compiler.ir import ops

# NumPy warns of rows whose result nobody stores or reads.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")

CPU, F32 = torch.device("cpu"), torch.float32
QWEN = RecurrenceShape(2, 1, 18, 20, 1, True, F32, F32)
MAMBA2 = RecurrenceShape(2, 1, 16, 34, 1, False, F32, F32)
MAMBA1 = RecurrenceShape(40, 1, 4, 1, 4, False, F32, F32)
KIMI = RecurrenceShape(2, 2, 6, 5, 6, True, F32, F32)
GRIFFIN = RecurrenceShape(20, 20, 1, 1, 1, False, F32, F32)
SHAPES = {"qwen": QWEN, "mamba2": MAMBA2, "mamba1": MAMBA1, "kimi": KIMI, "griffin": GRIFFIN}
"""Shaped like these models."""

BY_BLOCKS, BY_PATHS = "tree_recurrence_blocks_kernel", "tree_recurrence_paths_kernel"


def requested(tree: TokenTree, start: int = 0, committed: bool = True) -> Requested:
    return Requested([sum(1 << n for n in tree.path(i)) for i in range(len(tree))], start, committed)


def straight(count: int) -> TokenTree:
    return TokenTree([0] * count, [*range(-1, count - 1)])


TREE = random_tree(23, 50, 4)
FORESTS = {
    "trees": [requested(TREE), requested(random_tree(3, 50, 1), 0, committed=False)],
    "grown trees": [requested(TREE, 5), requested(random_tree(35, 50, 2), 33, committed=False)],
    "prompts": [requested(straight(21)), requested(straight(2), 0, committed=False)],
    "grown chains": [requested(straight(24), 18, committed=False), requested(straight(1))],
}
CHAINS = {"prompts", "grown chains"}


def compare(shape: RecurrenceShape, forest: str, fade: float = 0.5) -> None:
    call = trial(shape, FORESTS[forest], forest in CHAINS, CPU, fade)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in call]
    want, got = ops.tree_recurrence(*wide), TREE_RECURRENCE(*call)
    tolerance = {F32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[shape.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(call[5].double(), wide[5], atol=tolerance, rtol=tolerance)


def test_wide_heads_go_by_blocks_and_others_by_paths():
    for shape in SHAPES.values():
        call = trial(shape, FORESTS["trees"], False, CPU)
        kernel = recurrence_launch(*call, out=torch.empty_like(call[2])).kernel.fn.__name__
        assert kernel == (BY_BLOCKS if shape in (QWEN, MAMBA2) else BY_PATHS)


@pytest.mark.family
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "plain"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_form(name, delta, forest):
    compare(replace(SHAPES[name], delta=delta), forest)


@pytest.mark.rare
@exact_bfloat16()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen", "kimi"])
def test_narrow_types(name, dtype):
    compare(replace(SHAPES[name], dtype=dtype, kept=dtype), "trees")


@pytest.mark.rare
@pytest.mark.parametrize("fade", [0.0, 1e-6, 40.0, float("inf")])
@pytest.mark.parametrize("name", ["qwen", "mamba1"])
@pytest.mark.parametrize("forest", ["grown trees", "prompts"])
def test_decays_near_all_and_nothing(name, fade, forest):
    compare(SHAPES[name], forest, fade)


@pytest.mark.family
@pytest.mark.parametrize("which", range(5), ids=["q", "k", "v", "decay", "beta"])
@pytest.mark.parametrize("chain", [False, True], ids=["tree", "chain"])
@pytest.mark.parametrize("name", ["qwen", "kimi"])
def test_what_is_not_finite_stays_on_its_path(name, which, chain):
    tree = straight(21) if chain else TREE
    call = trial(SHAPES[name], [requested(tree)], chain, CPU)
    call[which][:, 2] = torch.nan
    rows = TREE_RECURRENCE(*call).isfinite().flatten(2).all(2)[0].tolist()
    assert rows == [node != 2 if not which else 2 not in tree.path(node) for node in range(len(tree))]


@pytest.mark.rare
@pytest.mark.parametrize("name", ["mamba2", "mamba1", "qwen"])
def test_rows_of_no_request_are_zero(name):
    """Padding in front and behind, a request without nodes, and operands of odd strides."""
    call = trial(SHAPES[name], FORESTS["trees"], False, CPU)
    count = call[2].shape[1]
    for at, x in enumerate(call[:5]):
        if x is not None:
            padded = torch.full((1, *x.shape[2:], count + 5), torch.nan).movedim(-1, 1)
            padded[:, 2 : count + 2] = x
            call[at] = padded
    call[7] = torch.cat([call[7], call[7][-1:]]) + 2
    call[8], call[9], call[11] = (torch.cat([x, x.new_zeros(1)]) for x in (call[8], call[9], call[11]))
    call[10] = torch.nn.functional.pad(call[10], (0, 0, 2, 3))
    want, got = ops.tree_recurrence(*[x if x is None else x.clone() for x in call]), TREE_RECURRENCE(*call)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert not got[0, :2].any() and not got[0, -3:].any() and got[0, 2:-3].isfinite().all()


@pytest.mark.rare
@pytest.mark.parametrize("chain", [False, True], ids=["tree", "chain"])
def test_a_kernel_is_confirmed_before_its_first_use(chain):
    recurrence_check.confirm(TREE_RECURRENCE, QWEN, chain, CPU)
    with pytest.raises(WrongKernel, match="RecurrenceShape"):
        recurrence_check.confirm(lambda *call: 1.001 * TREE_RECURRENCE(*call), QWEN, chain, CPU)
