"""Compile a model ahead of time, into a folder that runs without the model's code and without transformers."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.markup import escape

from ..capture.call import call_spec
from ..errors import InvalidOption, Unsupported
from ..inspection.explain import describe
from ..options import Options, WeightStorage
from ..passes.framework.instruments import Recorder
from ..pipeline import convert
from ..program.folder.manifest import WEIGHTS, Manifest
from ..program.folder.written import Extras, write_folder
from ..program.memory import peak_bytes
from ..program.net import Comparison
from ..program.tree_program import TreeProgram
from ..runtime.folder_tokenizer import tokenizer_texts
from ..speculation.drafts.kinds import is_named
from .arguments import MODEL, add_json, add_option, add_reading, parse_options
from .explain import show_refusal
from .inspection import REFUSED, console, quiet_torch
from .models import DTYPES, LoadedModel, load
from .waiting import waiting

EPILOG = """\
examples:
  treespec compile hf:PATH -o folder
  treespec compile smollm2 -o folder --draft ngram
  treespec generate folder --prompt "def main():"
  treespec serve folder

exit codes: 0 written, 1 refused, 2 error
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    models = parser.add_argument_group(f"models ({MODEL})")
    models.add_argument("model", metavar="MODEL", help="the model to compile")
    models.add_argument(
        "--draft", metavar="DRAFT", action="append", default=[], help="what guesses: a model, which is compiled into "
        "the folder as well, or a name such as ngram or early-exit:4; may be repeated"
    )  # fmt: skip
    add_reading(models, tiny=True)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--weights", choices=get_args(WeightStorage), help="how weights are stored on a CPU (default: exact); int8 and "
        "int4 round them"
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where it is compiled for (default: cpu)")
    add_option(parser)
    add_json(parser)


@dataclass(frozen=True)
class Written:
    """What became of a model."""

    manifest: Manifest
    comparison: Comparison
    seconds: float


def run(arguments: Namespace) -> int:
    options = parse_options(arguments.option)
    options = options if arguments.weights is None else replace(options, weights=arguments.weights)
    options = replace(options, program_cache=False)
    _check_drafts(arguments.draft)
    quiet_torch()
    messages = Console(stderr=True)
    with messages.status("reading models"):
        target = _read(arguments, arguments.model, "target")
        drafts = [name if is_named(name) else _read(arguments, name, "draft") for name in arguments.draft]
    try:
        with waiting(messages, target.name):
            written = compile_model(target, arguments.output, options, drafts)
    except Unsupported as error:
        show_refusal(console(), target.name, type(target.model).__name__, error)
        return REFUSED
    _tell(arguments, target, written)
    return 0


def compile_model(target: LoadedModel, where: Path, options: Options, drafts: list[str | LoadedModel]) -> Written:
    """Convert, compare with the model, and write the folder. Raises Unsupported, UnsavableProgram, InvalidOption."""
    began, recorder, model = time.perf_counter(), Recorder(), target.model
    call = call_spec(model)
    converted = convert(model, call, options, instruments=[recorder])
    program = TreeProgram(model, call, options, converted)
    program.check()
    comparison = program.comparison or Comparison()
    proof = describe(converted, recorder.graphs, comparison).as_json()

    def inner(draft: LoadedModel) -> Callable[[Path], None]:
        return lambda folder: _discard(compile_model(draft, folder, options, []))

    extras = Extras(
        target.name,
        proof,
        tokenizer_texts(target.tokenizer) if target.tokenizer is not None else {},
        [draft if isinstance(draft, str) else inner(draft) for draft in drafts],
    )
    manifest = write_folder(where, program, model, call, converted, extras)
    return Written(manifest, comparison, time.perf_counter() - began)


def _discard(_: Written) -> None:
    pass


def _read(arguments: Namespace, name: str, role: Any) -> LoadedModel:
    dtype, random_weights = DTYPES[arguments.dtype], arguments.random_weights
    found = load(name, role=role, dtype=dtype, random_weights=random_weights, tiny=arguments.tiny)
    return replace(found, model=found.model.to(torch.device(arguments.device)))


def _check_drafts(drafts: list[str]) -> None:
    for name in drafts:
        kind, _, file = name.partition(":")
        if is_named(name) and file and not file.isdecimal():
            fix = f"Give it to `treespec generate`: --draft {kind}:FILE."
            raise InvalidOption(name="--draft", got=name, expected="a model, or a name without a file", fix=fix)


def _tell(arguments: Namespace, target: LoadedModel, written: Written) -> None:
    manifest = written.manifest
    about: dict[str, Any] = {
        "folder": str(arguments.output),
        "model": dict(manifest.model),
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "drafts": [one.get("name") or one["folder"] for one in manifest.drafts],
        "tokenizer": "tokenizer.json" in manifest.files,
        "seconds": written.seconds,
        "peak_bytes": peak_bytes(),
    }
    if arguments.json:
        print(json.dumps(about, indent=2))
        return
    out = console()
    out.print(f"[bold green]compiled[/]  {escape(target.name)} to {escape(str(arguments.output))}")
    for name, record in manifest.files.items():
        out.print(f"  {name}: {record.bytes / 1e6:,.1f} MB")
    for draft in about["drafts"]:
        out.print(f"  draft: {escape(draft)}")
    if not about["tokenizer"]:
        out.print("  no tokenizer: prompts are token ids")
    out.print(f"  compared with the model: {written.comparison}", soft_wrap=True)
    held = (manifest.model["bytes"] + manifest.files[WEIGHTS].bytes) / 1e6
    out.print(
        f"memory: {peak_bytes() / 1e6:,.0f} MB at most, of which the model and its packed form take {held:,.0f}",
        style="dim",
    )
