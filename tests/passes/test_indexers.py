"""Indexers: keys that are chosen by content, exact where the choice is of a path's own tokens, refused elsewhere."""

from __future__ import annotations

from functools import cache as remember
from typing import Any

import indexed_cases as cases
import pytest
import sharded
import torch
import zoo
from modules import VOCAB
from oracles import EAGER, assert_decodes, error, random_tree
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler import Forest, TokenTree
from treespec_compiler.errors import Refusal, Unsupported
from treespec_compiler.program.own_choices import own_choices

OTHER_BLOCKS = (
    cases.FilledBlocks,
    cases.MeanBlocks,
    cases.NextBlock,
    cases.OtherBlocks,
    cases.HalfOfTheBlocks,
)


@remember
def model_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind()


@remember
def program_of(kind: type[nn.Module]) -> Any:
    return treespec.tree_program(model_of(kind), options=EAGER)


def own_row(model: nn.Module, ids: list[int], program: Any) -> Tensor:
    with torch.no_grad(), own_choices(program.state):
        return model(torch.tensor([ids]))[0, -1]


@pytest.mark.parametrize("kind", [cases.Indexed, pytest.param(cases.Marked, marks=pytest.mark.rare)])
def test_an_indexer_is_exact(kind: type[nn.Module]) -> None:
    program = program_of(kind)
    assert {s.formula for s in program.sites} == {"k <= q and one of the 4 of largest index score"}
    assert [s.index_dim for s in program.sites] == [cases.INDEX_DIM] * 2
    for prompt in (1, 3, 4, 5, 20):
        assert_decodes(model_of(kind), program, VOCAB, rounds=1, prompt=prompt)


@pytest.mark.rare
def test_a_choice_of_blocks_is_exact() -> None:
    """Prompts below, at and above the borders of blocks of 4."""
    kind, program = cases.Blocks, program_of(cases.Blocks)
    assert {s.formula for s in program.sites} == {"k <= q and in one of the 2 blocks of 4 of largest index score"}
    for prompt in (1, 3, 4, 5, 20):
        assert_decodes(model_of(kind), program, VOCAB, rounds=1, prompt=prompt)
    assert_decodes(model_of(kind), program, VOCAB, rounds=3, size=80, prompt=15)


def test_its_keys_are_kept_beside_k_and_v() -> None:
    program = program_of(cases.Indexed)
    site, cache = program.sites[0], program.new_cache(32, slots=2)
    assert site.bytes_per_token() == 4 * (2 * 16 + cases.INDEX_DIM)
    assert cache.bytes == 2 * 32 * site.bytes_per_token() * 2
    assert [tuple(pool.shape) for pool in cache.pools[:3]] == [(2, 4, 32, 4), (2, 4, 32, 4), (2, 1, 32, 6)]
    inputs = [n.name for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    assert [name for name in inputs if name.endswith("_1") and "pool" in name] == [
        "pool_k_1",
        "pool_v_1",
        "pool_index_1",
    ]


@pytest.mark.rare
@pytest.mark.parametrize("kind", [cases.Indexed, cases.OneHead, cases.LocalBlocks])
def test_forests_levels_pieces_and_commits(kind: type[nn.Module]) -> None:
    """Where scores tie as well: each row is that of a run in which every token chose as the last of its own path."""
    model = model_of(kind)
    program = treespec.tree_program(model, options={**EAGER, "prefill_chunk": 5})
    cache, tree = program.new_cache(64, slots=2), random_tree(9, VOCAB, 4)
    prefix = [5 * i % VOCAB for i in range(18)]
    program.prefill(prefix, cache, 1)

    def check(rows: Tensor, nodes: Any, before: list[int]) -> None:
        for row, node in zip(rows, nodes, strict=True):
            assert error(row, own_row(model, before + tree.path_tokens(node), program)) <= 1e-5

    for start, end in ((0, 2), (2, 6), (6, 9)):
        part = TokenTree(tree.tokens[:end], tree.parents[:end])
        check(program.extend(Forest([(1, part)]), cache, start={1: start}), range(start, end), prefix)
    cache.commit({1: tree.path(8)})
    prefix += [tree.tokens[n] for n in tree.path(8)]
    rows = program.verify(Forest([(0, tree), (1, tree)]), cache)
    check(rows[:9], range(9), [])
    check(rows[9:], range(9), prefix)


@pytest.mark.rare
def test_where_scores_tie_a_token_chooses_as_the_last_one_of_its_text() -> None:
    """torch.topk's own order of equal scores depends on what follows; the program's does not."""
    model, program = model_of(cases.OneHead), program_of(cases.OneHead)
    ids = [(7 * i * i + 3) % VOCAB for i in range(40)]
    with torch.no_grad():
        whole = model(torch.tensor([ids]))[0]
        last = torch.stack([own_row(model, ids[: i + 1], program) for i in range(40)])
        with own_choices(program.state):
            own = model(torch.tensor([ids]))[0]
    assert error(whole, last) > 1e-2, "no ties: the case shows nothing"
    torch.testing.assert_close(own, last, atol=1e-5, rtol=1e-5)
    cache = program.new_cache(64)
    program.prefill(ids[:1], cache)
    rows = program.verify(TokenTree.chain(ids[1:]), cache)
    torch.testing.assert_close(rows, last[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.rare
@pytest.mark.parametrize("name", ["deepseek_v32", "dots3_note_text", "glm_moe_dsa"])
def test_a_program_chooses_as_the_model_s_own_decoding(name: str) -> None:
    """With the model's own cache, token by token, on texts in which scores tie."""
    model = zoo.tiny_model(name)
    program = treespec.tree_program(model, options=EAGER)
    ids, cache, wanted = [(7 * i * i + 5 * i + 3) % 96 for i in range(90)], None, []
    with torch.no_grad():
        for token in ids:
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache, wanted = out.past_key_values, [*wanted, out.logits[0, -1]]
    mine = program.new_cache(96)
    program.prefill(ids[:30], mine)
    rows = program.verify(TokenTree.chain(ids[30:]), mine)
    for row, want in zip(rows, wanted[30:], strict=True):
        assert error(row, want) <= 1e-4


@pytest.mark.family
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (cases.SeesTheFuture, "the mask depends on the content of the tokens"),
        (cases.HidesOther, "mask"),
        (cases.HidesLittle, "the mask depends on the content of the tokens"),
        (cases.Worst, "the mask depends on the content of the tokens"),
        (cases.ByLength, "the mask depends on the content of the tokens"),
        (cases.NotChosen, "the mask depends on the content of the tokens"),
        (cases.Places, "the mask depends on the content of the tokens"),
        (cases.OtherActivation, "the mask depends on the content of the tokens"),
        (cases.Normed, "the mask depends on the content of the tokens"),
        (cases.BlocksAhead, "bidirectional|hides no|mask"),
        (cases.Windowed, "an indexer chooses keys under the mask k <= q and q - k < 10"),
        (cases.WindowedIndex, "an indexer chooses keys under the mask k <= q and q - k < 10"),
        (cases.Biased, "the mask depends on the content of the tokens"),
        (cases.Sigmoid, "attention"),
        *((kind, "the mask depends on the content of the tokens") for kind in OTHER_BLOCKS),
    ],
)
def test_what_is_not_proved_is_refused(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason) as caught:
        treespec.tree_program(kind(), options={**EAGER, "verify": "off"})
    assert caught.value.source


@pytest.mark.rare
def test_a_mesh_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"an indexer chooses the keys of .* for all of its heads") as caught:
        sharded.cut(sharded.uncut(cases.Indexed()), 2)
    assert caught.value.kind is Refusal.MESH
    with pytest.raises(Unsupported, match=r"an indexer chooses the keys of .* stages do not carry") as caught:
        sharded.stages(sharded.uncut(cases.Indexed()), "pp=2")
    assert caught.value.kind is Refusal.MESH
