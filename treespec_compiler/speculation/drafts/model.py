"""`ModelDraft`: a small model compiled by treespec, with its own tree cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .protocol import DraftRequest
from .session import ModelDraftSession

if TYPE_CHECKING:
    from ...program.tree_program import TreeProgram


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
