"""Which cases of long families an ordinary run takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from families import EVERY, VARIABLE, leave_out, sampled, some_of


@dataclass
class Item:
    nodeid: str
    marks: set[str] = field(default_factory=set)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


def family(name: str, count: int) -> list[Item]:
    return [Item(f"{name}[{i}]", {"family"}) for i in range(count)]


def test_every_twelfth_and_always_the_first() -> None:
    alone = Item("test_alone")
    kept, left = sampled([*family("test_a", 13), alone, *family("test_b", 2)])  # type: ignore[list-item]
    assert [item.nodeid for item in kept] == ["test_a[0]", "test_a[12]", "test_alone", "test_b[0]"]
    assert len(left) == 12 and EVERY == 12


def test_what_is_rare_runs_alone() -> None:
    rare = Item("test_long", {"rare"})
    assert sampled([rare])[0] == [rare]  # type: ignore[list-item]
    assert sampled([rare, Item("test_b")])[1] == [rare]  # type: ignore[list-item]


def test_one_that_is_asked_for_runs() -> None:
    assert sampled(family("test_a", 9)[5:6])[1] == []  # type: ignore[arg-type]


def test_all_of_them(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    items = family("test_a", 9)
    leave_out(pytestconfig, items)  # type: ignore[arg-type]
    assert len(items) == 9 and some_of("abcdefghi") == [*"abcdefghi"]
    monkeypatch.delenv(VARIABLE)
    assert some_of("abcdefghijklmn") == ["a", "m"]
