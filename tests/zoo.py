"""The decoder types of transformers that tests run again and again: the tiny models of `treespec coverage`, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from treespec_compiler.cli.coverage.models import VOCAB as VOCAB
from treespec_compiler.cli.coverage.models import spread as spread
from treespec_compiler.cli.coverage.models import tiny_model

TYPES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "phi3", "falcon", "starcoder2")},
    **{name: {} for name in ("olmo2", "granite", "stablelm", "gemma")},
    "mistral": {"sliding_window": 4},
}
"""Each with the fields in which it is another than the type's own tiny configuration."""


def make(name: str, **changes: Any) -> nn.Module:
    """A tiny model of this type with seeded random weights, in eval mode."""
    return tiny_model(name, **{**TYPES[name], **changes})
