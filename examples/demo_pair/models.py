"""The two Llama models of the demo pair and the early-exit head, sized so that the target costs >= 20 drafts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 1024
END_OF_TEXT = 0
MAX_POSITIONS = 2048
EARLY_EXIT_LAYER = 1  # the head reads the hidden state after this many decoder layers


def _config(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        attn_implementation="sdpa",
        use_cache=True,
    )


def target_config() -> LlamaConfig:
    return _config(hidden=512, layers=4, heads=8, kv_heads=4, intermediate=1280)


def draft_config() -> LlamaConfig:
    return _config(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=384)


class EarlyExit(nn.Module):
    """Maps an early hidden state to one that the target's own output embedding can read."""

    def __init__(self, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden: Tensor, head: Tensor) -> Tensor:
        """[B, T, D], [V, D] -> [B, T, V]"""
        return nn.functional.linear(self.proj(self.norm(hidden)), head)


def init_(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Normal(0, 1/sqrt(fan_in)) matrices, Normal(0, 0.02) embedding, residual outputs at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() != 2:
                weight.fill_(1.0)
            elif "embed_tokens" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5 * 0.6)
    return model


class DemoPair(nn.Module):
    """Target, draft and early-exit head run on the same tokens; one forward for one co-training step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.target = init_(LlamaForCausalLM(target_config()), seed)
        self.draft = init_(LlamaForCausalLM(draft_config()), seed + 1)
        self.exit = EarlyExit(self.target.config.hidden_size)
        with torch.no_grad():
            self.exit.proj.weight.copy_(torch.eye(self.target.config.hidden_size))

    def target_logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] -> logits [B, T, V], hidden state after EARLY_EXIT_LAYER layers [B, T, D]"""
        body = self.target.model
        hidden = body.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rope = body.rotary_emb(hidden, positions)
        early = hidden
        for index, layer in enumerate(body.layers, start=1):
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
            if index == EARLY_EXIT_LAYER:
                early = hidden
        return self.target.lm_head(body.norm(hidden)), early

    def draft_logits(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]"""
        return self.draft(input_ids=tokens, use_cache=False).logits

    def exit_logits(self, early: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]; the target gets no gradient from here."""
        return self.exit(early.detach(), self.target.lm_head.weight.detach())
