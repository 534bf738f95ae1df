"""The arguments that commands share: how models, prompts and options of the compiler are named."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import InvalidOption
from ..offload_options import Offload
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


def add_offload(group: TakesArguments) -> None:
    """Where weights come from that do not stay in memory (docs/offload.md)."""
    text = "stream the weights that do not fit into memory from files"
    group.add_argument("--offload", choices=["disk"], help=text)
    text = "10^9 bytes of weights that may stay in the device's memory (default: half of what is free)"
    group.add_argument("--resident-gb", metavar="GB", type=float, help=text)
    group.add_argument("--ram-gb", metavar="GB", type=float, help="as --resident-gb, of the machine's memory")
    text = "where the files are written and found again (default: the user's cache directory)"
    group.add_argument("--offload-dir", metavar="DIR", help=text)


def with_offload(options: Options, arguments: Namespace) -> Options:
    """Options with what the arguments of `add_offload` say."""
    fields = {"resident_gb": arguments.resident_gb, "ram_gb": arguments.ram_gb, "dir": arguments.offload_dir}
    said = {name: value for name, value in fields.items() if value is not None}
    if arguments.offload is None:
        if said:
            fix = "Add --offload disk."
            raise InvalidOption(name="--offload", got=f"{next(iter(said))} alone", expected="--offload", fix=fix)
        return options
    return replace(options, offload=Offload(arguments.offload, **said))


def mapped_under(arguments: Namespace) -> Path | None:
    """Where a streamed model's weights are written that have another dtype (`checkpoints.hf.load`); None: none is."""
    return None if arguments.offload is None else Offload(arguments.offload, dir=arguments.offload_dir).path


def refuse_offload(arguments: Namespace) -> None:
    """Where the model is a folder that `treespec compile` wrote."""
    if arguments.offload is not None:
        got, fix = f"{arguments.offload} with a compiled folder", "Name the model that it was compiled from."
        raise InvalidOption(name="--offload", got=got, expected="a model", fix=fix)


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
