"""From a model's name on the command line to the model: `hf:`, `gguf:`, `py:`, `demo`, `smollm2`."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import demo
from ..checkpoints.hf import first_sentence, place, read_folder, refused_by_transformers
from ..errors import InvalidOption, UnreadableModel
from ..program.folder.manifest import MANIFEST
from .gguf import load_gguf, smollm2

Role = Literal["target", "draft"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_RANDOM = 8 << 30  # bytes


@dataclass(frozen=True)
class LoadedModel:
    name: str
    model: Any
    """An nn.Module, or the program of a compiled folder."""
    tokenizer: Any | None = None
    """With `encode` and `decode`, as Hugging Face's; None if the name does not lead to one."""
    drafts: Sequence[Any] = ()
    """What a compiled folder guesses with, as `generate(draft=...)` takes it."""


def load(
    name: str,
    *,
    role: Role = "target",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    tiny: bool = False,
    seed: int = 0,
    mapped: Path | None = None,
) -> LoadedModel:
    """The model called `name`, in evaluation mode; `random_weights` reads no weights, only `hf:` configurations.

    With `random_weights`, `hf:` takes a model type such as `llama` as well; `tiny` shrinks the configuration. `mapped`:
    where weights of another dtype are written, so that none of them lies in memory (`checkpoints.hf.load`).
    """
    kind, _, rest = name.partition(":")
    if is_compiled(name):
        problem = "a compiled folder, which holds a program and no model"
        fix = "`treespec generate`, `serve` and `explain` take such a folder."
        raise UnreadableModel(name=name, problem=problem, expected="a model", fix=fix)
    if name == "demo" and not (random_weights or tiny):
        folder = demo.paths.target if role == "target" else demo.paths.draft
        if not (folder / "config.json").is_file():
            problem = f"no shipped {role} in this installation"
            fix = "Reinstall treespec, or name another model: `hf:PATH_OR_ID` or `py:module:factory`."
            raise UnreadableModel(name=name, problem=problem, expected="the weights of the demo pair", fix=fix)
        return _load_hf(name, str(folder), dtype, mapped)
    if kind == "hf" and rest:
        if random_weights or tiny:
            return load_random(name, rest, dtype, tiny, seed)
        return _load_hf(name, rest, dtype, mapped)
    if random_weights or tiny:
        fix = "Leave --random-weights and --tiny out, or name a Hugging Face configuration."
        raise InvalidOption(name="--random-weights", got=name, expected="a model named hf:PATH_OR_ID", fix=fix)
    if name == "smollm2" or (kind == "gguf" and rest):
        file = smollm2() if name == "smollm2" else Path(rest).expanduser()
        return LoadedModel(name, *load_gguf(name, file, dtype, quiet_transformers(name)))
    if kind == "py" and rest:
        return _load_py(name, rest, dtype)
    raise UnreadableModel(
        name=name, problem="no known kind of name", expected="`hf:...`, `gguf:...`, `py:...`, `demo` or `smollm2`"
    )


def is_compiled(name: str) -> bool:
    """Whether the name is that of a folder that `treespec compile` wrote."""
    return (Path(name).expanduser() / MANIFEST).is_file()


def _load_hf(name: str, where: str, dtype: torch.dtype, mapped: Path | None) -> LoadedModel:
    transformers = quiet_transformers(name)
    where = place(name, where)
    model = read_folder(name, where, dtype, transformers, mapped)
    return LoadedModel(name, model, _tokenizer(where))


def load_random(name: str, where: str, dtype: torch.dtype, tiny: bool, seed: int) -> LoadedModel:
    """A model of a configuration, with made-up weights; a large one stays on `meta`, which is enough to look at."""
    transformers = quiet_transformers(name)
    is_type = where in transformers.CONFIG_MAPPING and not Path(where).expanduser().exists()
    try:
        if is_type:
            config = transformers.AutoConfig.for_model(where)
        else:
            where = place(name, where, random_weights=True)
            config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        if tiny:
            from .tiny import shrink

            config = shrink(config)
        torch.manual_seed(seed)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if sum(p.numel() * p.element_size() for p in model.parameters()) <= LARGEST_RANDOM:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except UnreadableModel:
        raise
    except Exception as error:
        raise refused_by_transformers(name, error) from error
    return LoadedModel(name, model.eval(), None if is_type or tiny else _tokenizer(where))


def quiet_transformers(name: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        fix = 'Install it: pip install "treespec[hf]".'
        raise UnreadableModel(
            name=name, problem="no installed transformers", expected="the package transformers", fix=fix
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def _tokenizer(where: str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception:
        return None


def _load_py(name: str, rest: str, dtype: torch.dtype) -> LoadedModel:
    module_name, _, factory_name = rest.partition(":")
    expected = "py:module:factory, a function that returns an nn.Module or (nn.Module, tokenizer)"
    if not factory_name:
        raise UnreadableModel(name=name, problem="no factory in the name", expected=expected)
    # A console script's sys.path lacks the folder it is called from.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        problem = f"{type(error).__name__} on importing {module_name} ({first_sentence(error)})"
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix="Check the module.") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        problem = f"no function {factory_name!r} in {module_name}"
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix="Check the function's name.")
    try:
        made = factory()
    except Exception as error:
        problem = f"{type(error).__name__} from {factory_name}() ({first_sentence(error)})"
        fix = "The factory is called without arguments; --debug shows its traceback."
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix=fix) from error
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        problem = f"{type(model).__name__} from {factory_name}()"
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix="Return the model itself.")
    return LoadedModel(name, model.to(dtype).eval(), tokenizer)
