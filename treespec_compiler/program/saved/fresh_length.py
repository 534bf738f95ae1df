"""The symbol of a saved graph's length, in a mode of fake tensors of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ...ir.private_torch import FakeTensorMode

# Any number above 1: the dimension is symbolic.
_EXAMPLE_TOKENS = 11


class _OfNoLine(ShapeEnv):
    """Sizes of a saved graph come from no line of code. Looking for one imports torch.export and its partitioners."""

    def _get_user_frame(self) -> None:
        return None


def fresh_length() -> tuple[Any, Any]:
    """The number of tokens as a symbol, and the mode that fake values with it are made in."""
    mode = FakeTensorMode(shape_env=_OfNoLine(), allow_non_fake_inputs=True)
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DUCK])  # type: ignore[var-annotated]
    tokens = mode.from_tensor(torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64), symbolic_context=sizes)
    return tokens.shape[1], mode
