"""Tiny decoders with states beside K/V, and trees and forests to run them on."""

from __future__ import annotations

from functools import cache as remember
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from modules import DIM, Tiny
from oracles import EAGER
from torch import Tensor, nn

import treespec_compiler as treespec

HYBRID = ["conv", "full_attention", "conv", "full_attention"]


@remember
def lfm2() -> nn.Module:
    """LFM2 of transformers: short convolutions of width 3, attention in between."""
    return zoo.tiny_model("lfm2", num_hidden_layers=4, layer_types=HYBRID)


@remember
def lfm2_program() -> Any:
    return treespec.tree_program(lfm2(), options=EAGER)


class Convolved(Tiny):
    """Each block begins with a convolution of width 4 over the tokens; variants write it in other ways."""

    width, dilation, groups = 4, 1, DIM

    def setup(self) -> None:
        size = (DIM, DIM // self.groups, self.width)
        self.taps = nn.ParameterList(nn.Parameter(0.5 * _noise(*size, seed=i)) for i in range(self.layers))
        self.bias = nn.ParameterList(nn.Parameter(0.1 * _noise(DIM, seed=9 + i)) for i in range(self.layers))

    @property
    def reach(self) -> int:
        return self.dilation * (self.width - 1)

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        """x [1, C, T]."""
        return self.conv1d(x, layer, padding=self.reach)[..., : x.shape[2]]

    def conv1d(self, x: Tensor, layer: int, **settings: Any) -> Tensor:
        settings = {"dilation": self.dilation, "groups": self.groups, **settings}
        return F.conv1d(x, self.taps[layer], self.bias[layer], **settings)

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = x + F.silu(self.convolved(x.transpose(1, 2), layer).transpose(1, 2))
        return super().block(x, layer)


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
