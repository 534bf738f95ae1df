"""Print a completion script for your shell.

bash:  treespec completion bash > ~/.local/share/bash-completion/completions/treespec
zsh:   treespec completion zsh > ~/.zfunc/_treespec      (with fpath+=~/.zfunc before compinit)
fish:  treespec completion fish > ~/.config/fish/completions/treespec.fish
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import shtab


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def run(arguments: Namespace) -> int:
    from .main import whole_parser

    print(shtab.complete(whole_parser(), arguments.shell))
    return 0
