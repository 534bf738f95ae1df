"""Rotary angles of a head, as its configuration says (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import MissingPackage
from .checkpoint import unreadable


def frequencies(folder: Path, layer: Mapping[str, Any], head_dim: int) -> Tensor:
    """Radians a position [head_dim / 2], float32. Scaled kinds are computed by transformers. Raises UnreadableModel."""
    said = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    theta = layer.get("rope_theta", said.get("rope_theta", 10000.0))
    if kind == "default":
        return float(theta) ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    try:
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError as error:
        purpose, fix = f"a head with {kind!r} rotary angles", "Run pip install transformers."
        raise MissingPackage(package="transformers", purpose=purpose, fix=fix) from error
    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        expected = "angles that do not depend on the length: default, linear, llama3, yarn"
        raise unreadable(folder, f"rotary angles of kind {kind!r}", expected)
    config = LlamaConfig.from_dict({**layer, "head_dim": head_dim})
    found, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if scale != 1.0:
        raise unreadable(folder, f"rotary angles with attention scale {scale}", "a scale of 1")
    return found.float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [H, T, E], whose halves are the two coordinates, turned by angles [T, E / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
