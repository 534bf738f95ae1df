"""Token ids to text as they arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

REPLACEMENT = "\ufffd"
KEPT = 32
"""Tokens that are decoded again with new ones, so that these find the neighbours that change their text."""
TRIES = 8
"""Places tried for a new beginning, which must not lie within a character."""


class TextStream:
    """Decodes a growing list of ids; `push` returns only text that later ids cannot change.

    Only the last tokens are decoded again, so that a long text costs no more a token than a short one. Without a
    tokenizer the text is the ids themselves.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pieces: list[str] = []
        self._window: list[int] = []  # the newest ids
        self._shown = 0  # characters of the window's text that were returned
        self._limit = 2 * KEPT

    @property
    def shown(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain now and was not before."""
        self._window += ids
        text = self._decode(self._window)
        piece = self._advance(text.rstrip(REPLACEMENT))
        if len(self._window) > self._limit:
            self._forget(text)
        return piece

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        return self._advance(self._decode(self._window))

    def _decode(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return "".join(f"{i} " for i in ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _advance(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        self._pieces.append(piece)
        return piece

    def _forget(self, text: str) -> None:
        """Begin the window later, where its text is the end of the text there is, and all before it was returned."""
        for start in range(len(self._window) - KEPT, len(self._window) - KEPT + TRIES):
            rest = self._decode(self._window[start:])
            before = len(text) - len(rest)
            if text.endswith(rest) and before <= self._shown:
                self._window = self._window[start:]
                self._shown -= before
                self._limit = 2 * KEPT
                return
        self._limit = 2 * len(self._window)  # try again much later, so that the time stays linear
