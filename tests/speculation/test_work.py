"""Work with named outputs: what a draft that reads hidden states asks for, alone and packed with what others want."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import EAGER

from treespec_compiler import TokenTree, tree_program
from treespec_compiler.errors import InvalidOption
from treespec_compiler.speculation.slots import KEPT, Slot
from treespec_compiler.speculation.work import Nodes, Prompt, alone, perform

TREE = TokenTree([5, 6, 7], [-1, 0, 0])


@pytest.fixture(scope="module")
def program():
    return tree_program(zoo.make("llama"), options=EAGER)


def slot_with(program, *prompts) -> list[Slot]:
    cache = program.new_cache(64, slots=len(prompts))
    for index, prompt in enumerate(prompts):
        program.prefill(prompt, cache, slot=index)
    return [Slot(program, cache, index) for index in range(len(prompts))]


def answers(*wanted) -> list:
    found = [None] * len(wanted)
    for place, answer in perform(wanted):
        assert not isinstance(answer, Exception), answer
        found[place] = {k: v.clone() for k, v in answer.items()} if isinstance(answer, dict) else answer.clone()
    return found


def test_one_piece_of_work_is_answered_with_what_it_names(program):
    (slot,) = slot_with(program, [3, 1])
    expected = program.verify(TREE, slot.cache, outputs=("hidden:1", "logits"))
    expected = {name: value.clone() for name, value in expected.items()}
    (found,) = answers(Nodes(slot, TREE, outputs=("hidden:1", "logits")))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    longer = TokenTree([5, 6, 7, 8], [-1, 0, 0, 2])
    (found,) = answers(Nodes(slot, longer, 3, ("hidden:1",)))
    assert found.keys() == {"hidden:1"} and found["hidden:1"].shape == (1, 64)
    expected = program.verify(longer, slot.cache, outputs=("hidden:1",))["hidden:1"]
    torch.testing.assert_close(found["hidden:1"], expected[3:])


def test_a_prompt_has_outputs_too(program):
    (slot,) = slot_with(program, [3, 1])
    (found,) = answers(Prompt(slot, [4, 1, 5], ("logits", "hidden:2")))
    assert found["logits"].shape == (96,) and found["hidden:2"].shape == (3, 64)
    assert slot.length == 5


def test_nodes_that_want_different_outputs_are_one_call(program, monkeypatch):
    first, second, third = slot_with(program, [3, 1], [4], [1, 5, 9])
    alone_ = [
        program.verify(TREE, first.cache).clone(),
        {k: v.clone() for k, v in slot_answer(program, [4], ("hidden:2", "logits")).items()},
        {k: v.clone() for k, v in slot_answer(program, [1, 5, 9], ("hidden:0",)).items()},
    ]
    calls = []
    extend = program.extend
    monkeypatch.setattr(program, "extend", lambda *a, **k: calls.append(k) or extend(*a, **k))
    found = answers(
        Nodes(first, TREE),
        Nodes(second, TREE, outputs=("hidden:2", "logits")),
        Nodes(third, TREE, outputs=("hidden:0",)),
    )
    assert calls == [{"outputs": ("logits", "hidden:2", "hidden:0")}]
    torch.testing.assert_close(found[0], alone_[0])
    for got, expected in zip(found[1:], alone_[1:], strict=True):
        assert list(got) == list(expected)
        for name in got:
            torch.testing.assert_close(got[name], expected[name])


def slot_answer(program, prompt, outputs) -> dict:
    (slot,) = slot_with(program, prompt)
    return program.verify(TREE, slot.cache, outputs=outputs)


def test_logits_alone_are_asked_for_without_names(program, monkeypatch):
    first, second = slot_with(program, [3, 1], [4])
    calls = []
    extend = program.extend
    monkeypatch.setattr(program, "extend", lambda *a, **k: calls.append(k) or extend(*a, **k))
    found = answers(Nodes(first, TREE), Nodes(second, TREE))
    assert calls == [{}] and [rows.shape for rows in found] == [(3, 96)] * 2


def test_a_call_that_fails_is_the_error_of_him_whose_fault_it_is(program):
    first, second = slot_with(program, [3, 1], [4])
    wanted = [Nodes(first, TREE), Nodes(second, TREE, outputs=("hidden:9",))]
    expected = program.verify(TREE, first.cache).clone()
    found = {place: answer.clone() if isinstance(answer, torch.Tensor) else answer for place, answer in perform(wanted)}
    assert isinstance(found[1], InvalidOption)
    torch.testing.assert_close(found[0], expected)


def test_a_generator_is_sent_the_outputs_it_asked_for(program):
    """As a draft head does it: hidden states of the prompt, then of a tree."""
    slot = KEPT.take(program, 64)

    def works():
        prompt = yield Prompt(slot, [3, 1, 4], ("hidden:1", "logits"))
        tree = yield Nodes(slot, TokenTree.chain([int(prompt["logits"].argmax())]), outputs=("hidden:1",))
        return prompt["hidden:1"].shape, tree["hidden:1"].shape

    assert alone(works()) == ((3, 64), (1, 64))
    KEPT.give_back(slot)
