"""What a saved program holds for: versions, machine, options, shapes of a model, and the state that its trace read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ...capture.call import CallSpec
from ...capture.code import code_digest
from ...capture.python_state import PythonState, Undigested
from ...capture.reads import Traced
from ...capture.tensor_bytes import tensor_bytes
from ...capture.unguarded import global_hooks
from ...capture.whereabouts import Whereabouts
from ...options import Options
from ..machine import PACKAGE, around

# Code that is known by a version: torch's and Python's own, which a trace goes through on ways of its own.
_KNOWN = (str(Path(torch.__file__).parent), str(Path(os.__file__).parent), "<frozen", str(PACKAGE))


def outer_key(model: nn.Module, options: Options) -> str:
    """Of everything that can be known without knowing what a trace read. Cheap."""
    tensors = [
        [name, str(t.dtype), str(t.device), *t.shape, *t.stride()]
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ]
    about = [
        *(around(), {k: v for k, v in asdict(options).items() if k != "program_cache"}),
        *(f"{type(model).__module__}.{type(model).__qualname__}", tensors, model.training),
    ]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TraceDigest:
    """What another process needs to know of a trace to look at the same state: the code, by digests, and names."""

    digests: tuple[str, ...]
    names: tuple[str, ...]
    variables: tuple[str, ...]

    @classmethod
    def of(cls, traced: Traced) -> TraceDigest:
        """Raises Undigested where another process cannot know what was read."""
        if traced.obstacle is not None:
            raise Undigested(traced.obstacle)
        if traced.variables is None:
            raise Undigested("it may read any variable of the environment")
        return cls(*(tuple(sorted(each)) for each in (traced.digests, traced.names, traced.variables)))

    def state(self, model: nn.Module, call: CallSpec, whereabouts: Whereabouts | None = None) -> PythonState:
        """What a trace with this code reads of the model as it is. Raises Undigested."""
        return PythonState({"model": model, **self.around(call)}, self.digests, self.names, whereabouts)

    def around(self, call: CallSpec) -> dict[str, Any]:
        """What it reads besides the model."""
        return {
            "call": (call.args, call.kwargs, call.roles, call.ids, call.given),
            "hooks": global_hooks(),
            "environment": {name: os.environ.get(name) for name in self.variables},
            "torch": _settings(),
        }


def _settings() -> list[Any]:
    """Of torch, what a trace may ask for."""
    sdp = torch.backends.cuda
    return [
        *(torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()),
        *(torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.is_available()),
        *(sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled()),
    ]


def check_met(traced: Traced, state: PythonState) -> None:
    """Raises Undigested where code was traced that cannot be found again from the model."""
    for code in traced.code:
        if not code.co_filename.startswith(_KNOWN) and code_digest(code) not in state.met:
            raise Undigested(f"{_where(code)} was run, and cannot be found again from the model")


def _where(code: CodeType) -> str:
    return f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"


def values_digest(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Of the values of these tensors."""
    found = hashlib.sha256()
    for name in sorted(names):
        found.update(name.encode() + b"\0" + tensor_bytes(tensors[name]))
    return found.hexdigest()
