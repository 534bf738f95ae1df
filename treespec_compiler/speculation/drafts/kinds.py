"""From what `generate(draft=...)` was given to drafts. Importing this registers the kinds that come with treespec."""

from __future__ import annotations

from typing import Any

from ...errors import InvalidOption
from . import early_exit as early_exit
from . import ngram as ngram
from . import recycle as recycle
from . import suffix as suffix
from .heads import draft as eagle3
from .heads import medusa as medusa
from .heads import parallel as parallel
from .model import ModelDraft
from .protocol import Draft
from .registry import DraftContext, check_named, draft_of, is_named, kinds, named_draft, register_draft, takes

__all__ = [
    "DraftContext",
    "count_drafts",
    "eagle3",
    "is_named",
    "kinds",
    "make_drafts",
    "medusa",
    "parallel",
    "register_draft",
]


def count_drafts(asked: Any) -> int:
    """How many drafts `make_drafts` will give. Raises InvalidOption for what is none, before anything is made of it."""
    if asked is None:
        return 0
    if isinstance(asked, (list, tuple)):
        return sum(count_drafts(item) for item in asked)
    if isinstance(asked, str):
        check_named(asked)
    elif not takes(asked) and (not isinstance(asked, Draft) or isinstance(asked, type)):
        expected = "a module, a TreeProgram, a Draft, a list of them, the name of one, or None"
        raise InvalidOption(name="draft", got=type(asked).__name__, expected=expected)
    return 1


def make_drafts(asked: Any, context: DraftContext) -> list[Draft]:
    """The drafts of a name, a module, a program, a Draft or a list of them; None: none. Raises InvalidOption."""
    if not count_drafts(asked):
        return []
    if isinstance(asked, (list, tuple)):
        drafts = [draft for item in asked for draft in make_drafts(item, context)]
        for index, draft in enumerate(drafts):
            if isinstance(draft, ModelDraft) and len(drafts) > 1 and draft.name == "draft":
                draft.name = f"draft{index}"
        return drafts
    if isinstance(asked, str):
        return [named_draft(asked, context)]
    made = draft_of(asked, context)
    if made is not None:
        return [made]
    if isinstance(asked, ModelDraft):
        asked.program.check_weights(contents=True)
    return [asked]
