"""EAGLE-3 heads with random weights, written as they are published, and a plain reference of what they compute."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 24, 4, 2, 8, 40


def tensors(
    vocab: int, target_hidden: int, *, draft_vocab: int | None = None, seed: int = 0, **config: Any
) -> dict[str, Tensor]:
    """Those of a head, by the names of the first layout."""
    draft, h, taps = draft_vocab or vocab, HIDDEN, len(config.get("eagle_aux_hidden_state_layer_ids", (0, 0, 0)))
    draw = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) / math.sqrt(shape[-1]) * 2

    def norm(size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=draw)

    found = {
        "fc.weight": weight(h, taps * target_hidden),
        "midlayer.self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, 2 * h),
        "midlayer.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, 2 * h),
        "midlayer.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, 2 * h),
        "midlayer.self_attn.o_proj.weight": weight(h, HEADS * HEAD_DIM),
        "midlayer.mlp.gate_proj.weight": weight(MLP, h),
        "midlayer.mlp.up_proj.weight": weight(MLP, h),
        "midlayer.mlp.down_proj.weight": weight(h, MLP),
        "midlayer.input_layernorm.weight": norm(h),
        "midlayer.hidden_norm.weight": norm(h),
        "midlayer.post_attention_layernorm.weight": norm(h),
        "norm.weight": norm(h),
        "lm_head.weight": weight(draft, h),
        "embed_tokens.weight": weight(vocab, h) * math.sqrt(h),
    }
    if draft_vocab is not None:
        ids = torch.randperm(vocab, generator=draw)[:draft].sort().values
        found["d2t"] = ids - torch.arange(draft)
        found["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    if config.get("fc_norm"):
        found |= {f"fc_norm.{i}.weight": norm(target_hidden) for i in range(taps)}
    if config.get("norm_before_fc"):
        found["input_norm.weight"] = norm(taps * target_hidden)
    return found


def slots(depth: int, rank: int, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """What a parallel head has beside these."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "slots.embedding": torch.randn(depth - 1, HIDDEN, generator=draw),
        "slots.state": torch.randn(depth - 1, HIDDEN, generator=draw),
        "follow.down.weight": torch.randn(rank, HIDDEN, generator=draw) / math.sqrt(HIDDEN),
        "follow.up.weight": torch.randn(rows, rank, generator=draw),
    }


def configuration(vocab: int, *, draft_vocab: int | None = None, **config: Any) -> dict[str, Any]:
    """A flat config.json."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "vocab_size": vocab,
        "draft_vocab_size": draft_vocab or vocab,
        **config,
    }


OF_HEAD = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def speculators(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same, as the package `speculators` writes it."""
    own = (*OF_HEAD, "eagle_aux_hidden_state_layer_ids", "target_hidden_size")
    layer = {key: value for key, value in config.items() if key not in own}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        **{key: config[key] for key in own if key in config},
    }


def save(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], layout: str = "midlayer") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    named = {name.replace("midlayer.", f"{layout}."): tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, str(folder / "model.safetensors"))
    return folder


def reference(
    config: Mapping[str, Any],
    w: Mapping[str, Tensor],
    hidden: Sequence[Tensor],
    tokens: Sequence[int],
    guessed: Sequence[int],
) -> Tensor:
    """Logits behind `guessed` tokens: every row computed anew, token by token, in float64.

    `hidden`: the target's states of `tokens` but the last, [n - 1, D] each. Of a head with `slots.*` the guessed tokens
    are not read, but for what the last one changes behind it.
    """
    w = {name: x.double() if x.is_floating_point() else x for name, x in w.items()}
    eps = config["rms_norm_eps"]

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    parts = [h.double() for h in hidden]
    if config.get("fc_norm"):
        parts = [rms(part, w[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)]
    joined = torch.cat(parts, -1)
    if config.get("norm_before_fc"):
        joined = rms(joined, w["input_norm.weight"])
    states = list(joined @ w["fc.weight"].T)
    parallel = "slots.state" in w
    states += list(w["slots.state"]) if parallel else []
    inputs = [*tokens[1:], *guessed]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logits = torch.empty(0)
    for place, token in enumerate(inputs):
        state = states[place]
        normed = rms(state, w["midlayer.hidden_norm.weight"])
        slot = place - len(tokens) + 1
        inner = parallel and slot >= 0
        embedded = w["slots.embedding"][slot] if inner else w["embed_tokens.weight"][token]
        both = torch.cat([rms(embedded, w["midlayer.input_layernorm.weight"]), normed])
        q, k, v = (w[f"midlayer.self_attn.{name}_proj.weight"] @ both for name in "qkv")
        q, k, v = (x.view(-1, HEAD_DIM) for x in (q, k, v))
        keys.append(turn(k, place, config["rope_theta"]))
        values.append(v)
        q = turn(q, place, config["rope_theta"])
        mixed = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = torch.stack([q[head] @ key[group] for key in keys]) / math.sqrt(HEAD_DIM)
            mixed.append((scores.softmax(0)[:, None] * torch.stack([value[group] for value in values])).sum(0))
        beside = normed if config.get("norm_before_residual") else state
        x = beside + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(mixed)
        y = rms(x, w["midlayer.post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(w["midlayer.mlp.gate_proj.weight"] @ y)
        x = x + w["midlayer.mlp.down_proj.weight"] @ (gate * (w["midlayer.mlp.up_proj.weight"] @ y))
        last = rms(x, w["norm.weight"])
        logits = w["lm_head.weight"] @ last
        if parallel:
            logits = logits + w["follow.up.weight"] @ (w["follow.down.weight"] @ w["embed_tokens.weight"][token])
        if place + 1 >= len(states):
            states.append(last if config.get("norm_output") else x)
    return logits


def turn(x: Tensor, place: int, theta: float) -> Tensor:
    """Each pair (i, i + half) as a complex number, times e^(i place theta^(-2i/E))."""
    half = x.shape[-1] // 2
    angle = place * theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)
