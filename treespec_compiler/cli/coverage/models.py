"""Tiny random decoders of every type that transformers knows: the zoo behind `treespec coverage`.

A configuration is shrunk by name: each integer that sets a size gets a small value, lists with one entry a layer keep
one layer of each kind, and what a type needs beyond that is data in `OVERRIDES`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

VOCAB = 96

# What the survey of transformers 5.23 found each type to need; see docs/coverage.md.
CLASSES = {
    "A": """apertus arcee biogpt bitnet cohere diffllama emu3 ernie4_5 falcon fuyu gemma glm glm4 got_ocr2 gpt-sw3 gpt2
        gpt_bigcode gpt_neox granite helium hrm_text hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama
        minicpm3 ministral3 mllama moshi moss_transcribe_diarize nanochat nemotron olmo olmo2 opt persimmon phi phi3
        phi4_multimodal qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 youtu""",
    "B": "codegen git gpt_neox_japanese gptj openai-gpt xglm",
    "C": """aria_text axk1 deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe glm4_moe_lite granitemoe
        granitemoeshared hunyuan_v1_moe hy_v3 jetmoe laguna mellum minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe
        solar_open""",
    "D": """afmoe beam bloom cohere2 cohere2_moe cohere_compass_text cwm doge exaone4 exaone_moe flint gemma2 gemma3
        gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text gpt_neo gpt_oss granite_swa
        granitemoe_swa kolibri1 llama4 llama4_text mimo_v2_flash ministral mistral modernbert-decoder mpt olmo3
        vaultgemma""",
    "E": """qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen3_next kimi_linear olmo_hybrid bailing_hybrid bamba
        falcon_h1 granitemoehybrid jamba mamba mamba2 nemotron_h zamba zamba2 falcon_mamba lfm2 lfm2_moe lfm3 zaya
        inkling_text inkling2_text recurrent_gemma deepseek_v32 glm_moe_dsa axk2 hy_v4 dots3_note_text dots3_note
        minimax_m3_vl_text deepseek_v4 minimax rwkv xlstm blt""",
    "F": "ctrl dbrx longcat_flash qwen4_exp qwen4_exp_text",
}
CLASS_OF = {name: label for label, names in CLASSES.items() for name in names.split()}
CLASS_TEXT = {
    "A": "plain attention",
    "B": "eager attention",
    "C": "mixture of experts",
    "D": "mask or score variation",
    "E": "other token mixer",
    "F": "no full graph",
    "N": "not a decoder alone",
}

# Sizes by field name. Fields that a configuration leaves at None stay None.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_dim", "lru_width", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("attention_hidden_size", "backbone_hidden_size", "hidden_size_global"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "dim_head"), 16
    ),
    **dict.fromkeys(("qk_head_dim",), 24),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "gated_norm_rank", "laurel_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("dff", "dim_ff", "dense_intermediate_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers"), 2),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 128),
    **dict.fromkeys(("context_length", "keep_window_size"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "audio_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size_per_layer_input", "router_hidden_size", "index_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "linear_num_value_heads", "mamba_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "index_topk"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("num_kv_shared_layers", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers", "depth", "num_global_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "mlp_dim", "feed_forward_size"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 128),
}
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size")
_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "eod_token_id": 2,
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

# What the rules above do not know: fields (a nested dictionary is a sub-configuration) by type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "blt": {"encoder_hash_byte_group_vocab": 96, "patcher_config": {"num_hidden_layers": 1}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "lfm2": {"num_hidden_layers": 2, "full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
    },
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4, "zero_expert_num": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its cache takes widths up to whole 64s, its layers do not
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
}


# Types whose first run in evaluation changes their weights.
RUN_ONCE = ("rwkv",)


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **fields}}


_MIXED = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
_LONGROPE = {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2 + i / 10 for i in range(8)]}

# Variants that only a type's own switch shows: name -> fields.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {
        "new architecture": {"new_decoder_architecture": True},
        "alibi": {"alibi": True},
        "alibi, a key head for each query head": {"alibi": True, "multi_query": False, "num_kv_heads": 4},
        "alibi, new architecture": {"alibi": True, "new_decoder_architecture": True},
    },
    "qwen2": {f"window {w}": {**_MIXED, "sliding_window": w} for w in (4, 24)},
    "phi3": {f"window {w}": {"sliding_window": w} for w in (4, 24)}
    | {
        "longrope": {
            "original_max_position_embeddings": 64,
            **_rope("longrope", **_LONGROPE, original_max_position_embeddings=64),
        }
    },
    "llama": {
        "yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=32),
        "llama3": _rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
        "linear rope": _rope("linear", factor=2.0),
    },
    "gpt2": {
        "upcast and layer scaling": {
            "reorder_and_upcast_attn": True,
            "scale_attn_by_inverse_layer_idx": True,
            "attn_implementation": "eager",
        },
        "layer scaling": {"scale_attn_by_inverse_layer_idx": True},
    },
    "gpt_bigcode": {"a key head for each query head": {"multi_query": False}},
    "opt": {"norm after": {"do_layer_norm_before": False}},
    "glm_moe_dsa": {"a choice that two layers share": {"indexer_types": ["full", "shared"]}},
    "bloom": {"norm after": {"apply_residual_connection_post_layernorm": True}},
}


def model_types() -> list[str]:
    """Every causal language model type of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, window: int | None = None, **fields: Any) -> Any:
    """A configuration of a few small layers; `window` is the length of every window it has."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    return cls(**merge(shrunk(cls(), window), merge(OVERRIDES.get(model_type, {}), fields)))


def has_window(config: Any) -> bool:
    """Whether any field of the configuration is a window that is on."""
    from transformers import PretrainedConfig

    for name, value in vars(config).items():
        if name in _WINDOWS and isinstance(value, int) and vars(config).get("use_sliding_window", True):
            return True
        if isinstance(value, PretrainedConfig) and name != "vision_config" and has_window(value):
            return True
    return False


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, dictionaries field by field."""
    both = dict(base)
    for key, value in extra.items():
        nested = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merge(both[key], value) if nested else value
    return both


def shrunk(config: Any, window: int | None = None) -> dict[str, Any]:
    """Arguments that make a small configuration of the same class."""
    from transformers import PretrainedConfig

    known = inspect.signature(type(config).__init__).parameters
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            fields[name] = {**shrunk(value, window), "model_type": value.model_type}
        elif name not in known or value is None or isinstance(value, bool):
            continue
        elif name in _SIZES:
            fields[name] = _SIZES[name]
        elif name in _TOKENS:
            fields[name] = _TOKENS[name]
        elif name in _WINDOWS and window is not None:
            fields[name] = window
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            fields[name] = VOCAB - 1
    if "qk_rope_head_dim" in fields:  # latent attention: no sharing of heads, and head_dim is the rotated part
        fields |= {n: v for n, v in (("head_dim", 8), ("num_key_value_heads", 4)) if n in fields}
    return fields | _layers(config, fields)


def _layers(config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, where lists with an entry a layer say what a layer is."""
    count = next((getattr(config, n) for n in _LAYERS if isinstance(getattr(config, n, None), int)), 0)
    per_layer = {
        n: v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == count and count > 1
    }
    kinds: dict[Any, int] = {}
    for i in range(count):
        kinds.setdefault(tuple(str(v[i]) for v in per_layer.values()), i)
    chosen = list(kinds.values())[:4] if per_layer else []
    if not chosen:
        return {}
    chosen = chosen if len(chosen) > 1 else [chosen[0]] * 2
    known = inspect.signature(type(config).__init__).parameters
    found: dict[str, Any] = {n: [v[i] for i in chosen] for n, v in per_layer.items() if n in known}
    return found | {n: len(chosen) for n in _LAYERS if n in fields}


def tiny_model(model_type: str, window: int | None = None, experts: str | None = None, **fields: Any) -> nn.Module:
    """A small model with random weights, large enough that logits differ from token to token; in evaluation mode.

    `experts`: how its mixtures of experts are computed ("grouped_mm", "batched_mm"), where the type has a choice.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, window, **fields)).eval()
    if experts is not None and model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    model = spread(model)
    if model_type in RUN_ONCE:
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))
    return model


def spread(model: nn.Module) -> nn.Module:
    """Larger random weights: with the usual tiny ones every prediction is nearly the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
