"""The tokenizer of a compiled folder, by the package tokenizers alone: what serving and the command line ask of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from ..errors import InvalidFolder, MissingPackage
from ..program.folder.loaded import LoadedProgram
from ..program.folder.manifest import TOKENIZER, check_file

TEMPLATE = "tokenizer_about.json"
"""The file with the chat template and the names of special tokens."""


class FolderTokenizer:
    """As a fast tokenizer of transformers': `encode`, `decode`, `apply_chat_template`, `get_vocab`."""

    def __init__(self, text: str, about: Mapping[str, Any]) -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            fix = "Install it: pip install tokenizers."
            raise MissingPackage(package="tokenizers", purpose="text of a compiled folder", fix=fix) from error
        self._own = Tokenizer.from_str(text)
        self._own.no_padding()
        self._own.no_truncation()
        self.chat_template: str | None = about.get("chat_template")
        self._special = dict(about.get("special_tokens", {}))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._own.encode(text, add_special_tokens=add_special_tokens).ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return str(self._own.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        return dict(self._own.get_vocab(with_added_tokens=True))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **values: Any,
    ) -> str | list[int]:
        """The text of a conversation, or its ids. The template runs in Jinja's sandbox; raises what it raises."""
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        text = _template(self.chat_template).render(
            messages=list(conversation), add_generation_prompt=add_generation_prompt, **self._special, **values
        )
        return self.encode(text, add_special_tokens=False) if tokenize else str(text)


def _template(text: str) -> Any:
    """As transformers sets Jinja up: statements leave no line behind, and a template can refuse."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    surroundings = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    surroundings.filters["tojson"] = as_json
    surroundings.globals["raise_exception"] = refuse
    surroundings.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return surroundings.from_string(text)


def load_tokenizer(program: LoadedProgram) -> FolderTokenizer | None:
    """Of the folder that a program was loaded from; None: it has none. Raises InvalidFolder."""
    folder, manifest = program.folder, program.manifest
    if TOKENIZER not in manifest.files:
        return None
    try:
        about = {}
        if TEMPLATE in manifest.files:
            about = json.loads(check_file(folder, manifest, TEMPLATE).read_text(encoding="utf-8"))
        text = check_file(folder, manifest, TOKENIZER).read_text(encoding="utf-8")
        return FolderTokenizer(text, about)
    except (InvalidFolder, MissingPackage):
        raise
    except Exception as error:  # tokenizers raises Exception itself
        got = f"a tokenizer that cannot be read ({error})"
        raise InvalidFolder(folder=str(folder), got=got, expected="one as the package tokenizers writes it") from error


def tokenizer_texts(tokenizer: Any) -> dict[str, str]:
    """The files that hold a tokenizer of transformers'; none where it is not a fast one, which alone is data."""
    own = getattr(tokenizer, "backend_tokenizer", None)
    if own is None:
        return {}
    template = getattr(tokenizer, "chat_template", None)
    special = {n: str(t) for n, t in getattr(tokenizer, "special_tokens_map", {}).items() if isinstance(t, str)}
    about = {"chat_template": template if isinstance(template, str) else None, "special_tokens": special}
    found = {TOKENIZER: own.to_str(), TEMPLATE: json.dumps(about, indent=1)}
    return found if _same(tokenizer, FolderTokenizer(found[TOKENIZER], about)) else {}


_PROBES = ("Hello, world!", "def main():\n    return  1\n", "Ünïcode \u4f60\u597d \U0001f600", "")


def _same(tokenizer: Any, found: FolderTokenizer) -> bool:
    for text in _PROBES:
        ids = list(tokenizer.encode(text))
        told = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if found.encode(text) != ids or found.decode(ids, skip_special_tokens=True) != told:
            return False
    return True
