"""Token trees: validation, derived views, merging and drawing."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treespec_compiler.errors import InvalidForest, InvalidTree
from treespec_compiler.tree import Forest, TokenTree


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 150, vocabulary: int = 5) -> TokenTree:
    count = draw(st.integers(1, max_nodes))
    parents = [draw(st.integers(-1, node - 1)) for node in range(count)]
    return TokenTree(draw(st.lists(st.integers(0, vocabulary - 1), min_size=count, max_size=count)), parents)


def bits(row: torch.Tensor) -> set[int]:
    return {64 * w + b for w, word in enumerate(row.tolist()) for b in range(64) if word >> b & 1}


@given(trees())
def test_ancestors_are_the_path(tree: TokenTree) -> None:
    packed = tree.ancestors()
    assert packed.shape == (len(tree), -(-len(tree) // 64)) and packed.dtype == torch.int64
    for node in range(len(tree)):
        path = tree.path(node)
        assert bits(packed[node]) == set(path)
        # The contract windows rely on: ancestors sorted by index have depths 0, 1, 2, ...
        assert path == sorted(path) and [tree.depths[i] for i in path] == list(range(len(path)))


@given(trees())
def test_children_and_parents_agree(tree: TokenTree) -> None:
    assert tree.roots == tuple(i for i, parent in enumerate(tree.parents) if parent == -1)
    for node in range(len(tree)):
        assert all(tree.parents[child] == node for child in tree.children(node))
    assert sum(len(tree.children(node)) for node in range(-1, len(tree))) == len(tree)


def all_paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.path_tokens(node)) for node in range(len(tree))}


@given(st.lists(trees(max_nodes=12, vocabulary=3), min_size=1, max_size=4))
def test_merge_keeps_every_token_path_once(parts: list[TokenTree]) -> None:
    merged = TokenTree.merge(parts)
    assert all_paths(merged) == set().union(*map(all_paths, parts))
    assert len(merged) == len(all_paths(merged))
    assert TokenTree.merge([merged, *parts]) == merged


def test_merge_orders_nodes_by_first_appearance() -> None:
    merged = TokenTree.merge([TokenTree.chain([1, 2, 3]), TokenTree.chain([1, 4]), TokenTree.chain([5])])
    assert merged == TokenTree([1, 2, 3, 4, 5], [-1, 0, 1, 0, -1])


@given(trees(max_nodes=20))
def test_the_drawing_shows_every_node(tree: TokenTree) -> None:
    lines = tree.draw().splitlines()
    assert len(lines) == len(tree)
    assert sorted(int(line.split("[")[1].split("]")[0]) for line in lines) == list(range(len(tree)))


def test_drawing() -> None:
    tree = TokenTree([7, 8, 9, 7, 6], [-1, 0, 1, 0, -1])
    assert tree.draw() == (
        "├─ [0] 7\n"
        "│  ├─ [1] 8\n"
        "│  │  └─ [2] 9\n"
        "│  └─ [3] 7\n"
        "└─ [4] 6"
    )  # fmt: skip
    assert tree.draw(lambda token: f"t{token}\n", accepted=[0, 1]).splitlines()[:2] == [
        "├─ [0] 't7\\n' ✓",
        "│  ├─ [1] 't8\\n' ✓",
    ]
    assert len(TokenTree.chain(range(3000)).draw().splitlines()) == 3000


def test_ancestors_sign_bit_padding_and_cache() -> None:
    tree = TokenTree.chain(range(65))
    packed = tree.ancestors()
    assert packed[63].tolist() == [-1, 0] and packed[64].tolist() == [-1, 1]
    assert tree.ancestors() is packed
    wide = tree.ancestors(4)
    assert torch.equal(wide[:, :2], packed) and not wide[:, 2:].any()
    with pytest.raises(InvalidTree, match=r"words=1 for 65 nodes, expected at least 2 words"):
        tree.ancestors(1)


def test_constructor_takes_tensors_ranges_and_numpy() -> None:
    tree = TokenTree([4, 5], [-1, 0])
    assert tree == TokenTree(torch.tensor([4, 5]), torch.tensor([-1, 0]))
    assert tree == TokenTree(numpy.array([4, 5]), numpy.array([-1, 0]))  # type: ignore[arg-type]
    assert tree == TokenTree.chain([4, 5]) == TokenTree(range(4, 6), range(-1, 1))
    assert hash(tree) == hash(TokenTree.chain([4, 5]))
    assert all(type(token) is int for token in tree.tokens)


@pytest.mark.parametrize(
    ("tokens", "parents", "text"),
    [
        ([], [], "got no nodes, expected at least one"),
        ([1, 2], [-1], "got 2 tokens and 1 parents, expected as many parents as tokens"),
        ([1], [0], "a cycle 0 -> 0"),
        ([1, 2, 3], [-1, 2, 1], r"got parents\[1\] = 2, a cycle 1 -> 2 -> 1"),
        ([1, 2, 3], [-1, 2, 0], r"got parents\[1\] = 2, out of order, .*List parents before their children"),
        ([1], [-2], r"got parents\[0\] = -2 in a tree of 1 nodes, expected -1 or the index of an earlier node"),
        ([1, 2], [-1, 9], r"got parents\[1\] = 9 in a tree of 2 nodes"),
        ([1, -5], [-1, 0], r"got tokens\[1\] = -5, expected token ids of 0 or more"),
        ([1.0], [-1], r"got tokens\[0\] = 1.0 \(float\), expected integers"),
        ([True], [-1], r"got tokens\[0\] = True \(bool\), expected integers"),
        ("ab", [-1, 0], r"got tokens\[0\] = 'a' \(str\), expected integers"),
        (7, [-1], "got tokens of type int, expected a sequence of integers or a 1-D tensor"),
        (torch.ones(1), [-1], "got tokens of dtype torch.float32, expected torch.int64"),
        ([1], torch.tensor([[-1]]), r"got parents of shape \[1, 1\], expected one dimension"),
    ],
)
def test_invalid_trees(tokens: Any, parents: Any, text: str) -> None:
    with pytest.raises(InvalidTree, match=text):
        TokenTree(tokens, parents)


def test_nodes_out_of_range() -> None:
    tree = TokenTree.chain([1, 2])
    with pytest.raises(IndexError, match="got node 2, expected 0 to 1"):
        tree.path(2)
    with pytest.raises(IndexError, match="got node -2"):
        tree.children(-2)


def test_forest() -> None:
    forest = Forest([(2, TokenTree.chain([1, 2])), (0, TokenTree.chain([3]))])
    assert len(forest) == 3 and forest.slots == (2, 0)
    assert [slot for slot, _ in forest] == [2, 0]


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([], "got no trees"),
        ([(0, TokenTree.chain([1])), (0, TokenTree.chain([2]))], "got slot 0 twice, .*TokenTree.merge"),
        ([(-1, TokenTree.chain([1]))], "got slot -1, expected an integer of 0 or more"),
        ([("a", TokenTree.chain([1]))], "got slot 'a'"),
        ([TokenTree.chain([1])], r"got the item TokenTree\(.*expected a \(slot, TokenTree\) pair"),
    ],
)
def test_invalid_forests(items: Any, text: str) -> None:
    with pytest.raises(InvalidForest, match=text):
        Forest(items)
