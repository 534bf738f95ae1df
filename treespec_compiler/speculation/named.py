"""Drafts that have a name instead of a model: `draft="ngram"`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InvalidOption
from .draft import Draft
from .ngram import NGramDraft

if TYPE_CHECKING:
    from ..program import TreeProgram

EXPECTED = '"ngram"'


def named_draft(name: str, program: TreeProgram) -> Draft:
    """The draft called `name` for the target `program`."""
    if name.strip() == "ngram":
        return NGramDraft()
    raise InvalidOption(name="draft", got=name, expected=f"a model, or {EXPECTED}")
