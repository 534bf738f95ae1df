"""Changed scores in the C++ attention: softcap, slopes, biases, sinks, chunks, against float64; bitwise promises."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from tree_cases import Case, chain, random_tree

from treespec_compiler.codegen import cpu
from treespec_compiler.ir import ops

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")

CASES = {
    "a long prefix": Case([(500, random_tree(3, 1), 3)], heads=2, kv_heads=1, page_size=512),
    "odd pages": Case([(150, random_tree(30, 20), 30), (3, [-1], 1)], page_size=37, slot_pages=5, dk=20, dv=7),
    "many nodes": Case([(30, random_tree(150, 10), 20)], page_size=192),
    "a prompt": Case([(70, chain(65), 65)], page_size=256),
}


def changes(heads: int, rows: int, own: bool = False) -> dict[str, Any]:
    random = torch.Generator().manual_seed(heads)
    bias = torch.randn((rows, heads, 40) if own else (heads, 40), generator=random)
    slopes, sinks = (torch.rand(heads, generator=random) for _ in range(2))
    return {"chunk": 48, "softcap": 2.5, "slopes": slopes / 20, "bias": bias, "sinks": sinks}


def alone(name: str, every: dict[str, Any]) -> dict[str, Any]:
    return every if name == "all" else {name: every[name]}


def widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_changed_scores_against_float64(name: str, threads: int, request: pytest.FixtureRequest) -> None:
    """Each change alone, and all of them, of one bias and of one of each node."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    case = CASES[name]
    made = changes(case.heads, case.q.shape[2], own=name == "odd pages")
    for what in (*made, "all"):
        arguments, given = case.arguments(), alone(what, made)
        if name == "a prompt":  # a chain that says so
            arguments = (*arguments[:11], arguments[11].new_zeros(len(arguments[11]), 0), *arguments[12:])
        want = ops.tree_attention(*map(widened, arguments), **{key: widened(value) for key, value in given.items()})
        got = cpu.TREE_ATTENTION(*arguments, **given)
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_scores_of_any_size_are_capped(softcap: float) -> None:
    """From far below the cap, where its curve is a line, to far beyond."""
    case = Case([(100, chain(5), 5)], page_size=128)
    for size in (1e-4, 1.0, 300.0):
        arguments = (case.q * size, *case.arguments()[1:])
        want = ops.tree_attention(*map(widened, arguments), softcap=softcap)
        got = cpu.TREE_ATTENTION(*arguments, softcap=softcap)
        torch.testing.assert_close(got.double(), want, atol=5e-5, rtol=5e-5)


def test_a_chain_of_nodes_is_bitwise_the_tokens_one_by_one() -> None:
    whole = Case([(90, chain(40), 40)], page_size=256)
    given = changes(whole.heads, 40)
    together = cpu.TREE_ATTENTION(*whole.arguments(), **given)
    pools = whole.pool_k.clone(), whole.pool_v.clone()
    page = int(whole.meta.page_table[0, 0])
    for i in range(40):
        meta, one = Case([(90 + i, [-1], 1)], page_size=256).meta, slice(i, i + 1)
        alone = cpu.TREE_ATTENTION(
            whole.q[:, :, one], whole.k[:, :, one], whole.v[:, :, one], *pools, meta.positions,
            torch.tensor([page * 256 + 90 + i]), meta.node_offsets, whole.meta.page_table, meta.prefix_lens,
            meta.tree_lens, meta.ancestors, whole.scale, 0, **given,
        )  # fmt: skip
        assert torch.equal(alone[:, :, 0], together[:, :, i])


def test_a_node_does_not_depend_on_its_siblings() -> None:
    """All of a star's leaves at once, and each leaf in a tree of its own."""
    star = Case([(90, [-1, 0, 0, 0, 0], 5)], page_size=128)
    given = changes(star.heads, 5)
    together = cpu.TREE_ATTENTION(*star.arguments(), **given)
    star.k, star.v = star.k.clone(), star.v.clone()
    star.k[:, :, 2:4], star.v[:, :, 2:4], star.q[:, :, 2:4] = 9.0, -9.0, 3.0
    again = cpu.TREE_ATTENTION(*star.arguments(), **given)
    for leaf in (0, 1, 4):
        assert torch.equal(together[:, :, leaf], again[:, :, leaf])


def test_what_does_not_fit_is_an_error() -> None:
    case = Case([(5, [-1], 1)])
    for wrong in ({"slopes": torch.ones(3)}, {"sinks": torch.ones(5)}, {"bias": torch.ones(3, 9)}):
        with pytest.raises(RuntimeError, match=f"{next(iter(wrong))} must be "):
            cpu.TREE_ATTENTION(*case.arguments(), **wrong)
    with pytest.raises(RuntimeError, match="takes rotated q and k"):
        cpu.TREE_ATTENTION(*case.arguments(), activation="relu")
