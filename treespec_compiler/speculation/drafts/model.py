"""`ModelDraft`: a small model compiled by treespec, with its own tree cache."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ...errors import InvalidOption
from ...program.tree_program import TreeProgram, tree_program
from .protocol import DraftRequest
from .registry import DraftContext, register_draft
from .session import ModelDraftSession


class ModelDraft:
    """A draft model run by its own tree program."""

    def __init__(self, program: TreeProgram, name: str = "draft") -> None:
        self.program = program
        self.name = name
        self.prefill_seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        return self.program.compile_seconds

    def open(self, request: DraftRequest) -> ModelDraftSession:
        return ModelDraftSession(self, request)


def is_program(thing: object) -> bool:
    """Whether it is a tree program, or has of one what a loop needs."""
    return not isinstance(thing, nn.Module) and hasattr(thing, "verify") and hasattr(thing, "new_cache")


def _draft(model: Any, context: DraftContext) -> ModelDraft:
    if isinstance(model, str):
        raise InvalidOption(name="draft", got="model", expected="the module itself or its TreeProgram")
    if not is_program(model):
        return ModelDraft(tree_program(model, options=context.options))
    program = cast(TreeProgram, model)
    program.check_weights(contents=True)  # the caches in use may have been made by an earlier call
    return ModelDraft(program)


def _takes(thing: object) -> bool:
    return isinstance(thing, nn.Module) or is_program(thing)


register_draft("model", _draft, usage="a module or a TreeProgram", takes=_takes)
