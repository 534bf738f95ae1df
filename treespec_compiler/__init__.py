"""treespec: a compiler that turns a decoder into a token-tree verifier, and a runtime that speculates with it.

Names are imported when first used, so that `import treespec_compiler` costs nothing and loads no kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .versions import __version__ as __version__

if TYPE_CHECKING:
    from .capture.mixers import register_mixer
    from .errors import TreespecError, Unsupported
    from .ir.grouped_linear import grouped_linear
    from .ir.registry import register_kernel
    from .options import Options
    from .passes.framework.registry import register_pass
    from .passes.locality.custom_ops import register_op
    from .program.folder.loaded import LoadedProgram, load_program
    from .program.tree_program import TreeProgram, tree_program
    from .runtime.engine import Engine
    from .runtime.generate import BatchOutput, GenerationOutput, Step, Stream, generate, stream
    from .runtime.opening import load
    from .runtime.request import Request
    from .serving.hf import hf_generate
    from .speculation.drafts.kinds import register_draft
    from .speculation.policies.static import StaticExpansion
    from .tree import Forest, TokenTree

_HOME = {
    "BatchOutput": ".runtime.generate",
    "Engine": ".runtime.engine",
    "Forest": ".tree",
    "GenerationOutput": ".runtime.generate",
    "LoadedProgram": ".program.folder.loaded",
    "Options": ".options",
    "Request": ".runtime.request",
    "StaticExpansion": ".speculation.policies.static",
    "Step": ".runtime.generate",
    "Stream": ".runtime.generate",
    "TokenTree": ".tree",
    "TreeProgram": ".program.tree_program",
    "TreespecError": ".errors",
    "Unsupported": ".errors",
    "generate": ".runtime.generate",
    "grouped_linear": ".ir.grouped_linear",
    "hf_generate": ".serving.hf",
    "load": ".runtime.opening",
    "load_program": ".program.folder.loaded",
    "register_draft": ".speculation.drafts.kinds",
    "register_kernel": ".ir.registry",
    "register_mixer": ".capture.mixers",
    "register_op": ".passes.locality.custom_ops",
    "register_pass": ".passes.framework.registry",
    "stream": ".runtime.generate",
    "tree_program": ".program.tree_program",
}

__all__ = [
    "BatchOutput",
    "Engine",
    "Forest",
    "GenerationOutput",
    "LoadedProgram",
    "Options",
    "Request",
    "StaticExpansion",
    "Step",
    "Stream",
    "TokenTree",
    "TreeProgram",
    "TreespecError",
    "Unsupported",
    "generate",
    "grouped_linear",
    "hf_generate",
    "load",
    "load_program",
    "register_draft",
    "register_kernel",
    "register_mixer",
    "register_op",
    "register_pass",
    "stream",
    "tree_program",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
