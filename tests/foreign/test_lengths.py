"""What Python code makes from the number of tokens alone is a table, or the model is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lengths_listed
import lengths_read
import pytest
import torch
from lengths import CONVERTED, EndsAt, EndsSoon, RowsInALoop
from lengths_read import (
    CachedLoop,
    FunctionInAnAttribute,
    KeptByLength,
    KeptInAGlobal,
    ListedLoop,
    OtherInEachLayer,
    SettingsLoop,
    held_in_a_closure,
)
from lengths_refused import REFUSED
from modules import DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from styles import built

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal

STYLES = [*CONVERTED, *lengths_read.CONVERTED, *lengths_listed.CONVERTED]


@pytest.mark.family
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_rows_are_the_models_own(style: type[Any]) -> None:
    model = built(style)
    program = treespec.tree_program(model, options=EAGER)
    graph = program.graph_module
    assert_decodes(model, program, VOCAB, rounds=1, size=7)
    assert treespec.tree_program(model, options=EAGER).graph_module is graph


@pytest.mark.family
@pytest.mark.parametrize("style", [*REFUSED, *lengths_listed.REFUSED], ids=lambda style: style.__name__)
def test_refused(style: type[Any]) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(built(style), options=EAGER)
    assert refusal.value.kind in (Refusal.SPECIALISED, Refusal.MASK, Refusal.POSITIONS, Refusal.LENGTH)


@pytest.mark.rare
def test_a_setting_of_the_loop_is_followed() -> None:
    model = built(RowsInALoop)
    program = treespec.tree_program(model, options=EAGER)
    assert program.sites[0].mask.window == 4
    model.window = 3
    again = treespec.tree_program(model, options=EAGER)
    assert again.sites[0].mask.window == 3
    assert_decodes(model, again, VOCAB, rounds=1, size=7)


@pytest.mark.rare
def test_a_global_that_the_loop_reads_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(CachedLoop)
    assert treespec.tree_program(model, options=EAGER).sites[0].mask.window == 6
    monkeypatch.setattr(lengths_read, "REACH", 2)
    lengths_read.looped.cache_clear()
    again = treespec.tree_program(model, options=EAGER)
    assert again.sites[0].mask.window == 3
    assert_decodes(model, again, VOCAB, rounds=1, size=7)


@pytest.mark.rare
def test_a_list_that_the_loop_reads_is_followed() -> None:
    model = built(ListedLoop)
    assert treespec.tree_program(model, options=EAGER).sites[0].mask.window == 5
    lengths_read.REACHES[0] = 2
    try:
        again = treespec.tree_program(model, options=EAGER)
        assert again.sites[0].mask.window == 3
        assert_decodes(model, again, VOCAB, rounds=1, size=7)
    finally:
        lengths_read.REACHES[0] = 4


@pytest.mark.rare
def test_what_was_kept_before_is_the_same() -> None:
    model = built(KeptByLength)
    model(torch.ones(1, 9, dtype=torch.int64))
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=1, size=7)


def test_what_its_user_put_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lengths_read.KEPT, 11, torch.zeros(11, 11))
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(KeptInAGlobal), options=EAGER)


@pytest.mark.rare
def test_what_the_loop_reads_of_an_object_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(SettingsLoop)
    assert treespec.tree_program(model, options=EAGER).sites[0].mask.window == 5
    monkeypatch.setattr(lengths_read.SETTINGS, "reach", 2)
    again = treespec.tree_program(model, options=EAGER)
    assert again.sites[0].mask.window == 3
    assert_decodes(model, again, VOCAB, rounds=1, size=7)


@pytest.mark.rare
def test_a_function_in_an_attribute_is_followed() -> None:
    model = built(FunctionInAnAttribute)
    assert treespec.tree_program(model, options=EAGER).sites[0].mask.window == 4
    model.reach = lambda: 2
    again = treespec.tree_program(model, options=EAGER)
    assert again.sites[0].mask.window == 3
    assert_decodes(model, again, VOCAB, rounds=1, size=7)


@pytest.mark.rare
def test_layers_have_tables_of_their_own() -> None:
    model = built(OtherInEachLayer)
    program = treespec.tree_program(model, options=EAGER)
    assert [site.mask.window for site in program.sites] == [4, 7]
    assert_decodes(model, program, VOCAB, rounds=1, size=7)


@pytest.mark.rare
def test_what_its_user_keeps_there_later_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_read, "KEPT", {})
    model = built(KeptInAGlobal)
    treespec.tree_program(model, options=EAGER)
    lengths_read.KEPT[40] = torch.zeros(40, 40)
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(model, options=EAGER)


def test_what_an_earlier_call_kept_at_any_length_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lengths_read.KEPT, 101, torch.zeros(101, 101))
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(built(KeptInAGlobal), options=EAGER)


@pytest.mark.rare
def test_functions_of_functions_are_found() -> None:
    model: Any = held_in_a_closure()
    program = treespec.tree_program(model, options=EAGER)
    assert program.sites[0].mask.window == 4
    assert_decodes(model, program, VOCAB, rounds=1, size=7)
    model.kept[40] = torch.zeros(40)
    with pytest.raises(treespec.Unsupported):
        treespec.tree_program(model, options=EAGER)


LOOP = """
import torch
from modules import Tiny

class Edited(Tiny):
    layers = 1

    def mask(self, tokens):
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        for i in range(tokens):
            seen[i, : max(0, i - 3)] = False
        return seen
"""


def test_a_file_that_was_edited_since_is_not_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited_since.py"
    file.write_text(LOOP)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = built(importlib.import_module("edited_since").Edited)
    file.write_text(LOOP.replace("i - 3", "i - 30"))  # of another size, as `linecache` asks
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(model, options=EAGER)
    assert refusal.value.kind is Refusal.SPECIALISED


@pytest.mark.parametrize("style", [EndsAt, EndsSoon])
def test_the_context_ends_where_the_code_does(style: type[EndsAt]) -> None:
    program = treespec.tree_program(built(style), options=EAGER)
    assert program.max_context == style.end


class SingledOut(Tiny):
    """Another mask at 1777 tokens, which are no number in the code."""

    layers = 1

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(ids.shape[1])[:, None] * torch.linspace(-0.1, 0.1, DIM)

    def mask(self, tokens: int) -> torch.Tensor:
        m = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i in range(tokens):
            m[i, i if tokens * tokens % 4093 == 2026 else 0 : i + 1] = True
        return m


@pytest.mark.rare
def test_where_lengths_may_be_singled_out_the_context_ends_with_those_that_were_looked_at() -> None:
    try:
        context = treespec.tree_program(built(SingledOut), options=EAGER).max_context
    except treespec.Unsupported:
        return  # a machine that gets so far sees it
    assert context is not None and 257 < context < 1777
