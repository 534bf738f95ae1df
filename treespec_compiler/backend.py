"""`torch.compile(model, backend="treespec")`: plain calls run through Inductor and are never analysed.

Capture and refusal happen in `tree_program`, which reads the original module; so a compiled module stays the same
function of the same inputs, for every batch size, mask and keyword, in training as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .options import Options


def treespec_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None
) -> Callable[..., Any]:
    """Entry point of group `torch_dynamo_backends`. `options` are those of `tree_program`, checked here already."""
    parsed = Options.parse(options)
    if parsed.lowering == "eager":
        return gm.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode not in (None, "default") else None
    return compile_fx(gm, list(example_inputs), config_patches=patches)
