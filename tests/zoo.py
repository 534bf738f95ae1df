"""Tiny models of real architectures with seeded random weights, spread widely so that errors show."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from treespec_compiler.cli.coverage.models import spread as spread

VOCAB = 97
CONTEXT = 256

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "qwen2": _BASE,
    "qwen3": {**_BASE, "head_dim": 8},
    "gpt2": {**_ENDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "opt": {
        **{k: v for k, v in _BASE.items() if k not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    },
    "gpt_neox": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "phi3": _BASE,
    "falcon": {**_ENDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    "starcoder2": _BASE,
    "olmo2": _BASE,
    "granite": _BASE,
    "stablelm": _BASE,
    "mistral": {**_BASE, "sliding_window": 4},
    "gemma": {**_BASE, "head_dim": 8},
}


def make(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of this architecture, in eval mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(name, **{**CONFIGS[name], **changes})
    torch.manual_seed(seed)
    return spread(transformers.AutoModelForCausalLM.from_config(config).eval())
