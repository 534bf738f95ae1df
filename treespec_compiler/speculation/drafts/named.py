"""Drafts that have a name instead of a model: `draft="ngram"`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import InvalidOption
from ...program.early_exit import ExitHead
from .early_exit import EarlyExitDraft
from .ngram import NGramDraft
from .protocol import Draft

if TYPE_CHECKING:
    from ...program.tree_program import TreeProgram

EXPECTED = '"ngram", "early-exit", "early-exit:2" (layers) or "early-exit:FILE.safetensors" (a trained head)'


def is_named(name: str) -> bool:
    """Whether this is such a name, rather than a model's."""
    return name.strip().partition(":")[0] in ("ngram", "early-exit")


def named_draft(name: str, program: TreeProgram) -> Draft:
    """The draft called `name` for the target `program`."""
    if name.strip() == "ngram":
        return NGramDraft()
    kind, _, layers = name.strip().partition(":")
    if kind == "early-exit" and layers.endswith(".safetensors"):
        head = ExitHead.load(layers)
        return EarlyExitDraft(program, head.layer, head)
    if kind == "early-exit" and (not layers or layers.isdecimal()) and layers != "0":
        return EarlyExitDraft(program, int(layers) if layers else None)
    raise InvalidOption(name="draft", got=name, expected=f"a model, or {EXPECTED}")
