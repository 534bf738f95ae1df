"""Print a completion script for your shell.

bash:  treespec completion bash > ~/.local/share/bash-completion/completions/treespec
zsh:   treespec completion zsh > ~/.zfunc/_treespec      (with fpath+=~/.zfunc before compinit)
fish:  treespec completion fish > ~/.config/fish/completions/treespec.fish
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Words:
    """What can follow a command: options, and the values of those that have a fixed set."""

    command: str
    summary: str
    options: dict[str, str]  # option -> help
    choices: dict[str, tuple[str, ...]]


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(arguments: Namespace) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell](all_words()), end="")
    return 0


def all_words() -> list[Words]:
    from .main import COMMANDS, build_parser

    found = []
    for command in COMMANDS:
        try:
            parser = build_parser(command.name)
        except ModuleNotFoundError:  # a command whose dependencies are not installed
            continue
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        actions = commands.choices[command.name]._actions
        options = {o: a.help or "" for a in actions for o in a.option_strings if o.startswith("--")}
        choices = {a.option_strings[-1]: tuple(map(str, a.choices)) for a in actions if a.choices and a.option_strings}
        found.append(Words(command.name, command.summary, options, choices))
    return found


def bash(words: list[Words]) -> str:
    cases = []
    for w in words:
        values = "".join(
            f'      {o}) COMPREPLY=($(compgen -W "{" ".join(c)}" -- "$cur")); return;;\n' for o, c in w.choices.items()
        )
        cases.append(
            f'    {w.command})\n      case "$prev" in\n{values}      esac\n'
            f'      [[ $cur == -* ]] && COMPREPLY=($(compgen -W "{" ".join(w.options)}" -- "$cur"));;\n'
        )
    names = " ".join(w.command for w in words)
    return (
        "_treespec() {\n"
        '  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n'
        "  COMPREPLY=()\n"
        "  if (( COMP_CWORD == 1 )); then\n"
        f'    COMPREPLY=($(compgen -W "{names} --help --version" -- "$cur")); return\n'
        "  fi\n"
        '  case "${COMP_WORDS[1]}" in\n' + "".join(cases) + "  esac\n}\n"
        "complete -o default -F _treespec treespec\n"
    )  # fmt: skip


def zsh(words: list[Words]) -> str:
    return "#compdef treespec\nautoload -U +X bashcompinit && bashcompinit\n" + bash(words)


def fish(words: list[Words]) -> str:
    lines = []
    for w in words:
        lines.append(f"complete -c treespec -n __fish_use_subcommand -f -a {w.command} -d {quote(w.summary)}")
        for option, text in w.options.items():
            values = f" -x -a {quote(' '.join(w.choices[option]))}" if option in w.choices else ""
            seen = f"'__fish_seen_subcommand_from {w.command}'"
            lines.append(f"complete -c treespec -n {seen} -l {option[2:]}{values} -d {quote(text)}")
    return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
