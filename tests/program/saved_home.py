"""A folder of saved programs, and models whose text lies in a file: what tests of the cache of programs start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oracles import assert_decodes
from saved_model import module_of
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.program.tree_program import TreeProgram

VOCAB = 64
LOGGER = "treespec.program"

TEXTS = {
    "a line of forward": ("x = x + self.attention(self.norm(x)) * self.config.scale", "x = x + self.attention(x)"),
    "a number in forward": ("return self.head(x)", "return self.head(x * 2.0)"),
    "a function that forward calls": ("return F.silu(x)", "return F.relu(x)"),
    "an inner function": ("return x * factor", "return x * factor + 0.5"),
    "a method": ("return 1.0\n", "return 0.5\n"),
    "a value of the class": ("depth = 1.0", "depth = 0.5"),
    "a global number": ("TEMPERATURE = 1.0", "TEMPERATURE = 2.0"),
    "a value in a closure": ("self.after = scaled(1.0)", "self.after = scaled(2.0)"),
    "another mask in a buffer": ("torch.bool).tril())", "torch.bool).tril().triu(-4))"),
    "a dictionary": ('"silu": activation', '"silu": F.tanh'),
    "an attribute": ("self.factor = 1.0", "self.factor = 0.5"),
    "its type": ("self.factor = 1.0", "self.factor = 1"),
    "a default of the configuration": ("scale=1.0", "scale=0.5"),
    "an activation of torch's": ('self.act = "silu"', 'self.act = "gelu"'),
}


class Home:
    """A folder of programs, and one that the model's text lies in."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.programs, self.text = folder / "programs", text
        self.held: list[nn.Module] = []
        """A program does not keep its model, and has nothing to be compared with when it is gone."""

    def model(self, *changes: tuple[str, str], seed: int = 0, **config: Any) -> Any:
        module = module_of(self.text, *changes)
        torch.manual_seed(seed)
        return module.Decoder(module.Config(**config)).eval()

    def program(self, model: nn.Module, **options: Any) -> TreeProgram:
        self.held.append(model)
        return treespec.tree_program(
            model, options={"lowering": "eager", "program_cache": str(self.programs)} | options
        )

    def right(self, model: nn.Module, **options: Any) -> TreeProgram:
        """The program, which says what the model says."""
        found = self.program(model, **options)
        assert_decodes(model, found, VOCAB, rounds=1)
        return found

    @property
    def files(self) -> list[Path]:
        return sorted(self.programs.glob("*.program"))
