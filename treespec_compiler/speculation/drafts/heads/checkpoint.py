"""A head's folder: `config.json` and its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import InvalidOption, UnreadableModel

FIX = "Name the folder of a published head, with its config.json and model.safetensors."
PICKLED = "pytorch_model.bin"
SHIPPED = Path(__file__).parent / "shipped"
"""Heads that come with the package: one folder for each kind and target, as `parallel/smollm2`."""


def unreadable(folder: Path | str, problem: str, expected: str) -> UnreadableModel:
    return UnreadableModel(name=str(folder), problem=problem, expected=expected, fix=FIX)


def named_folder(argument: str, kind: str, usage: str) -> tuple[Path, tuple[str, int]]:
    """The folder of `draft="kind:argument"`, and what it is known by as long as its configuration is not written anew.

    The name of a head in `SHIPPED` is that one; a folder of the same name is written with a path, `./name`.
    Raises InvalidOption without an argument, UnreadableModel where there is no configuration.
    """
    if not argument:
        raise InvalidOption(name="draft", got=kind, expected=usage)
    folder = SHIPPED / kind / argument if argument in shipped(kind) else Path(argument).expanduser()
    try:
        return folder, (str(folder.resolve()), (folder / "config.json").stat().st_mtime_ns)
    except OSError as error:
        raise unreadable(folder, f"{type(error).__name__}: {error}", "a folder with config.json") from error


def shipped(kind: str) -> list[str]:
    """Names of the heads of this kind that come with the package, in order."""
    return sorted(config.parent.name for config in (SHIPPED / kind).glob("*/config.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """Raises UnreadableModel."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(folder, f"{type(error).__name__}: {error}", "a folder with config.json") from error
    if not isinstance(found, dict):
        raise unreadable(folder, f"config.json with a {type(found).__name__}", "a JSON object")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by their names, on the CPU: of `*.safetensors`, or of `pytorch_model.bin` if it holds nothing but
    tensors (it is read with `weights_only=True`, so that no code in it runs). Raises UnreadableModel.
    """
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    expected = "*.safetensors, or a pytorch_model.bin of tensors alone"
    if not files and not (folder / PICKLED).is_file():
        raise unreadable(folder, "no file of tensors", expected)
    found: dict[str, Tensor] = {}
    try:
        for file in files:
            found |= load_file(str(file))
        if not files:
            loaded = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
            if not isinstance(loaded, Mapping) or not all(isinstance(x, Tensor) for x in loaded.values()):
                raise unreadable(folder, f"{PICKLED} with other things than tensors", expected)
            found = dict(loaded)
    except UnreadableModel:
        raise
    except Exception as error:  # neither safetensors' nor pickle's exceptions have a common base
        raise unreadable(folder, f"{type(error).__name__}: {error}", expected) from error
    return found


class Tensors:
    """A head's tensors, taken one by one; what nobody takes is an error, since it would change what the head says."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self._folder, self._dtype, self.device = folder, dtype, device
        self._left = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int) -> Tensor:
        """The floating-point tensor of that name, in the head's dtype and device."""
        found = self.raw(name, *shape)
        if not found.is_floating_point():
            raise unreadable(self._folder, f"{name} of {found.dtype}", "floating-point numbers")
        return found.to(self.device, self._dtype).contiguous()

    def raw(self, name: str, *shape: int) -> Tensor:
        """As it lies in the file. Raises UnreadableModel where it is missing or has another shape."""
        if name not in self._left:
            raise unreadable(self._folder, f"no tensor {name}", f"{name} {list(shape)}")
        found = self._left.pop(name)
        if tuple(found.shape) != shape:
            raise unreadable(self._folder, f"{name} {list(found.shape)}", f"{name} {list(shape)}, by config.json")
        return found

    def perhaps(self, name: str, *shape: int) -> Tensor | None:
        return self.take(name, *shape) if name in self else None

    def finish(self) -> None:
        """Raises UnreadableModel where tensors are left."""
        if self._left:
            names = ", ".join(sorted(self._left)[:4])
            raise unreadable(self._folder, f"tensors that have no place: {names}", "those of this kind of head alone")
