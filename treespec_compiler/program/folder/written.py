"""Writing a compiled folder: whole, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...capture.call import CallSpec
from ...converted import Converted
from ...errors import InvalidOption, UnsavableProgram
from ...options import Options
from ...passes.framework.weights import Weights
from ..saved.document import document
from ..saved.store import write_program
from ..saved.values import CannotSave
from ..tree_program import TreeProgram
from .expected import expectations, expected_text
from .manifest import MANIFEST, PROGRAM, WEIGHTS, Manifest, Origin, record_all, record_of
from .weights import rehoused, write_weights

KEPT_OPTIONS = ("lowering", "max_context", "prefill_chunk", "kernels", "weights")
"""Options that a folder's program keeps; the others are about the process that runs it."""
_GENERATION = ("generation_config", "config")
_CONFIG = ("eos_token_id", "pad_token_id", "bos_token_id")


@dataclass(frozen=True)
class Extras:
    """What a folder holds besides the program."""

    name: str = ""
    proof: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further files: a tokenizer's."""
    drafts: Sequence[str | Callable[[Path], None]] = ()
    """By name, or what writes a folder of its own where it is told to."""


def write_folder(
    where: Path, program: TreeProgram, model: nn.Module, call: CallSpec, converted: Converted, extras: Extras
) -> Manifest:
    """Write what `converted` became, compared with the model by `program`, to a folder that is new or was one before.

    Raises UnsavableProgram, InvalidOption where something else lies there, OSError.
    """
    if where.exists() and not (where.is_dir() and ((where / MANIFEST).is_file() or not any(where.iterdir()))):
        expected = "a new folder, an empty one, or one that was written before"
        raise InvalidOption(name="-o", got=str(where), expected=expected, fix="Name another folder.")
    where.parent.mkdir(parents=True, exist_ok=True)
    # NOTE beside its place: a folder is moved in one step within a disk
    made = Path(tempfile.mkdtemp(prefix=f".{where.name}-", dir=where.parent))
    try:
        manifest = _fill(made, program, model, call, converted, extras)
        (made / MANIFEST).write_text(manifest.text(), encoding="utf-8")
        made.chmod(0o755)
        for name in manifest.files:
            (made / name).chmod(0o644)
        if where.exists():
            shutil.rmtree(where)
        made.rename(where)
    except CannotSave as error:
        raise UnsavableProgram(got=str(error)) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return manifest


def _fill(
    folder: Path, program: TreeProgram, model: nn.Module, call: CallSpec, converted: Converted, extras: Extras
) -> Manifest:
    expressions, tensors = rehoused(converted.state.weights)
    # NOTE the lengths that the model was run at are not compared again where there is no model
    state = replace(converted.state, weights=Weights(tensors.__getitem__, expressions), lone_lengths=[])
    text, constants = document(replace(converted, state=state, sources={}, proved_from=[], history=converted.history))
    text["sources"] = list(tensors)
    about, rows = expected_text(expectations(program, model, call))
    parts = {"about": {"model": type(model).__qualname__}, "trace": {}, "program": text | {"expected": about}}
    write_program(folder / PROGRAM, parts, constants | rows)
    write_weights(folder / WEIGHTS, tensors)
    for name, content in extras.texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    drafts = [_draft(folder, i, draft) for i, draft in enumerate(extras.drafts)]
    return Manifest(
        Origin.here(),
        record_all(folder, [PROGRAM, WEIGHTS, *extras.texts]),
        _model(model, program, extras.name),
        _options(program.options),
        _generation(model),
        drafts,
        extras.proof,
    )


def _draft(folder: Path, number: int, draft: str | Callable[[Path], None]) -> dict[str, str]:
    if isinstance(draft, str):
        return {"name": draft}
    name = f"draft-{number}"
    draft(folder / name)
    return {"folder": name, "sha256": record_of(folder / name / MANIFEST).sha256}


def _model(model: nn.Module, program: TreeProgram, name: str) -> dict[str, Any]:
    found = list({id(p): p for p in model.parameters()}.values())
    return {
        "name": name,
        "type": type(model).__qualname__,
        "dtype": str(program.dtype).removeprefix("torch."),
        "device": str(program.device),
        "parameters": sum(p.numel() for p in found),
        "bytes": sum(p.numel() * p.element_size() for p in found),
    }


def _options(options: Options) -> dict[str, Any]:
    default = asdict(Options())
    return {name: value for name in KEPT_OPTIONS if (value := getattr(options, name)) != default[name]}


def _generation(model: nn.Module) -> dict[str, Any]:
    """The model's own defaults that are plain values."""
    found: dict[str, Any] = {}
    for holder in _GENERATION:
        held: Any = getattr(model, holder, None)
        values = held.to_dict() if hasattr(held, "to_dict") else vars(held) if hasattr(held, "__dict__") else {}
        names = [name for name in values if holder == "generation_config" or name in _CONFIG]
        plain = {n: values[n] for n in names if not n.startswith("_") and _is_plain(values[n])}
        found |= {holder: plain} if plain else {}
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is not None and type(value) in (bool, int, float, str)
