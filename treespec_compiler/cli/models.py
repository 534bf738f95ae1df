"""From a model's name on the command line to the model: `hf:`, `gguf:`, `py:`, `demo`, `smollm2`."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import demo
from ..errors import InvalidOption, UnreadableModel
from ..program.folder.manifest import MANIFEST
from .gguf import load_gguf, smollm2

Role = Literal["target", "draft"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_RANDOM = 8 << 30  # bytes
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
) -> LoadedModel:
    """The model called `name`, in evaluation mode; `random_weights` reads no weights, only `hf:` configurations.

    With `random_weights`, `hf:` takes a model type such as `llama` as well; `tiny` shrinks the configuration.
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
        return _load_hf(name, str(folder), dtype)
    if kind == "hf" and rest:
        if random_weights or tiny:
            return load_random(name, rest, dtype, tiny, seed)
        return _load_hf(name, rest, dtype)
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


def _load_hf(name: str, where: str, dtype: torch.dtype) -> LoadedModel:
    transformers = quiet_transformers(name)
    where = place(name, where)
    # NOTE: code that comes with a model is never run, and pickled weights are never read.
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
    return LoadedModel(name, model.eval(), _tokenizer(where))


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


def place(name: str, where: str, random_weights: bool = False) -> str:
    """The folder that `where` names, checked, or a hub's id."""
    folder = Path(where).expanduser()
    if folder.exists():
        _check_folder(name, folder, random_weights)
        return str(folder)
    if not HUB_ID.fullmatch(where):
        raise UnreadableModel(name=name, problem="no such folder")
    return where


def _tokenizer(where: str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception:
        return None


def refused_by_transformers(name: str, error: Exception) -> UnreadableModel:
    if "trust_remote_code" in str(error):
        return UnreadableModel(
            name=name,
            problem="a model that comes with code of its own",
            expected="an architecture that transformers has",
            fix="Code of a model is never run: import it in a function of yours and name that, `py:module:factory`.",
        )
    problem = f"{type(error).__name__} from transformers ({_first_sentence(error)})"
    return UnreadableModel(
        name=name, problem=problem, expected="a causal language model with its config.json and weights"
    )


def _check_folder(name: str, folder: Path, random_weights: bool) -> None:
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
        problem = f"{type(error).__name__} on importing {module_name} ({_first_sentence(error)})"
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix="Check the module.") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        problem = f"no function {factory_name!r} in {module_name}"
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix="Check the function's name.")
    try:
        made = factory()
    except Exception as error:
        problem = f"{type(error).__name__} from {factory_name}() ({_first_sentence(error)})"
        fix = "The factory is called without arguments; --debug shows its traceback."
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix=fix) from error
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        problem = f"{type(model).__name__} from {factory_name}()"
        raise UnreadableModel(name=name, problem=problem, expected=expected, fix="Return the model itself.")
    return LoadedModel(name, model.to(dtype).eval(), tokenizer)


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".:") if lines else "") or type(error).__name__
