"""Small decoders with the verdict that each must get: exact, or refused with a reason.

Each was chosen because a plausible shortcut would get it wrong. A silent wrong answer fails either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import VOCAB
from oracles import EAGER, assert_decodes
from torch import nn
from zoo import spread

import treespec_compiler as treespec

Module = type[nn.Module]


class Verdicts:
    """The decoders of one file."""

    def __init__(self) -> None:
        self.exact: dict[str, Module] = {}
        self.refusals: dict[str, tuple[Module, str]] = {}

    def converts(self, cls: Module) -> Module:
        """It is a causal decoder in disguise."""
        self.exact[cls.__name__] = cls
        return cls

    def refused(self, words: str) -> Callable[[Module], Module]:
        """It mixes tokens, or counts them, in a way that a token tree cannot keep; `words` occur in the reason."""

        def register(cls: Module) -> Module:
            self.refusals[cls.__name__] = (cls, words)
            return cls

        return register

    def tests(self) -> tuple[Callable[[str], None], Callable[[str], None]]:
        """Of all that were registered by now."""

        @pytest.mark.family
        @pytest.mark.parametrize("name", self.exact)
        def converts_exactly(name: str) -> None:
            model: Any = built(self.exact[name])
            program = treespec.tree_program(model, options=EAGER)
            assert_decodes(model, program, VOCAB, rounds=2, prompt=9)
            cache = program.new_cache(4)
            alone = program.verify(treespec.TokenTree([5], [-1]), cache)  # a tree of one node, no prefix
            assert alone.shape == (1, VOCAB)

        @pytest.mark.family
        @pytest.mark.parametrize("name", self.refusals)
        def is_refused(name: str) -> None:
            cls, words = self.refusals[name]
            with pytest.raises(treespec.Unsupported) as caught:
                treespec.tree_program(built(cls), options=EAGER)
            assert words in caught.value.reason

        return converts_exactly, is_refused


def built(cls: Module) -> nn.Module:
    torch.manual_seed(3)
    return spread(cls())
