"""A decoder with one of everything that a saved program may depend on; its text lies in a file of a test's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TEXT = """
import math
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

TEMPERATURE = 1.0


def activation(x):
    return F.silu(x)


def scaled(factor):
    def scale(x):
        return x * factor
    return scale


class Config:
    eps = 1e-5
    def __init__(self, width=32, heads=4, layers=2, vocab=64, scale=1.0):
        self.width, self.heads, self.layers, self.vocab, self.scale = width, heads, layers, vocab, scale
        self.names = {"gelu": nn.GELU(), "silu": activation}
        self.act = "silu"


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.register_buffer("mask", torch.ones(128, 128, dtype=torch.bool).tril())

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:t, :t])
        return self.out(y.transpose(1, 2).reshape(b, t, w))


class Layer(nn.Module):
    depth = 1.0

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.up, self.down = nn.Linear(config.width, 64), nn.Linear(64, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.config = config
        self.after = scaled(1.0)

    def gain(self):
        return 1.0

    def forward(self, x):
        x = x + self.attention(self.norm(x)) * self.config.scale
        y = self.config.names[self.config.act](self.up(self.norm(x)))
        return x + self.after(self.down(y)) * self.depth * self.gain()


class Decoder(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or Config()
        self.embed = nn.Embedding(config.vocab, config.width)
        self.places = nn.Embedding(128, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocab)
        self.factor = 1.0

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x) / TEMPERATURE * self.factor
"""


def module_of(folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """The text as a module of its own, with these parts replaced; it always lies in the same file of the folder."""
    text = TEXT
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path = folder / "saved_model_text.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("saved_model_text", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["saved_model_text"] = module
    exec(compile(text, str(path), "exec"), vars(module))  # no bytecode of an earlier text
    return module
