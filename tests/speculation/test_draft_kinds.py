"""`treespec.register_draft`: kinds of drafts by name, those that come with treespec included."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from fake_program import FakeProgram, greedy, table_row

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption
from treespec_compiler.speculation.drafts import registry
from treespec_compiler.speculation.drafts.kinds import is_named, kinds
from treespec_compiler.speculation.drafts.model import ModelDraft
from treespec_compiler.speculation.drafts.ngram import NGramDraft

VOCAB = 40
ROW = table_row(VOCAB, seed=1)
PROMPT = [3, 1, 4, 1, 5]
DOCS = Path(__file__).parents[2] / "docs"


def generate(draft, count: int = 20):
    return treespec.generate(FakeProgram(ROW, VOCAB), PROMPT, draft=draft, policy="1,1", max_new_tokens=count)


@pytest.fixture
def name():
    yield "mine"
    registry.unregister_draft("mine")


def test_a_registered_kind_is_made_by_its_name_and_argument(name):
    asked = []

    def factory(argument, context):
        asked.append((argument, context.target))
        return ModelDraft(FakeProgram(ROW, VOCAB), name=name)

    treespec.register_draft(name, factory, usage='"mine" or "mine:SIZE"')
    for draft in ("mine", "mine:big:2", ["ngram", " mine:x "]):
        assert generate(draft).sequences.tolist() == [greedy(ROW, PROMPT, 20)]
    assert [argument for argument, _ in asked] == ["", "big:2", "x"]
    assert all(isinstance(target, FakeProgram) for _, target in asked)
    assert is_named("mine:big") and not is_named("minelike")


def test_a_kind_may_take_objects(name):
    class Recipe:
        pass

    treespec.register_draft(name, lambda recipe, _: NGramDraft(), takes=lambda thing: isinstance(thing, Recipe))
    assert generate(Recipe()).sequences.tolist() == [greedy(ROW, PROMPT, 20)]
    with pytest.raises(InvalidOption, match="got 'object', expected a module, a TreeProgram, a Draft"):
        generate(object())


def test_an_unknown_name_is_refused_with_what_there_is(name):
    treespec.register_draft(name, lambda *_: NGramDraft(), usage='"mine:SIZE"')
    with pytest.raises(InvalidOption) as caught:
        generate("ngrams")
    text = str(caught.value)
    assert "got 'ngrams'" in text and all(kind.usage in text for kind in kinds().values())
    assert '"ngram"' in text and "early-exit:2" in text and '"mine:SIZE"' in text


@pytest.mark.parametrize("draft", ["ngram:3", "early-exit:0", "early-exit:two", "model"])
def test_an_argument_that_a_kind_does_not_know_is_refused(draft):
    with pytest.raises(InvalidOption, match="Invalid option draft"):
        generate(draft)


@pytest.mark.parametrize("bad", ["", "a:b", " a", 3])
def test_names_that_could_not_be_typed_are_refused(bad):
    with pytest.raises(InvalidOption, match="Invalid option register_draft"):
        treespec.register_draft(bad, lambda *_: NGramDraft())
    with pytest.raises(InvalidOption, match="expected a function"):
        treespec.register_draft("mine", "no function")


def test_installed_packages_bring_kinds(name, monkeypatch, caplog):
    module = ModuleType("some_package")
    module.factory = lambda argument, context: NGramDraft(int(argument or 2))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_package", module)
    points = [
        EntryPoint("mine", "some_package:factory", registry.GROUP),
        EntryPoint("broken", "no_such_package:factory", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "treespec.drafts" else [])
    registry._load_installed.cache_clear()
    assert generate("mine:3").sequences.tolist() == [greedy(ROW, PROMPT, 20)]
    assert "entry point broken" in caplog.text


def test_the_example_in_the_docs_runs():
    (code,) = re.findall(
        r"```python\n(.*?register_draft.*?)```", (DOCS / "writing-a-draft.md").read_text("utf-8"), re.S
    )
    try:
        exec(code, {})
        assert generate("repeat:3", 30).sequences.tolist() == [greedy(ROW, PROMPT, 30)]
    finally:
        registry.unregister_draft("repeat")
