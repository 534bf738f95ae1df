"""A compiled folder as a program: no model, no code of its own, weights mapped from the file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...capture.call import CallSpec
from ...capture.weight_ref import WeightRef
from ...errors import InvalidFolder, InvalidOption, TreespecError
from ...logs import logger
from ...options import Options
from ..memory import Memory
from ..saved.document import converted_of
from ..saved.store import read_program
from ..saved.values import CannotLoad
from ..tree_program import TreeProgram
from .expected import Expected, expected_of
from .manifest import MANIFEST, PROGRAM, WEIGHTS, Manifest, Origin, check_file, file_of, read_manifest, record_of
from .weights import mapped
from .written import KEPT_OPTIONS

log = logger(__name__)


class FolderWeights(nn.Module):
    """The tensors of a folder, in the place of the model that it was compiled from."""

    generation_config: Any
    config: Any

    def __init__(self, tensors: Mapping[str, Tensor], generation: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors.values()):
            self.register_buffer(f"tensor_{number}", tensor)
        for holder in ("generation_config", "config"):
            setattr(self, holder, SimpleNamespace(**generation.get(holder, {})))
        self.names = list(tensors)
        self.eval()

    def sources(self) -> dict[str, WeightRef]:
        """By the names that graphs know them by."""
        table: dict[str, Any] = self._buffers
        keys = {name: f"tensor_{number}" for number, name in enumerate(self.names)}
        return {name: WeightRef(name, table[key], table, key) for name, key in keys.items()}


class LoadedProgram(TreeProgram):
    """The tree verifier of a compiled folder. Made by `load_program`.

    Nothing of it changes: weights lie in memory as the file has them, once for all processes that read it.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: Options, check_hashes: bool) -> None:
        self.folder, self.manifest = folder, manifest
        check = check_file if check_hashes else file_of
        path = check(folder, manifest, WEIGHTS)
        device = torch.device(manifest.model["device"])
        tensors = {name: t.to(device) for name, t in mapped(path).items()}
        parts, held = read_program(check(folder, manifest, PROGRAM))
        self._module = FolderWeights(tensors, manifest.generation)  # which the program itself holds weakly
        sources, broken = self._module.sources(), functools.partial(_no_program, folder)
        converted = converted_of(parts["program"], held, sources, digest=parts["checksum"], deferred=broken)
        self._expected: list[Expected] | None = expected_of(parts["program"]["expected"], held, device)
        super().__init__(self._module, CallSpec((), {}, {}), options, replace(converted, compared=True))

    @property
    def draft(self) -> list[Any]:
        """What it was compiled with, as `generate(draft=...)` takes it: names, and programs of folders inside."""
        return [*self._drafts()]

    def _drafts(self) -> list[Any]:
        found: list[Any] = []
        for one in self.manifest.drafts:
            if "name" in one:
                found.append(one["name"])
                continue
            inner = self.folder / one["folder"]
            if not (inner / MANIFEST).is_file() or record_of(inner / MANIFEST).sha256 != one["sha256"]:
                got = f"another {MANIFEST} in {one['folder']} than its own"
                raise InvalidFolder(folder=str(self.folder), got=got, expected="the folder that was written with it")
            found.append(load_program(inner))
        return found

    def check(self) -> None:
        """Compare it with the rows that the model gave where the folder was written, once, before its first use.

        Raises InvalidFolder where it gives others on both of two prompts: routing may flip on one, where two experts
        are as good.
        """
        expected = self._expected
        if expected is None or self.options.verify == "off":
            return
        self._expected = None
        wrong = []
        for one in expected:
            difference = one.difference(self)
            if difference is None:
                self._executor.keep_code(self._executor.digest)
                self._memory = Memory.of(self._module, self.packed_bytes)
                return
            wrong.append(difference)
        self._expected = expected
        got = f"logits that differ by {max(wrong):.2e} of the largest from those of the model it was compiled from"
        fix = 'Write it again on this machine; options={"lowering": "eager"} tells whether its lowering is at fault.'
        raise InvalidFolder(folder=str(self.folder), got=got, expected="the model's own", fix=fix)


def load_program(
    folder: Path | str, options: Mapping[str, Any] | Options | None = None, *, check_hashes: bool = True
) -> LoadedProgram:
    """The program of a folder that `treespec compile` wrote, as `tree_program` gives one of a model.

    `options`: "lowering", "prefill_chunk", "verify" and "cuda_graphs"; what else it was compiled with stays. Every byte
    is compared with the manifest's hashes, unless `check_hashes` is False. Raises InvalidFolder, InvalidOption.
    """
    where = Path(folder)
    manifest = read_manifest(where)
    asked = _options(where, manifest, options)
    differences = Origin.here().differences(manifest.origin)
    if differences:
        log.warning("%s was made elsewhere (%s): its graph is lowered here", where, "; ".join(differences))
    try:
        return LoadedProgram(where, manifest, asked, check_hashes)
    except InvalidFolder:
        raise
    except (CannotLoad, TreespecError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _no_program(where, error) from error
    except Exception as error:  # safetensors has exceptions of its own, without a common base
        if not type(error).__module__.startswith("safetensors"):
            raise
        raise InvalidFolder(folder=str(where), got=f"a damaged file ({error})", expected="whole files") from error


def _no_program(folder: Path, error: Exception) -> InvalidFolder:
    got = f"files that hold no program ({type(error).__name__}: {error})"
    return InvalidFolder(folder=str(folder), got=got, expected="a graph and its weights")


def _options(folder: Path, manifest: Manifest, asked: Mapping[str, Any] | Options | None) -> Options:
    given = asked if isinstance(asked, Mapping) else {}
    fixed = [name for name in given if name in KEPT_OPTIONS and name not in ("lowering", "prefill_chunk")]
    if fixed:
        name = fixed[0]
        expected = f"what it was compiled with, {manifest.options.get(name, getattr(Options(), name))!r}"
        raise InvalidOption(name=name, got=given[name], expected=expected, fix="Compile the model again.")
    if (given.get("offload") if isinstance(asked, Mapping) else asked and asked.offload) is not None:
        fix = "Its weights are mapped: leave the option out, or stream the model that it was compiled from."
        raise InvalidOption(name="offload", got="a compiled folder", expected="a model", fix=fix)
    try:
        own = Options(**manifest.options)
    except (TypeError, InvalidOption) as error:
        got = f"options that there are not ({error})"
        raise InvalidFolder(folder=str(folder), got=got, expected="those of the compiler") from error
    if isinstance(asked, Options):
        changes = {n: getattr(asked, n) for n in ("lowering", "prefill_chunk", "verify", "cuda_graphs")}
        return replace(own, **changes)
    return Options.parse(asdict(own) | dict(given))
