"""A small target and draft that ship with the package, so that every example runs offline.

The target writes Python; the draft costs less than a twentieth of it. See README.md beside this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Paths:
    root: Path

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def draft(self) -> Path:
        return self.root / "draft"

    @property
    def early_exit(self) -> Path:
        return self.root / "early_exit.safetensors"

    @property
    def heldout(self) -> Path:
        return self.root / "heldout.json"


paths = Paths(Path(__file__).parent)


@dataclass(frozen=True)
class HeldoutPrompt:
    """A piece of a standard-library module that neither model was trained on."""

    module: str
    line: int  # where `text` starts in the module's file, from 1
    text: str


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('the demo models need transformers: pip install "treespec[demo]"') from error
    return transformers


def load_target(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The 11.5M-parameter target, in eval mode."""
    return _transformers().AutoModelForCausalLM.from_pretrained(paths.target, dtype=dtype).eval()


def load_draft(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The 0.5M-parameter draft, in eval mode; same tokenizer as the target."""
    return _transformers().AutoModelForCausalLM.from_pretrained(paths.draft, dtype=dtype).eval()


def load_tokenizer() -> PreTrainedTokenizerFast:
    return _transformers().AutoTokenizer.from_pretrained(paths.target)


def heldout_prompts() -> list[HeldoutPrompt]:
    items = json.loads(paths.heldout.read_text(encoding="utf-8"))
    return [HeldoutPrompt(item["module"], item["line"], item["text"]) for item in items]
