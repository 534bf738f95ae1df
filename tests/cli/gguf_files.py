"""Writes GGUF files of tiny Llamas, as llama.cpp's converter does (its order of rotated rows included)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from superblock_cases import KINDS, raw_blocks

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head, from halves (Hugging Face) to pairs (GGUF)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(file: Path, model: Any, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
    """Matrices in `kind`, everything else in float32. Blocks of 256, which gguf does not make, are drawn."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [bytes([33 + i]).decode() if i < 90 else f"<t{i}>" for i in range(config.vocab_size)]
    tokens[90] = "!!"
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if "q_proj" in key:
            values = rotated(values, config.num_attention_heads)
        if "k_proj" in key:
            values = rotated(values, config.num_key_value_heads)
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        form = next((form for form, known in KINDS.items() if known is kind), None)
        if values.ndim == 2 and form is not None:
            blocks = raw_blocks(form, *values.shape, seed=len(key))
            writer.add_tensor(key, blocks.reshape(len(values), -1), raw_dtype=kind)
        elif values.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
