"""Prompts from text, files or ids, and text from token ids."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from ..errors import InvalidPrompt
from ..runtime.text import TextStream as TextStream
from .models import LoadedModel


def read_prompt(arguments: Namespace, loaded: LoadedModel) -> Tensor:
    """Prompt ids [1, S]."""
    if arguments.prompt_ids is not None:
        return _prompt_ids(arguments.prompt_ids)
    text = arguments.prompt
    if arguments.prompt_file is not None:
        try:
            text = arguments.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{arguments.prompt_file}, which cannot be read ({error})"
            raise InvalidPrompt(got=problem, expected="a UTF-8 text file", fix="Check --prompt-file.") from error
    if loaded.tokenizer is None:
        fix = "Use --prompt-ids, or a model that comes with a tokenizer."
        raise InvalidPrompt(got=f"text for {loaded.name}, which has no tokenizer", expected="token ids", fix=fix)
    ids = loaded.tokenizer.encode(text)
    if not ids:
        raise InvalidPrompt(got="a text of no tokens", expected="at least one token", fix="Give a longer prompt.")
    return torch.tensor([ids], dtype=torch.int64)


def _prompt_ids(text: str) -> Tensor:
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        ids = []
    if not ids:
        fix = "Separate the ids with commas, without other text."
        raise InvalidPrompt(got=f"--prompt-ids {text!r}", expected="integers such as 5,17,3", fix=fix)
    return torch.tensor([ids], dtype=torch.int64)
