"""The arguments that commands share: how models, prompts and options of the compiler are named."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any, Protocol

from ..errors import InvalidOption
from ..options import Options
from .models import DTYPES

MODEL = "hf:PATH_OR_ID, gguf:FILE, py:module:factory, demo or smollm2"


class TakesArguments(Protocol):
    """A parser, or a group of one."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any: ...


def add_model_arguments(parser: ArgumentParser, positional: bool = True) -> None:
    """The model to look into, and how it is read and compiled."""
    group = parser.add_argument_group("model")
    text = f"{MODEL}; with --random-weights also a type: hf:llama"
    group.add_argument("model" if positional else "--model", metavar="MODEL", help=text)
    add_reading(group)
    add_option(group)


def add_reading(group: TakesArguments, tiny: bool = True) -> None:
    """How models are read: their dtype, and with which weights."""
    group.add_argument(
        "--random-weights", action="store_true", help="read configurations only, make up the weights (hf:)"
    )
    if tiny:
        group.add_argument(
            "--tiny", action="store_true", help="shrink configurations: few layers, small dimensions (hf:)"
        )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the models (default: float32)")


def add_option(group: TakesArguments) -> None:
    text = "an option of the compiler; may be repeated"
    group.add_argument("--option", metavar="NAME=VALUE", action="append", default=[], help=text)


def add_json(group: TakesArguments, more: str = "") -> None:
    group.add_argument("--json", action="store_true", help=f"print one JSON object{more}")


def add_prompt_arguments(parser: ArgumentParser) -> None:
    """A prompt as text, from a file or as ids; exactly one of them."""
    group = parser.add_argument_group("prompt (one of)").add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="the text to complete")
    group.add_argument("--prompt-file", metavar="F", type=Path, help="a UTF-8 file with the text")
    group.add_argument("--prompt-ids", metavar="IDS", help="token ids such as 5,17,3, for models without a tokenizer")


def positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return number


def parse_options(pairs: list[str]) -> Options:
    """`["lowering=eager", "prefill_chunk=64"]` as Options."""
    return Options.parse(named_options(pairs))


def named_options(pairs: list[str]) -> dict[str, Any]:
    """The same by name, those that were given alone."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            fix = "Write the name, an equals sign and the value, without spaces."
            raise InvalidOption(name="--option", got=pair, expected="NAME=VALUE, such as lowering=eager", fix=fix)
        words = {"None": None, "True": True, "False": False}
        options[name] = int(value) if value.isdecimal() else words.get(value, value)
    return options
