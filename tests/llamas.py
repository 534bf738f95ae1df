"""Tiny Llamas of Hugging Face with random weights, for tests of generation."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

EAGER = {"lowering": "eager"}
PROMPT = [5, 17, 3, 99, 42, 7]


def llama(seed: int, *, vocab: int = 128, hidden: int = 64, layers: int = 2, context: int = 256):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()
