"""A causal language model of Hugging Face's, from its folder or the hub: checked, and read by transformers.

Code that comes with a model is never run, and pickled weights are never read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InvalidOption, MissingPackage, UnreadableModel
from ..user_cache import cache_dir
from .recast import NAMES, recast

INSTALL = 'Install it: pip install "treespec[hf]".'
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load(
    folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, dir: str | os.PathLike[str] | None = None
) -> nn.Module:
    """A model whose weights stay in files; see `treespec.load`. Raises UnreadableModel, InvalidOption,
    `NoRoomForWeights`, and OSError where `dir` cannot be written.
    """
    where = folder_of(folder)
    if dtype not in NAMES:
        raise InvalidOption(name="dtype", got=dtype, expected=f"one of {', '.join(map(str, NAMES))}")
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage(package="transformers", purpose="models", fix=INSTALL) from error
    check_folder(str(folder), where)
    under = cache_dir() / "offload" if dir is None else Path(dir).expanduser()
    return read_folder(str(folder), str(where), dtype, transformers, under)


def folder_of(folder: str | os.PathLike[str]) -> Path:
    """Where a folder lies that may be named as on the command line: `hf:PATH`."""
    return Path(str(folder).removeprefix("hf:")).expanduser()


def read_folder(name: str, where: str, dtype: torch.dtype, transformers: Any, mapped: Path | None = None) -> nn.Module:
    """The model, in evaluation mode; `mapped`: as `dir` of `load`, None: weights of another dtype go to memory.

    A hub's id has no folder, and is read as transformers reads it. Raises UnreadableModel.
    """
    if mapped is not None and Path(where).is_dir():
        where = str(recast(Path(where), dtype, mapped))
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        _check_weights(name, info)
    except UnreadableModel:
        raise
    except Exception as error:
        raise refused_by_transformers(name, error) from error
    read: nn.Module = model.eval()
    return read


def place(name: str, where: str, random_weights: bool = False) -> str:
    """The folder that `where` names, checked, or a hub's id."""
    folder = Path(where).expanduser()
    if folder.exists():
        check_folder(name, folder, random_weights)
        return str(folder)
    if not HUB_ID.fullmatch(where):
        raise UnreadableModel(name=name, problem="no such folder")
    return where


def refused_by_transformers(name: str, error: Exception) -> UnreadableModel:
    if "trust_remote_code" in str(error):
        return UnreadableModel(
            name=name,
            problem="a model that comes with code of its own",
            expected="an architecture that transformers has",
            fix="Code of a model is never run: import it in a function of yours and name that, `py:module:factory`.",
        )
    problem = f"{type(error).__name__} from transformers ({first_sentence(error)})"
    return UnreadableModel(
        name=name, problem=problem, expected="a causal language model with its config.json and weights"
    )


def check_folder(name: str, folder: Path, random_weights: bool = False) -> None:
    if not folder.exists():
        raise UnreadableModel(name=name, problem="no such folder")
    if not folder.is_dir():
        raise UnreadableModel(name=name, problem="a file", fix="Name the folder it lies in.")
    config = folder / "config.json"
    if not config.is_file():
        raise UnreadableModel(name=name, problem="a folder without config.json")
    try:
        content = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableModel(name=name, problem=f"a config.json that does not parse ({error})") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UnreadableModel(name=name, problem="a config.json without model_type")
    if random_weights or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
    if pickled:
        fix = "Convert the weights: model.save_pretrained(folder) writes safetensors; pickled files are not read."
        raise UnreadableModel(name=name, problem=f"pickled weights only ({', '.join(pickled[:3])})", fix=fix)
    fix = "Add the weights, or pass --random-weights to run the configuration with random ones."
    raise UnreadableModel(name=name, problem="a folder without weights", fix=fix)


def _check_weights(name: str, info: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers; here that is an error."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(key) or ())
        if keys:
            raise UnreadableModel(
                name=name,
                problem=f"a checkpoint that {what} {len(keys)} of the model's weights ({', '.join(keys[:3])})",
                expected="every weight of the configuration",
                fix="Use the checkpoint that belongs to this config.json.",
            )


def first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".:") if lines else "") or type(error).__name__
