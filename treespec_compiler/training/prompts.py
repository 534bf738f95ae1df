"""What the target is to answer: a file of prompts, or pieces of text files to go on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidOption

WINDOW = 12
"""Characters of text read for a token that is wanted of it; tokenizers make longer ones of few texts."""


def read_prompts(file: Path, tokenizer: Any, chat: bool = True) -> list[list[int]]:
    """Prompts of a file, a line each: text, or with the suffix .jsonl a JSON string, a list of ids, or an object whose
    "prompt" is one of these.

    With `chat`, text is put as a user's message into the tokenizer's chat template, where it has one. Raises
    InvalidOption for a line that is none of that.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        got = f"{file} ({type(error).__name__})"
        raise InvalidOption(name="prompts", got=got, expected="a file of prompts, a line each") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_prompt(line, f"line {number} of {file}", file.suffix == ".jsonl", tokenizer, chat))
    return found


def _prompt(line: str, where: str, is_json: bool, tokenizer: Any, chat: bool) -> list[int]:
    said: Any = line
    if is_json:
        try:
            said = json.loads(line)
        except ValueError as error:
            raise InvalidOption(name="prompts", got=f"{where}, no JSON", expected="JSON on every line") from error
        said = said.get("prompt") if isinstance(said, dict) else said
    if isinstance(said, list) and said and all(type(token) is int for token in said):
        return said
    if not isinstance(said, str) or not said:
        expected = 'a string, a list of ids, or an object with a "prompt"'
        raise InvalidOption(name="prompts", got=where, expected=expected)
    return encoded(said, tokenizer, chat)


def encoded(text: str, tokenizer: Any, chat: bool = True) -> list[int]:
    """As the model's own chat template puts it, where there is one. Raises InvalidOption without a tokenizer."""
    if tokenizer is None:
        fix = "Give prompts as lists of ids, in a .jsonl file."
        raise InvalidOption(name="prompts", got="text, and a model without tokenizer", expected="ids", fix=fix)
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(shown, add_special_tokens=False))
    return list(tokenizer.encode(text))


def pieces(files: Sequence[Path], tokenizer: Any, count: int, tokens: int, seed: int) -> list[list[int]]:
    """`count` pieces of text files, of `tokens` ids each, that begin with a line; where, is drawn by the seed.

    Files are drawn by their length; those that are no UTF-8 and pieces that are too short are left out. Raises
    InvalidOption where no piece is left.
    """
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        except OSError as error:
            got = f"{file} ({type(error).__name__})"
            raise InvalidOption(name="text", got=got, expected="text files") from error
    draw = np.random.default_rng(seed)
    sizes = np.array([len(text) for text in texts], dtype=np.float64)
    found: dict[tuple[int, ...], None] = {}
    if sizes.sum():
        for index in draw.choice(len(texts), size=count, p=sizes / sizes.sum()):
            text = texts[index]
            start = text.rfind("\n", 0, int(draw.integers(len(text)))) + 1
            ids = encoded(text[start : start + WINDOW * tokens], tokenizer, chat=False)[:tokens]
            if len(ids) == tokens:
                found[tuple(ids)] = None
    if not found:
        expected = f"UTF-8 texts of {tokens} tokens and more"
        raise InvalidOption(name="text", got=f"{len(files)} files without any", expected=expected)
    return [list(ids) for ids in found]
