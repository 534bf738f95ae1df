"""Models as commands that run them take them: by name, or as a folder that `treespec compile` wrote."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..offload_options import Offload
from ..program.folder.loaded import LoadedProgram, load_program
from ..runtime.folder_tokenizer import load_tokenizer
from ..speculation.drafts.kinds import is_named
from .arguments import mapped_under, named_options, refuse_offload
from .models import DTYPES, LoadedModel, is_compiled, load


def load_compiled(name: str, options: Mapping[str, Any]) -> LoadedModel:
    """The program of such a folder, its tokenizer and drafts; nothing of transformers is imported.

    Raises InvalidFolder, InvalidOption.
    """
    program: LoadedProgram = load_program(Path(name).expanduser(), options)
    return LoadedModel(name, program, load_tokenizer(program), tuple(program.draft))


def read_models(arguments: Namespace, name: str) -> tuple[LoadedModel, list[LoadedModel]]:
    """The model of this name, or the compiled folder, and what it is to guess with: `--draft none` is nothing."""
    reading: dict[str, Any] = {"dtype": DTYPES[arguments.dtype], "random_weights": arguments.random_weights}
    if is_compiled(name):
        refuse_offload(arguments)
        target = load_compiled(name, named_options(arguments.option))
    else:
        mapped = Offload().path if getattr(arguments, "mesh", None) is not None else mapped_under(arguments)
        target = load(name, mapped=mapped, **reading)  # a rank of a mesh reads its slices alone, of a mapped file
    wanted: list[str] = [draft for draft in arguments.draft if draft != "none"]
    drafts = [LoadedModel(n, n) if is_named(n) else load(n, role="draft", **reading) for n in wanted]
    return target, drafts if arguments.draft else [LoadedModel(f"{name} draft", draft) for draft in target.drafts]
