"""Text as tokens come: no part of a character, no part of a stop string, and its end before one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treespec_compiler.runtime.stopping import Text


class Bytes:
    """A token a byte."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def stream(text: str, stops: list[str], sizes: list[int]) -> tuple[list[str], int | None]:
    """Pieces as they are given out, and how many tokens are output."""
    ids, found, pieces, begin = list(text.encode()), None, [], 0
    watched = Text(Bytes(), stops)
    for size in [*sizes, len(ids)]:
        part = ids[begin : begin + size]
        end = watched.push(part)
        if end is not None:
            found = begin + end
        begin += len(part)
        last = found is not None or begin == len(ids)
        pieces.append(watched.pull(last=last))
        if last:
            break
    return pieces, found


TEXT = st.text(alphabet="abcä€😀", min_size=1, max_size=30)


@given(TEXT, st.lists(st.text(alphabet="abcä€😀", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 5)))
def test_pieces_are_the_text_up_to_the_first_stop_string_to_be_whole(text, stops, sizes):
    pieces, tokens = stream(text, stops, sizes)
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    if not ends:
        assert "".join(pieces) == text and tokens is None
        return
    first = min(end for end, _ in ends)
    expected = text[: min(begin for end, begin in ends if end == first)]
    assert "".join(pieces) == expected and tokens == len(text[:first].encode())
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown) and not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("a€b", [], ["a", "", "", "€", "b"]),
        ("a##b", ["###"], ["a", "", "", "##b"]),
        ("a####b", ["###"], ["a", "", "", ""]),
        ("ab", ["b", "abc"], ["", "a"]),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(text, stops, pieces):
    assert stream(text, stops, [1] * 10)[0] == pieces


def test_half_a_character_at_the_end_is_shown_at_last():
    watched = Text(Bytes())
    assert watched.push(list("€".encode())[:2]) is None and watched.pull() == ""
    assert watched.pull(last=True) == "\ufffd"
