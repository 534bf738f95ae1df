"""What the commands that look into the compiler share: the model they read, and where output goes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..capture.call import CallSpec, call_spec
from ..codegen.gpu import triton_installed
from ..errors import InvalidOption, MissingPackage
from ..options import Options
from .arguments import parse_options
from .models import DTYPES, LoadedModel, load

CONVERTED, REFUSED = 0, 1  # exit codes; 2 is an error

EXIT_CODES = "exit codes: 0 converted, 1 refused, 2 error"

UNLIMITED = 10_000
"""Columns of an output that is no terminal."""


@dataclass(frozen=True)
class Subject:
    """The model under inspection and how it is compiled."""

    loaded: LoadedModel
    call: CallSpec
    options: Options

    @property
    def name(self) -> str:
        return self.loaded.name


def read_subject(arguments: Namespace, mapped: Path | None = None, **options: Any) -> Subject:
    """Load the model, `mapped` as `models.load` takes it; keyword arguments lay over `--option`."""
    parsed = replace(parse_options(arguments.option), **{k: v for k, v in options.items() if v is not None})
    quiet_torch()
    with Console(stderr=True).status("reading the model"):
        loaded = load(
            arguments.model,
            dtype=DTYPES[arguments.dtype],
            random_weights=arguments.random_weights,
            tiny=arguments.tiny,
            mapped=mapped,
        )
    return Subject(loaded, call_spec(loaded.model), parsed)


def quiet_torch() -> None:
    """A refusal is this command's result; torch's own report of it would say the same at ten times the length."""
    for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._dynamo\.")


def console() -> Console:
    """Standard output: as wide as the terminal or COLUMNS; where neither is, of any width and without colour."""
    out = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    if not out.is_terminal and not os.environ.get("COLUMNS"):
        out.width = UNLIMITED
    return out


def need_triton(purpose: str, fix: str) -> None:
    """Raises where triton is missing, and where it would interpret kernels instead of compiling them."""
    if not triton_installed():
        raise MissingPackage(package="triton", purpose=purpose, fix=fix)
    import triton

    from ..codegen.gpu.kernels.commit import commit_kernel

    # NOTE what triton read when it was imported, however its own rules spell "yes"
    if not isinstance(commit_kernel, triton.JITFunction):
        raise InvalidOption(
            name="TRITON_INTERPRET",
            got=os.environ.get("TRITON_INTERPRET"),
            expected="no such variable: interpreted kernels cannot be compiled",
            fix="Unset it.",
        )


def parameter_count(loaded: LoadedModel) -> str:
    count = sum(p.numel() for p in loaded.model.parameters())
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
