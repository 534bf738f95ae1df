"""How a decoder of these tests is made."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def built(style: type[M]) -> M:
    """With weights that are large enough for every row to be another one; the same each time."""
    torch.manual_seed(0)
    model = style()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model
