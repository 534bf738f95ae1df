"""What one process saved is found by another: a sample of the types that `found_again` runs on demand.

Of each kind one: plain and eager attention, learned positions, ALiBi, windows, softcaps, tied heads, experts, several
kinds of layers; and what is not saved, layers with a state.
"""

from __future__ import annotations

import found_again
import pytest
from families import some_of

pytest.importorskip("transformers")

FOUND = ("llama", "gpt2", "gpt_neo", "bloom", "mixtral", "falcon", "gemma3_text", "phi3", "cohere2")
NOT_SAVED = ("lfm2",)


def test_a_second_process_finds_them() -> None:
    some = some_of(FOUND)
    found = {name: (verdict, more) for name, verdict, more in found_again.twice([*some, *NOT_SAVED], batch=99)}
    for name in some:
        assert found[name][0] == "found", (name, found[name])
    for name in NOT_SAVED:
        assert found[name][0] == "not saved" and "state" in found[name][1]


def test_what_is_wrong_is_said() -> None:
    right = {"right": True, "from_cache": False, "wrote": 1, "heard": ["why"], "seconds": 1.0}
    again = right | {"from_cache": True, "wrote": 0}
    assert found_again.verdict(right, again)[0] == "found"
    assert found_again.verdict(right, right)[0] == "missed"
    assert found_again.verdict(right | {"wrote": 0}, right) == ("not saved", "why; why")
    assert found_again.verdict(right, again | {"right": False, "error": "AssertionError"})[0] == "wrong"
    assert found_again.verdict(right, {"refused": "a mask", "heard": [], "wrote": 0})[0] == "wrong"
    assert found_again.verdict(right, None)[0] == "no answer"
