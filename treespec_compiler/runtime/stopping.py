"""A request's text: where a stop string ends it, and what of it is certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .text import TextStream


class Text:
    """Decodes a request's tokens and looks for stop strings, which may begin and end within tokens.

    The text ends before the stop string. What is given out is never a part of one that may still become whole, nor a
    part of a character.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = TextStream(tokenizer), tuple(stops)
        self._text = ""  # decoded and not given out yet
        self._stopped = False

    def push(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens there are until a stop string is whole; None: it is not."""
        for i, token in enumerate(tokens):
            if self._add(self._stream.push([token])):
                return i + 1
        return None

    def pull(self, last: bool = False) -> str:
        """The text that is certain and was not given out; all of it with `last`."""
        if last and not self._stopped:
            self._add(self._stream.finish())
        kept = 0 if last or self._stopped else self._begun()
        text, self._text = self._text[: len(self._text) - kept], self._text[len(self._text) - kept :]
        return text

    def _add(self, piece: str) -> bool:
        """Whether the text is at its end."""
        self._text += piece
        found = [at for at in map(self._text.find, self._stops) if at >= 0]
        if found:
            self._text, self._stopped = self._text[: min(found)], True
        return self._stopped

    def _begun(self) -> int:
        """Characters at the text's end that may become a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        ends = (n for n in range(min(longest, len(self._text)), 0, -1))
        return next((n for n in ends if any(stop.startswith(self._text[-n:]) for stop in self._stops)), 0)
